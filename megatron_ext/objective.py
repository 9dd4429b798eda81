"""Objectives and phases: what is hidden, who sees whom, what is predicted, and from which step on.

An objective is corruption x attention x target:

    clm   nothing hidden     causal          the next token, at every position
    mlm   tokens hidden      bidirectional   the hidden token, at its own position
    mntp  tokens hidden      bidirectional   the hidden token, at the position before it

Everything here is a pure function: masks of (seed, sample index), phases of the step, the draw of a mixture of
(seed, micro-batch number). Nothing depends on rank, worker, layout or restarts. NumPy only: no torch, no megatron.
"""

import bisect
from dataclasses import dataclass

import numpy as np

from megatron_ext.config import MaskingConfig, PhaseConfig, RunConfig

MASK_STREAM, MIXTURE_STREAM, DOCUMENT_STREAM, VALIDATION_STREAM = range(4)
"""Independent random streams of one seed."""

MAX_SPAN_LENGTH = 10


def random_generator(seed: int, stream: int, index: int, part: int = 0) -> np.random.Generator:
    """The generator that belongs to one (seed, stream, index, part), whoever asks for it and in whatever order.

    Counter-based (Philox, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): no state is carried over.
    """
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, part, index]))


@dataclass(frozen=True)
class Objective:
    """One pretraining objective."""

    name: str
    corrupts: bool
    """Some input tokens are hidden, and just these are predicted; otherwise every token is."""
    causal: bool
    """A position sees only itself and what came before."""
    predicts_next: bool
    """The token at position j is predicted from the hidden state at j - 1 (else from the one at j)."""


OBJECTIVES = {
    "clm": Objective("clm", corrupts=False, causal=True, predicts_next=True),
    "mlm": Objective("mlm", corrupts=True, causal=False, predicts_next=False),
    "mntp": Objective("mntp", corrupts=True, causal=False, predicts_next=True),
}


@dataclass(frozen=True)
class Vocabulary:
    """What masking must know of the tokenizer."""

    mask_id: int
    is_special: np.ndarray
    """[vocab_size] bool: control, padding and other special ids, which are never hidden and never sampled."""
    starts_word: np.ndarray
    """[vocab_size] bool: the piece starts a new word."""

    @property
    def ordinary_ids(self) -> np.ndarray:
        """Ids that may stand in for a hidden token."""
        return np.flatnonzero(~self.is_special)


@dataclass(frozen=True)
class Example:
    """One sample as the model sees it under one objective."""

    input_ids: np.ndarray
    """[s] int64 token ids, corrupted if the objective says so."""
    target_positions: np.ndarray
    """[n] int64, ascending: positions whose hidden state predicts something."""
    target_ids: np.ndarray
    """[n] int64: what they predict."""


def make_example(
    tokens: np.ndarray,
    segment_lengths: np.ndarray,
    objective: Objective,
    masking: MaskingConfig,
    ratio: float,
    vocabulary: Vocabulary,
    generator: np.random.Generator,
) -> Example:
    """Apply an objective to one sample.

    Args:
        tokens: [s] token ids.
        segment_lengths: [k] lengths of the pieces of documents in the sample, in order; they sum to s.
        objective: the objective.
        masking: how tokens are chosen and replaced.
        ratio: share of the maskable tokens to hide at this step.
        vocabulary: special ids and word starts.
        generator: the generator of this (seed, sample index).
    """
    is_first = np.zeros(len(tokens), dtype=bool)
    is_first[np.cumsum(segment_lengths[:-1])] = True
    is_first[:1] = True
    if not objective.corrupts:
        predicted = np.flatnonzero(~is_first)
        return Example(tokens, predicted - 1, tokens[predicted])
    maskable = ~vocabulary.is_special[tokens]
    if objective.predicts_next:
        maskable &= ~is_first  # the first token of a document has nobody before it to predict it
    hidden = select_tokens(tokens, is_first, maskable, masking, ratio, vocabulary, generator)
    input_ids = replace_tokens(tokens, hidden, masking, vocabulary, generator)
    positions = np.flatnonzero(hidden)
    return Example(input_ids, positions - objective.predicts_next, tokens[positions])


def select_tokens(
    tokens: np.ndarray,
    is_first: np.ndarray,
    maskable: np.ndarray,
    masking: MaskingConfig,
    ratio: float,
    vocabulary: Vocabulary,
    generator: np.random.Generator,
) -> np.ndarray:
    """Choose what to hide: the sample is cut into units (tokens, words or spans), and whole units are drawn.

    With `exact` the drawn units are as many as fit into round(ratio x maskable) tokens, so the count is exact for tokens
    and at most a unit short otherwise.

    Returns:
        [s] bool.
    """
    unit_of = _unit_of_token(tokens, is_first, maskable, masking, vocabulary, generator)
    priority = generator.random(int(unit_of[-1]) + 1)
    if masking.count == "bernoulli":
        return (priority < ratio)[unit_of] & maskable
    budget = round(ratio * int(maskable.sum()))
    sizes = np.bincount(unit_of, weights=maskable).astype(np.int64)
    return _fill_budget(np.argsort(priority, kind="stable"), sizes, budget)[unit_of] & maskable


