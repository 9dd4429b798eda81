"""Objectives and phases: what is hidden and predicted is checked against plain loops over the definition."""

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest

from megatron_ext.config import MaskingConfig, PhaseConfig
from megatron_ext.objective import (
    DOCUMENT_STREAM,
    MASK_STREAM,
    MIXTURE_STREAM,
    OBJECTIVES,
    VALIDATION_STREAM,
    Example,
    PhasePlan,
    Vocabulary,
    make_example,
    random_generator,
)

VOCAB_SIZE = 120
MASK_ID = 1
SPECIAL_IDS = (0, 1, 2, 3, 4, 57, 119)
VOCABULARY = Vocabulary(
    mask_id=MASK_ID,
    is_special=np.isin(np.arange(VOCAB_SIZE), SPECIAL_IDS),
    starts_word=np.isin(np.arange(VOCAB_SIZE), SPECIAL_IDS) | (np.arange(VOCAB_SIZE) % 5 < 2),
)
ORDINARY_IDS = [i for i in range(VOCAB_SIZE) if i not in SPECIAL_IDS]
LENGTH = 256
SAMPLES = 300


def make_sample(number: int, length: int = LENGTH, documents: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with a few special ones among them, and the lengths of the documents they belong to."""
    generator = np.random.default_rng(number)
    tokens = generator.integers(VOCAB_SIZE, size=length)
    cuts = np.sort(generator.choice(np.arange(1, length), size=documents - 1, replace=False))
    return tokens, np.diff([0, *cuts, length])


def apply(
    number: int, objective: str, masking: MaskingConfig, seed: int = 5, **sample: int
) -> tuple[np.ndarray, np.ndarray, Example]:
    """(tokens, document lengths, example) of one sample."""
    tokens, segments = make_sample(number, **sample)
    generator = random_generator(seed, MASK_STREAM, number)
    return tokens, segments, make_example(tokens, segments, OBJECTIVES[objective], masking, masking.ratio, VOCABULARY, generator)


def first_tokens(segments: np.ndarray) -> set[int]:
    """Positions of the documents' first tokens."""
    return {int(sum(segments[:k])) for k in range(len(segments))}


def maskable_positions(tokens: np.ndarray, segments: np.ndarray, objective: str) -> list[int]:
    excluded = first_tokens(segments) if objective == "mntp" else set()
    return [i for i, token in enumerate(tokens) if token not in SPECIAL_IDS and i not in excluded]


def hidden_positions(example: Example, objective: str) -> list[int]:
    """Positions of the tokens that are predicted."""
    return [int(i) + (objective == "mntp") for i in example.target_positions]


def words_of(tokens: np.ndarray, segments: np.ndarray, objective: str) -> list[list[int]]:
    """The maskable pieces of each word; a word ends at a word start, a document's end, or a token that is not maskable."""
    maskable, starts = set(maskable_positions(tokens, segments, objective)), first_tokens(segments)
    words: list[list[int]] = []
    for i, token in enumerate(tokens):
        if i not in maskable:
            continue
        if i in starts or VOCABULARY.starts_word[token] or i - 1 not in maskable:
            words.append([])
        words[-1].append(i)
    return words


def drawn_units(number: int, objective: str, masking: MaskingConfig, **sample: int) -> list[list[int]]:
    """The units of a sample, seen from outside: what becomes hidden together as the ratio grows under the same generator."""
    tokens, segments = make_sample(number, **sample)

    def hidden_at(ratio: float) -> frozenset[int]:
        generator = random_generator(5, MASK_STREAM, number)
        example = make_example(tokens, segments, OBJECTIVES[objective], masking, ratio, VOCABULARY, generator)
        return frozenset(hidden_positions(example, objective))

    units = []

    def search(low: float, high: float, at_low: frozenset[int], at_high: frozenset[int]) -> None:
        if at_low == at_high:
            return
        if high - low < 1e-9:
            units.append(sorted(at_high - at_low))
            return
        middle = (low + high) / 2
        at_middle = hidden_at(middle)
        search(low, middle, at_low, at_middle)
        search(middle, high, at_middle, at_high)

    search(0.0, 1.0, hidden_at(0.0), hidden_at(1.0))
    return units


@pytest.mark.parametrize("objective", ["mlm", "mntp"])
@pytest.mark.parametrize("count", ["bernoulli", "exact"])
@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("ratio", [0.15, 0.4])
def test_ratio_over_many_samples(unit: str, count: str, objective: str, ratio: float) -> None:
    masking = MaskingConfig(ratio=ratio, unit=unit, count=count)
    hidden, maskable, by_quarter = 0, 0, Counter()
    for number in range(SAMPLES):
        tokens, segments, example = apply(number, objective, masking)
        allowed = maskable_positions(tokens, segments, objective)
        found = hidden_positions(example, objective)
        assert set(found) <= set(allowed)
        hidden, maskable = hidden + len(found), maskable + len(allowed)
        by_quarter.update(position * 4 // LENGTH for position in found)
    # 5 standard deviations of ~70,000 independent tokens are 0.009; units of several tokens vary more.
    assert hidden / maskable == pytest.approx(ratio, abs=0.009 if unit == "token" else 0.02)
    assert min(by_quarter.values()) > 0.9 * hidden / 4, "hidden tokens cluster in a part of the sample"


@pytest.mark.parametrize("objective", ["mlm", "mntp"])
@pytest.mark.parametrize("ratio", [0.01, 0.15, 0.333, 0.9])
def test_exact_count(objective: str, ratio: float) -> None:
    shortages = Counter()
    for number in range(60):
        for unit in ("token", "word", "span"):
            tokens, segments, example = apply(number, objective, MaskingConfig(ratio=ratio, unit=unit, count="exact"))
            budget = round(ratio * len(maskable_positions(tokens, segments, objective)))
            short = budget - len(example.target_positions)
            shortages[unit] += short
            if unit == "token":
                assert short == 0
            elif unit == "word":
                found = set(hidden_positions(example, objective))
                left = [len(word) for word in words_of(tokens, segments, objective) if not found & set(word)]
                assert 0 <= short < min(left, default=1)
            else:
                assert 0 <= short < 10
    assert shortages["span"] < 60, "the budget is filled with shorter spans where a long one does not fit"


@pytest.mark.parametrize("objective", ["mlm", "mntp"])
@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_special_tokens_are_neither_hidden_nor_sampled(unit: str, objective: str) -> None:
    masking = MaskingConfig(ratio=0.9, unit=unit, mask_share=0.2, random_share=0.7, keep_share=0.1)
    sampled = Counter()
    for number in range(SAMPLES):
        tokens, _, example = apply(number, objective, masking)
        assert not np.isin(example.target_ids, SPECIAL_IDS).any()
        hidden = np.zeros(LENGTH, dtype=bool)
        hidden[hidden_positions(example, objective)] = True
        np.testing.assert_array_equal(example.input_ids[~hidden], tokens[~hidden])
        sampled.update(example.input_ids[hidden & (example.input_ids != tokens)].tolist())
    del sampled[MASK_ID]
    assert set(sampled) == set(ORDINARY_IDS), "random tokens are all ordinary tokens of the vocabulary, and no others"
    mean = sum(sampled.values()) / len(ORDINARY_IDS)
    assert max(abs(count - mean) for count in sampled.values()) < 5 * mean**0.5, "random tokens are drawn uniformly"


def test_shares_of_mask_random_and_kept_tokens() -> None:
    masking = MaskingConfig(ratio=0.5, mask_share=0.8, random_share=0.1, keep_share=0.1)
    counts = Counter()
    for number in range(SAMPLES):
        tokens, _, example = apply(number, "mlm", masking)
        shown = example.input_ids[example.target_positions]
        counts["mask"] += int((shown == MASK_ID).sum())
        counts["kept"] += int((shown == example.target_ids).sum())
        counts["random"] += int(((shown != MASK_ID) & (shown != example.target_ids)).sum())
    total = sum(counts.values())
    same_by_chance = 0.1 / len(ORDINARY_IDS)
    assert total > 30_000
    assert counts["mask"] / total == pytest.approx(0.8, abs=0.01)
    assert counts["random"] / total == pytest.approx(0.1 - same_by_chance, abs=0.008)
    assert counts["kept"] / total == pytest.approx(0.1 + same_by_chance, abs=0.008)


def test_default_hides_everything_behind_the_mask_token() -> None:
    _, _, example = apply(0, "mlm", MaskingConfig())
    assert len(example.target_positions) > 0
    assert set(example.input_ids[example.target_positions].tolist()) == {MASK_ID}


@pytest.mark.parametrize("objective", ["mlm", "mntp"])
@pytest.mark.parametrize("count", ["bernoulli", "exact"])
def test_whole_words_are_hidden_completely(count: str, objective: str) -> None:
    sizes = Counter()
    for number in range(SAMPLES):
        tokens, segments, example = apply(number, objective, MaskingConfig(unit="word", count=count))
        found = set(hidden_positions(example, objective))
        for word in words_of(tokens, segments, objective):
            assert len(found & set(word)) in (0, len(word)), f"word {word} is hidden in part: {sorted(found & set(word))}"
            sizes[len(word)] += bool(found & set(word))
    assert sum(sizes[size] for size in range(3, 30)) > 100, "words of several pieces are among them"


@pytest.mark.parametrize("objective", ["mlm", "mntp"])
def test_words_are_the_units_that_are_drawn(objective: str) -> None:
    for number in range(5):
        units = drawn_units(number, objective, MaskingConfig(unit="word"), length=60, documents=4)
        assert sorted(units) == words_of(*make_sample(number, length=60, documents=4), objective)


@pytest.mark.parametrize("objective", ["mlm", "mntp"])
def test_spans_are_contiguous_short_and_stay_inside_documents(objective: str) -> None:
    lengths = []
    for number in range(12):
        tokens, segments = make_sample(number, length=80, documents=4)
        starts = first_tokens(segments)
        units = drawn_units(number, objective, MaskingConfig(unit="span", mean_span_length=6.0), length=80, documents=4)
        assert sorted(sum(units, [])) == maskable_positions(tokens, segments, objective), "each token is in one span"
        for unit in units:
            assert unit == list(range(unit[0], unit[-1] + 1)), f"{unit} has a gap"
            assert len(unit) <= 10
            assert not starts & set(unit[1:]), f"{unit} crosses the start of a document"
            assert not set(tokens[unit]) & set(SPECIAL_IDS)
        lengths += [len(unit) for unit in units]
    assert max(lengths) > 4, "longer spans do occur"


def test_span_lengths_are_geometric_up_to_ten() -> None:
    ordinary = dataclasses.replace(VOCABULARY, is_special=np.zeros(VOCAB_SIZE, dtype=bool))
    tokens, mean = np.full(120_000, 7), 3.0
    generator = random_generator(1, MASK_STREAM, 0)
    masking = MaskingConfig(unit="span", mean_span_length=mean, ratio=0.01)
    example = make_example(tokens, np.array([len(tokens)]), OBJECTIVES["mlm"], masking, 0.01, ordinary, generator)
    gaps = np.flatnonzero(np.diff(example.target_positions) > 1)
    runs = np.diff([-1, *gaps, len(example.target_positions) - 1])
    # Mean of min(G, 10) with G geometric; 1 % of the runs are two neighbouring spans.
    expected = sum((1 - 1 / mean) ** k for k in range(10))
    assert runs.mean() == pytest.approx(expected, rel=0.12)
    assert (runs == 1).mean() == pytest.approx(1 / mean, abs=0.08)


def test_clm_predicts_each_next_token_inside_documents() -> None:
    for number in range(50):
        tokens, segments, example = apply(number, "clm", MaskingConfig())
        np.testing.assert_array_equal(example.input_ids, tokens)
        starts = first_tokens(segments)
        expected = [(i - 1, int(tokens[i])) for i in range(len(tokens)) if i not in starts]
        assert list(zip(example.target_positions.tolist(), example.target_ids.tolist(), strict=True)) == expected


@pytest.mark.parametrize("objective", ["mlm", "mntp"])
@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_masked_targets_are_the_original_tokens(unit: str, objective: str) -> None:
    for number in range(50):
        tokens, segments, example = apply(number, objective, MaskingConfig(unit=unit))
        positions = example.target_positions
        assert (np.diff(positions) > 0).all()
        if objective == "mlm":
            assert example.target_ids.tolist() == tokens[positions].tolist()
        else:
            assert positions.min() >= 0
            assert example.target_ids.tolist() == tokens[positions + 1].tolist()
            assert not first_tokens(segments) & set((positions + 1).tolist()), "nobody predicts the first token of a document"


@pytest.mark.parametrize("objective", ["clm", "mlm", "mntp"])
@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("count", ["bernoulli", "exact"])
def test_samples_with_little_or_nothing_to_predict(objective: str, unit: str, count: str) -> None:
    masking = MaskingConfig(unit=unit, count=count, ratio=0.99)
    rows = [([7], [1]), ([0], [1]), ([0, 2, 57], [3]), ([7, 8, 9], [1, 1, 1]), ([7, 7], [2])]
    for tokens, segments in rows:
        generator = random_generator(0, MASK_STREAM, 0)
        example = make_example(np.array(tokens), np.array(segments), OBJECTIVES[objective], masking, 0.99, VOCABULARY, generator)
        assert len(example.input_ids) == len(tokens)
        assert len(example.target_ids) == len(example.target_positions) <= len(tokens)
        if objective != "clm" and not set(tokens) - set(SPECIAL_IDS):
            assert len(example.target_ids) == 0


def test_examples_depend_on_seed_and_index_only() -> None:
    masking = MaskingConfig(unit="span", mask_share=0.5, random_share=0.5)
    forward = {number: apply(number, "mlm", masking)[2] for number in range(40)}
    order = list(range(40))
    random.Random(0).shuffle(order)
    np.random.seed(3)
    for number in order:
        again = apply(number, "mlm", masking)[2]
        for name in ("input_ids", "target_positions", "target_ids"):
            np.testing.assert_array_equal(getattr(again, name), getattr(forward[number], name))
    other_seed = apply(0, "mlm", masking, seed=6)[2]
    assert other_seed.target_positions.tolist() != forward[0].target_positions.tolist()


def test_tokens_are_not_changed_in_place() -> None:
    for objective in OBJECTIVES:
        tokens, segments = make_sample(0)
        make_example(tokens, segments, OBJECTIVES[objective], MaskingConfig(), 0.4, VOCABULARY, random_generator(0, 0, 0))
        np.testing.assert_array_equal(tokens, make_sample(0)[0])


def test_random_streams_do_not_overlap() -> None:
    streams = (MASK_STREAM, MIXTURE_STREAM, DOCUMENT_STREAM, VALIDATION_STREAM)
    keys = [(seed, stream, index, part) for seed in (0, 1) for stream in streams for index in range(4) for part in range(2)]
    draws = np.concatenate([random_generator(*key).integers(2**63, size=2000) for key in keys])
    assert len(np.unique(draws)) == len(draws)


def plan(*phases: PhaseConfig, tokens_per_step: int = 300) -> PhasePlan:
    return PhasePlan(list(phases), tokens_per_step)


def test_phase_edges() -> None:
    phases = plan(
        PhaseConfig(objective="clm", steps=3),
        PhaseConfig(objective="mlm", tokens=900),
        PhaseConfig(objective="mntp", tokens=901),
        PhaseConfig(objective="clm", tokens=1, optimizer_state="reset"),
    )
    expected = ["0-clm"] * 3 + ["1-mlm"] * 3 + ["2-mntp"] * 4 + ["3-clm"]
    assert [phases.phase_at(step).name for step in range(phases.total_steps)] == expected
    assert [(p.start_step, p.end_step) for p in phases.phases] == [(0, 3), (3, 6), (6, 10), (10, 11)]
    assert [p.resets_optimizer for p in phases.phases] == [False, False, False, True]
    for outside in (-1, 11):
        with pytest.raises(IndexError):
            phases.phase_at(outside)


def test_mask_ratio_schedule() -> None:
    masking = MaskingConfig(ratio=0.5, final_ratio=0.1)
    phases = plan(PhaseConfig(objective="clm", steps=7), PhaseConfig(objective="mlm", steps=5, masking=masking))
    ratios = [phases.phase_at(step).mask_ratio(step) for step in range(7, 12)]
    assert ratios == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert phases.comparison_mask_ratio() == pytest.approx(0.1)
    constant = plan(PhaseConfig(objective="mlm", steps=5, masking=MaskingConfig(ratio=0.3)))
    assert [constant.phases[0].mask_ratio(step) for step in (0, 2, 4)] == [0.3] * 3
    single = plan(PhaseConfig(objective="mlm", steps=1, masking=masking))
    assert single.phases[0].mask_ratio(0) == 0.5


def test_comparison_ratio_is_that_of_the_last_masked_phase() -> None:
    masked = PhaseConfig(objective="mlm", steps=2, masking=MaskingConfig(ratio=0.2))
    causal = PhaseConfig(objective="clm", steps=2, masking=MaskingConfig(ratio=0.9))
    mixed = PhaseConfig(objective={"clm": 0.5, "mntp": 0.5}, steps=2, masking=MaskingConfig(ratio=0.3))
    assert plan(masked, causal).comparison_mask_ratio() == 0.2
    assert plan(masked, mixed, causal).comparison_mask_ratio() == 0.3
    assert plan(causal).comparison_mask_ratio() == 0.4


def test_mixture_shares() -> None:
    phase = plan(PhaseConfig(objective={"clm": 1.0, "mlm": 2.0, "mntp": 5.0}, steps=2)).phases[0]
    counts = Counter(phase.objective(3, number).name for number in range(8000))
    for name, share in (("clm", 1 / 8), ("mlm", 2 / 8), ("mntp", 5 / 8)):
        assert counts[name] / 8000 == pytest.approx(share, abs=0.02)
    draws = [[phase.objective(seed, number).name for number in range(100)] for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


def test_mixture_is_the_same_at_every_data_parallel_size() -> None:
    phase = plan(PhaseConfig(objective={"clm": 0.25, "mlm": 0.75}, steps=2)).phases[0]
    alone = [phase.objective(1, number).name for number in range(64)]
    assert set(alone) == {"clm", "mlm"}
    for ranks in (2, 4, 8):
        by_rank = [[phase.objective(1, number).name for number in range(rank, 64, ranks)] for rank in range(ranks)]
        assert [by_rank[number % ranks][number // ranks] for number in range(64)] == alone


def test_equal_mixtures_draw_equally() -> None:
    """Two configurations that compare equal (and share a fingerprint) are the same run, however their keys are ordered."""
    mixtures = ({"clm": 0.25, "mlm": 0.75}, {"mlm": 0.75, "clm": 0.25})
    first, second = (plan(PhaseConfig(objective=mixture, steps=2)).phases[0] for mixture in mixtures)
    assert [first.objective(1, number).name for number in range(64)] == [second.objective(1, number).name for number in range(64)]


def test_schedule_segments() -> None:
    def phase(steps: int, rewarm: bool) -> PhaseConfig:
        return PhaseConfig(objective="clm", steps=steps, learning_rate="rewarm" if rewarm else "continue")

    phases = plan(phase(4, False), phase(3, False), phase(5, True), phase(2, False), phase(6, True))
    expected = [(0, 7)] * 7 + [(7, 14)] * 7 + [(14, 20)] * 6
    assert [phases.schedule_segment(step) for step in range(20)] == expected
    from_the_start = plan(phase(4, True), phase(3, False))
    assert {from_the_start.schedule_segment(step) for step in range(7)} == {(0, 7)}
