"""Micro-batches: the same samples at every data-parallel size, and a prefetching thread that changes nothing."""

import dataclasses
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from megatron_ext.config import DataConfig, DataSource, MaskingConfig, PhaseConfig, TrainingConfig
from megatron_ext.data.batch import MicroBatch, collate
from megatron_ext.data.dataset import Sample
from megatron_ext.data.loader import BatchBuilder, StepData, TrainingLoader
from megatron_ext.errors import UserError
from megatron_ext.objective import MASK_STREAM, OBJECTIVES, VALIDATION_STREAM, Example, PhasePlan, Vocabulary

pytestmark = pytest.mark.timeout(60)  # a loader that never ends is a failure, too

LENGTH = 32
BATCH = 8
MASK_ID = 1
VOCABULARY = Vocabulary(mask_id=MASK_ID, is_special=np.arange(200) < 5, starts_word=np.arange(200) % 3 == 0)
PHASES = [
    PhaseConfig(objective="clm", steps=3),
    PhaseConfig(objective="mlm", steps=2, masking=MaskingConfig(ratio=0.6, final_ratio=0.2)),
    PhaseConfig(objective={"clm": 0.5, "mlm": 0.3, "mntp": 0.2}, steps=4, masking=MaskingConfig(unit="span")),
]
STEPS = 9
TENSORS = ("input_ids", "position_ids", "target_positions", "target_ids", "cumulative_lengths")


class Source:
    """Sample i: random tokens that depend on i alone, in three documents; remembers what was asked for."""

    def __init__(self, fails_at: int | None = None):
        self.fails_at = fails_at
        self.asked: list[int] = []

    def sample(self, index: int) -> Sample:
        if index == self.fails_at:
            raise OSError(f"cannot read sample {index}")
        self.asked.append(index)
        generator = np.random.default_rng(index)
        cuts = np.sort(generator.choice(np.arange(1, LENGTH), size=2, replace=False))
        return Sample(generator.integers(200, size=LENGTH), np.diff([0, *cuts, LENGTH]))


def builder(source: Source, seed: int = 4, stream: int = MASK_STREAM) -> BatchBuilder:
    data = DataConfig(tokenizer="none", train=[DataSource(prefix="none")], sequence_length=LENGTH)
    return BatchBuilder(source, data, VOCABULARY, seed, stream)


def loader(size: int = 1, rank: int = 0, ranks: int = 1, source: Source | None = None) -> TrainingLoader:
    training = TrainingConfig(seed=4, micro_batch_size=size, global_batch_size=BATCH)
    return TrainingLoader(builder(source or Source()), PhasePlan(PHASES, BATCH * LENGTH), training, rank, ranks)


def global_step(step: int, size: int, ranks: int) -> list[MicroBatch]:
    """The micro-batches of all ranks, in the order of their samples."""
    by_rank = [loader(size, rank, ranks).load(step).micro_batches for rank in range(ranks)]
    return [batch for together in zip(*by_rank, strict=True) for batch in together]


def assert_equal(first: MicroBatch, second: MicroBatch) -> None:
    assert first.objective == second.objective
    assert first.segment_lengths == second.segment_lengths
    assert first.max_position == second.max_position
    for name in TENSORS:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def original_tokens(batches: list[MicroBatch]) -> list[int]:
    """Input tokens with the hidden ones put back."""
    rows = []
    for batch in batches:
        tokens = batch.input_ids.clone()
        if batch.objective.corrupts:
            tokens[batch.target_positions + batch.objective.predicts_next] = batch.target_ids
        rows += tokens.tolist()
    return rows


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("size", [1, 2])
def test_ranks_together_hold_the_global_batch(ranks: int, size: int) -> None:
    for step in range(STEPS):
        alone, spread = global_step(step, size, 1), global_step(step, size, ranks)
        assert len(alone) == len(spread) == BATCH // size
        for first, second in zip(alone, spread, strict=True):
            assert_equal(first, second)


@pytest.mark.parametrize("size, ranks", [(1, 1), (2, 2), (8, 1)])
def test_step_holds_its_samples_in_order(size: int, ranks: int) -> None:
    source = Source()
    for step in range(STEPS):
        expected = [source.sample(index).tokens for index in range(step * BATCH, (step + 1) * BATCH)]
        assert original_tokens(global_step(step, size, ranks)) == np.concatenate(expected).tolist()


@pytest.mark.parametrize("step", [1, 4])
def test_micro_batch_size_changes_no_mask(step: int) -> None:
    """The samples' tokens, masks and targets, whatever the rows they are laid in (outside mixtures, drawn per micro-batch)."""

    def flat(batches: list[MicroBatch]) -> list[list[int]]:
        offsets = np.cumsum([0] + [len(batch.input_ids) for batch in batches])
        positions = [
            position + int(offset)
            for batch, offset in zip(batches, offsets, strict=False)
            for position in batch.target_positions.tolist()
        ]
        ids = [[value for batch in batches for value in getattr(batch, name).tolist()] for name in ("input_ids", "target_ids")]
        return [positions, *ids]

    assert flat(global_step(step, 1, 1)) == flat(global_step(step, 4, 2)) == flat(global_step(step, 8, 1))


