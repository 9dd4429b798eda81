"""Properties of phase plans, learning rates and masks, for any plan and any documents."""

import math

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_ext.config import MaskingConfig, OptimizerConfig, PhaseConfig
from megatron_ext.objective import OBJECTIVES, PhasePlan, Vocabulary, make_example, random_generator
from megatron_ext.train.optimizer import learning_rate
from tests.unit.properties import examples

RATIOS = st.floats(1e-9, 1 - 1e-9)
MASK_ID, VOCAB_SIZE = 1, 40
SPECIAL = np.isin(np.arange(VOCAB_SIZE), (0, 1, 2, 17))
VOCABULARY = Vocabulary(mask_id=MASK_ID, is_special=SPECIAL, starts_word=SPECIAL | (np.arange(VOCAB_SIZE) % 3 == 0))


@st.composite
def maskings(draw: st.DrawFn) -> MaskingConfig:
    first, second = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    return MaskingConfig(
        ratio=draw(RATIOS),
        final_ratio=draw(st.none() | RATIOS),
        mask_share=first,
        random_share=(1 - first) * second,
        keep_share=(1 - first) * (1 - second),
        count=draw(st.sampled_from(["bernoulli", "exact"])),
        unit=draw(st.sampled_from(["token", "word", "span"])),
        mean_span_length=draw(st.floats(1, 50)),
    )


@st.composite
def phases(draw: st.DrawFn) -> list[PhaseConfig]:
    return [
        PhaseConfig(
            objective=draw(
                st.sampled_from(["clm", "mlm", "mntp"])
                | st.dictionaries(st.sampled_from(list(OBJECTIVES)), st.floats(5e-324, 1e307), min_size=1)
            ),
            masking=draw(maskings()),
            learning_rate=draw(st.sampled_from(["continue", "rewarm"])),
            **{draw(st.sampled_from(["steps", "tokens"])): draw(st.integers(1, 60) | st.integers(1, 10**18))},
        )
        for _ in range(draw(st.integers(1, 5)))
    ]


def steps_to_look_at(plan: PhasePlan) -> list[int]:
    """Some steps of a plan of any length: around every edge, and in the middle of every phase."""
    near = {edge + k for phase in plan.phases for edge in (phase.start_step, phase.end_step) for k in (-2, -1, 0, 1)}
    middles = {(phase.start_step + phase.end_step) // 2 for phase in plan.phases}
    return sorted(step for step in near | middles if 0 <= step < plan.total_steps)


@examples(120)
@given(phases(), st.integers(1, 10**7))
def test_phases_part_the_run(configured: list[PhaseConfig], tokens_per_step: int) -> None:
    plan = PhasePlan(configured, tokens_per_step)
    assert plan.phases[0].start_step == 0
    assert plan.phases[-1].end_step == plan.total_steps
    for before, after in zip(plan.phases, plan.phases[1:], strict=False):
        assert before.end_step == after.start_step
    for phase, config in zip(plan.phases, configured, strict=True):
        length = phase.end_step - phase.start_step
        assert length >= 1
        if config.steps is not None:
            assert length == config.steps
        else:
            assert (length - 1) * tokens_per_step < config.tokens <= length * tokens_per_step
    for step in steps_to_look_at(plan):
        (only,) = [phase for phase in plan.phases if phase.start_step <= step < phase.end_step]
        assert plan.phase_at(step) is only
    for step in (-1, plan.total_steps):
        try:
            plan.phase_at(step)
        except IndexError:
            continue
        raise AssertionError(f"step {step} has a phase")


@examples(120)
@given(phases())
def test_mask_ratios_stay_in_bounds_and_go_one_way(configured: list[PhaseConfig]) -> None:
    plan = PhasePlan(configured, 1024)
    for phase in plan.phases:
        first = phase.masking.ratio
        last = first if phase.masking.final_ratio is None else phase.masking.final_ratio
        ratios = [phase.mask_ratio(step) for step in steps_to_look_at(plan) if plan.phase_at(step) is phase]
        assert ratios[0] == first
        assert math.isclose(ratios[-1], last, abs_tol=1e-15) or phase.end_step - phase.start_step == 1
        assert all(min(first, last) <= ratio <= max(first, last) for ratio in ratios)
        assert ratios == sorted(ratios, reverse=last < first)


@examples(80)
@given(phases(), st.integers(0, 2**63 - 1), st.integers(0, 10**15))
def test_a_mixture_draws_one_of_its_objectives(configured: list[PhaseConfig], seed: int, micro_batch: int) -> None:
    for phase in PhasePlan(configured, 1024).phases:
        assert phase.objective(seed, micro_batch).name in phase.weights


def test_a_mixture_of_the_smallest_weights_draws_too() -> None:
    """A product with 5e-324 rounds up to the sum of the weights as often as not."""
    (phase,) = PhasePlan([PhaseConfig(objective={"clm": 5e-324, "mlm": 5e-324}, steps=1)], 1).phases
    assert {phase.objective(0, micro_batch).name for micro_batch in range(50)} == {"clm", "mlm"}


@examples(120)
@given(phases(), st.data())
def test_learning_rates_follow_the_segments(configured: list[PhaseConfig], data: st.DataObject) -> None:
    plan = PhasePlan(configured, 1024)
    edges = [0, *(phase.start_step for phase in plan.phases[1:] if phase.rewarms), plan.total_steps]
    shortest = min(after - before for before, after in zip(edges, edges[1:], strict=False))
    warmup = data.draw(st.integers(0, shortest))
    schedule = data.draw(st.sampled_from(["wsd", "cosine", "constant"]))
    decay = data.draw(st.integers(0, shortest - warmup)) if schedule == "wsd" else 0
    peak = data.draw(st.floats(1e-9, 1e3))
    lowest = data.draw(st.floats(0, peak))
    config = OptimizerConfig(
        learning_rate=peak, min_learning_rate=lowest, schedule=schedule, warmup_steps=warmup, decay_steps=decay
    )
    for step in steps_to_look_at(plan):
        start, end = plan.schedule_segment(step)
        assert start <= step < end and (start, end) in zip(edges, edges[1:], strict=False)
        rate, almost = learning_rate(config, plan, step), 1e-12 * peak
        assert 0 <= rate <= peak + almost
        if step >= start + warmup:
            assert rate >= lowest - almost
        if step + 1 < end:
            following = learning_rate(config, plan, step + 1)
            rising = step + 1 < start + warmup
            assert following >= rate - almost if rising else following <= rate + almost or step + 1 == start + warmup
        if step == start and warmup:
            assert math.isclose(rate, peak / warmup)
        if schedule == "constant" and step >= start + warmup:
            assert rate == peak


@st.composite
def samples(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    tokens = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=sum(lengths), max_size=sum(lengths)))
    return np.array(tokens, dtype=np.int64), np.array(lengths, dtype=np.int64)