def _unit_of_token(
    tokens: np.ndarray,
    is_first: np.ndarray,
    maskable: np.ndarray,
    masking: MaskingConfig,
    vocabulary: Vocabulary,
    generator: np.random.Generator,
) -> np.ndarray:
    """[s] number of the unit that each token belongs to; units cross neither documents nor unmaskable tokens."""
    if masking.unit == "token":
        return np.arange(len(tokens))
    starts = is_first | ~maskable
    starts[1:] |= ~maskable[:-1]
    if masking.unit == "word":
        starts = starts | vocabulary.starts_word[tokens]
    else:
        lengths = np.minimum(generator.geometric(1.0 / masking.mean_span_length, size=len(tokens)), MAX_SPAN_LENGTH)
        ends = np.cumsum(lengths)
        starts[ends[ends < len(tokens)]] = True
    starts[0] = True
    return np.cumsum(starts) - 1


def _fill_budget(order: np.ndarray, sizes: np.ndarray, budget: int) -> np.ndarray:
    """Take units in `order` as long as they fit into `budget` tokens."""
    taken = np.zeros(len(sizes), dtype=bool)
    for unit in order:
        if sizes[unit] <= budget:
            taken[unit] = True
            budget -= int(sizes[unit])
        if budget == 0:
            break
    return taken


def replace_tokens(
    tokens: np.ndarray,
    hidden: np.ndarray,
    masking: MaskingConfig,
    vocabulary: Vocabulary,
    generator: np.random.Generator,
) -> np.ndarray:
    """Put the mask token, a random ordinary token or the token itself at the hidden positions. Returns [s] int64."""
    draw = generator.random(len(tokens))
    ordinary = vocabulary.ordinary_ids
    random_ids = ordinary[generator.integers(len(ordinary), size=len(tokens))]
    replaced = np.where(draw < masking.mask_share, vocabulary.mask_id, tokens)
    at_random = (draw >= masking.mask_share) & (draw < masking.mask_share + masking.random_share)
    return np.where(hidden, np.where(at_random, random_ids, replaced), tokens)


@dataclass(frozen=True)
class Phase:
    """One phase with its place in the run: steps [start_step, end_step)."""

    index: int
    start_step: int
    end_step: int
    weights: dict[str, float]
    """Objective name -> share of the micro-batches; one entry unless the phase is a mixture."""
    masking: MaskingConfig
    resets_optimizer: bool
    rewarms: bool

    @property
    def name(self) -> str:
        """Short name for logs and tags, e.g. `1-mlm` or `0-clm+mlm`."""
        return f"{self.index}-{'+'.join(self.weights)}"

    def mask_ratio(self, step: int) -> float:
        """Mask ratio of a step: linear from `ratio` at the first step to `final_ratio` at the last."""
        if self.masking.final_ratio is None:
            return self.masking.ratio
        progress = (step - self.start_step) / max(1, self.end_step - 1 - self.start_step)
        ratio = self.masking.ratio + (self.masking.final_ratio - self.masking.ratio) * progress
        lowest, highest = sorted((self.masking.ratio, self.masking.final_ratio))
        return min(max(ratio, lowest), highest)  # rounding may lead beyond the end

    def objective(self, seed: int, micro_batch: int) -> Objective:
        """The objective of a micro-batch, counted over the whole run: sample index // micro_batch_size."""
        names = sorted(self.weights)  # a mixture is the same however its keys are ordered
        if len(names) == 1:
            return OBJECTIVES[names[0]]
        shares = np.cumsum([self.weights[name] for name in names])
        draw = random_generator(seed, MIXTURE_STREAM, micro_batch).random() * shares[-1]
        place = int(np.searchsorted(shares, draw, side="right"))
        return OBJECTIVES[names[min(place, len(names) - 1)]]  # the product may round up to the sum of the shares


class PhasePlan:
    """The phases of a run, in order: step -> phase."""

    def __init__(self, phases: list[PhaseConfig], tokens_per_step: int):
        """Resolve lengths to steps.

        Args:
            phases: the configured phases.
            tokens_per_step: global_batch_size x sequence_length; lengths in tokens are rounded up to whole steps.
        """
        self.phases: list[Phase] = []
        start = 0
        for index, phase in enumerate(phases):
            steps = phase.steps if phase.steps is not None else -(-(phase.tokens or 0) // tokens_per_step)
            weights = phase.objective if isinstance(phase.objective, dict) else {phase.objective: 1.0}
            self.phases.append(
                Phase(
                    index=index,
                    start_step=start,
                    end_step=start + steps,
                    weights=dict(weights),
                    masking=phase.masking,
                    resets_optimizer=phase.optimizer_state == "reset",
                    rewarms=phase.learning_rate == "rewarm",
                )
            )
            start += steps
        self._starts = [phase.start_step for phase in self.phases]

    @classmethod
    def from_config(cls, config: RunConfig) -> "PhasePlan":
        """The plan of a run."""
        return cls(config.phases, config.training.global_batch_size * config.data.sequence_length)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole plan."""
        return self.phases[-1].end_step

    def phase_at(self, step: int) -> Phase:
        """The phase of the optimizer step with this number (the first step is 0)."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} lies outside the plan of {self.total_steps} steps")
        return self.phases[bisect.bisect_right(self._starts, step) - 1]

    def schedule_segment(self, step: int) -> tuple[int, int]:
        """[start, end) of the stretch of phases that share one learning-rate schedule with this step."""
        starts = [0, *(phase.start_step for phase in self.phases[1:] if phase.rewarms), self.total_steps]
        place = bisect.bisect_right(starts, step) - 1
        return starts[place], starts[place + 1]

    def comparison_mask_ratio(self) -> float:
        """Ratio for the MLM validation that makes phases comparable: the end of the last masked phase, 0.4 without one."""
        for phase in reversed(self.phases):
            if any(OBJECTIVES[name].corrupts for name in phase.weights):
                return phase.mask_ratio(phase.end_step - 1)
        return MaskingConfig().ratio