def test_mask_ratio_follows_the_phase() -> None:
    shares = {}
    for step in (3, 4):
        batches = global_step(step, 1, 1)
        ordinary = sum(int((torch.tensor(original_tokens([batch])) >= 5).sum()) for batch in batches)
        shares[step] = sum(len(batch.target_ids) for batch in batches) / ordinary
    assert shares[3] == pytest.approx(0.6, abs=0.12)
    assert shares[4] == pytest.approx(0.2, abs=0.12)


def test_seed_and_stream_change_the_masks() -> None:
    arguments = (0, 4, OBJECTIVES["mlm"], MaskingConfig(), 0.4)
    batches = [
        builder(Source(), seed, stream).build(*arguments)
        for seed, stream in ((4, MASK_STREAM), (5, MASK_STREAM), (4, VALIDATION_STREAM))
    ]
    positions = [batch.target_positions.tolist() for batch in batches]
    assert positions[0] != positions[1] and positions[0] != positions[2]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("token", [200, 255])
def test_token_outside_the_vocabulary_is_refused(objective: str, token: int) -> None:
    """A data set without a sidecar may be another tokenizer's: padding rows must not be trained in silence."""

    class Foreign(Source):
        def sample(self, index: int) -> Sample:
            sample = super().sample(index)
            sample.tokens[LENGTH // 2] = token
            return sample

    with pytest.raises(UserError, match=str(token)):
        builder(Foreign()).build(0, 2, OBJECTIVES[objective], MaskingConfig(), 0.4)


@pytest.mark.parametrize("first_step", [0, 2, 5, 8, 9])
def test_prefetching_gives_what_loading_gives(first_step: int) -> None:
    direct = loader(2, 1, 2)
    steps = list(loader(2, 1, 2).prefetch(first_step, STEPS))
    assert [data.step for data in steps] == list(range(first_step, STEPS))
    for data in steps:
        for first, second in zip(data.micro_batches, direct.load(data.step).micro_batches, strict=True):
            assert_equal(first, second)


def test_prefetched_batches_switch_objective_at_the_phase_edges() -> None:
    names = [{batch.objective.name for batch in data.micro_batches} for data in loader().prefetch(0, STEPS)]
    assert names[:5] == [{"clm"}] * 3 + [{"mlm"}] * 2
    assert set.union(*names[5:]) == {"clm", "mlm", "mntp"}


def loader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "data-loader"}


def test_error_in_the_thread_surfaces_after_the_steps_before_it() -> None:
    iterator: Iterator[StepData] = loader(source=Source(fails_at=3 * BATCH + 5)).prefetch(0, STEPS)
    assert [next(iterator).step for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="cannot read sample 29"):
        next(iterator)
    assert not loader_threads()


@pytest.mark.parametrize("taken", [1, 4])
def test_early_end_stops_the_thread(taken: int) -> None:
    source = Source()
    iterator = loader(source=source).prefetch(0, STEPS)
    for _ in range(taken):
        next(iterator)
    assert len(loader_threads()) == 1
    iterator.close()
    assert not loader_threads()
    assert max(source.asked) < (taken + 4) * BATCH, "the thread stays a few steps ahead, no more"


def test_break_stops_the_thread() -> None:
    for data in loader().prefetch(0, STEPS):
        if data.step == 1:
            break
    assert not loader_threads()


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("restart", [False, True])
def test_collate(across: bool, restart: bool) -> None:
    examples = [
        Example(np.arange(6) + 10, np.array([1, 4]), np.array([50, 51])),
        Example(np.arange(6) + 20, np.array([0]), np.array([52])),
    ]
    segments = [np.array([2, 4]), np.array([1, 5])]
    batch = collate(examples, segments, OBJECTIVES["mlm"], documents_attend_across=across, restart_positions=restart)
    assert batch.input_ids.tolist() == [*range(10, 16), *range(20, 26)]
    assert batch.target_positions.tolist() == [1, 4, 6]
    assert batch.target_ids.tolist() == [50, 51, 52]
    assert batch.position_ids.tolist() == ([0, 1, 0, 1, 2, 3, 0, 0, 1, 2, 3, 4] if restart else [*range(6), *range(6)])
    assert batch.segment_lengths == ((6, 6) if across else (2, 4, 1, 5)), "samples never see each other"
    assert batch.cumulative_lengths.tolist() == ([0, 6, 12] if across else [0, 2, 6, 7, 12])
    assert batch.cumulative_lengths.dtype == torch.int32
    assert batch.max_position >= max(batch.position_ids.tolist()) + 1
    assert not batch.causal
    moved = batch.to(torch.device("cpu"))
    assert dataclasses.asdict(moved).keys() == dataclasses.asdict(batch).keys()
    assert_equal(moved, batch)