@examples(300)
@given(samples(), maskings(), st.sampled_from(["mlm", "mntp"]), st.integers(0, 2**63 - 1))
def test_masks_hide_ordinary_tokens_only(
    sample: tuple[np.ndarray, np.ndarray], masking: MaskingConfig, name: str, seed: int
) -> None:
    tokens, lengths = sample
    kept = tokens.copy()
    made = [
        make_example(tokens, lengths, OBJECTIVES[name], masking, masking.ratio, VOCABULARY, random_generator(seed, 0, 5))
        for _ in range(2)
    ]
    for field in ("input_ids", "target_positions", "target_ids"):
        np.testing.assert_array_equal(getattr(made[0], field), getattr(made[1], field), "the same generator masks alike")
    np.testing.assert_array_equal(tokens, kept, "the sample is left alone")
    example = made[0]
    hidden = example.target_positions + (name == "mntp")
    firsts = {int(sum(lengths[:k])) for k in range(len(lengths))}
    assert len(example.input_ids) == len(tokens) and (np.diff(hidden) > 0).all()
    assert set(hidden.tolist()) <= set(range(len(tokens))) and (example.target_positions >= 0).all()
    np.testing.assert_array_equal(example.target_ids, tokens[hidden])
    assert not SPECIAL[example.target_ids].any()
    if name == "mntp":
        assert not firsts & set(hidden.tolist()), "a document's first token has nobody before it"
    others = np.setdiff1d(np.arange(len(tokens)), hidden)
    np.testing.assert_array_equal(example.input_ids[others], tokens[others])
    for position in hidden.tolist():
        shown = int(example.input_ids[position])
        allowed = {MASK_ID: masking.mask_share > 0, int(tokens[position]): masking.mask_share < 1}
        assert allowed.get(shown, False) or (masking.random_share > 0 and not SPECIAL[shown])
    maskable = [k for k, token in enumerate(tokens) if not SPECIAL[token] and not (name == "mntp" and k in firsts)]
    if masking.count == "exact":
        budget = round(masking.ratio * len(maskable))
        assert len(hidden) == budget if masking.unit == "token" else len(hidden) <= budget


@examples(80)
@given(samples())
def test_causal_targets_stay_in_their_document(sample: tuple[np.ndarray, np.ndarray]) -> None:
    tokens, lengths = sample
    example = make_example(tokens, lengths, OBJECTIVES["clm"], MaskingConfig(), 0.5, VOCABULARY, random_generator(0, 0, 0))
    document = np.repeat(np.arange(len(lengths)), lengths)
    expected = [(k, int(tokens[k + 1])) for k in range(len(tokens) - 1) if document[k] == document[k + 1]]
    assert list(zip(example.target_positions.tolist(), example.target_ids.tolist(), strict=True)) == expected
    np.testing.assert_array_equal(example.input_ids, tokens)
    assume(len(lengths) > 1)
    assert len(expected) == len(tokens) - len(lengths)
