"""AdamW against torch's own, the learning rate against its definition, and the reset of the optimizer's state."""

import math
from typing import Any

import pytest
import torch

from megatron_ext.config import OptimizerConfig, PhaseConfig
from megatron_ext.model.presets import EncoderConfig
from megatron_ext.objective import PhasePlan
from megatron_ext.runtime.adamw import FusedAdamW
from megatron_ext.runtime.launch import run_on_ranks

ENCODER = EncoderConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=8)
VOCAB_SIZE = 50
CONFIG = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, epsilon=1e-8, clip_grad_norm=0.0)
RESET_CASES = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "float32, distributed": (torch.float32, True),
    "bfloat16, distributed": (torch.bfloat16, True),
}


def test_fused_adamw_equals_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (11,), (3, 4, 2), (1,), (64, 33)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))

    def groups(parameters: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        other = {"lr": 3e-2, "weight_decay": 0.0, "betas": (0.8, 0.9), "eps": 1e-5}
        return [{"params": parameters[:3]}, {"params": parameters[3:], **other}]

    defaults = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = [FusedAdamW(groups(ours), **defaults), torch.optim.AdamW(groups(theirs), **defaults, foreach=False, fused=False)]
    for step in range(20):
        gradients = [torch.randn(shape, generator=generator) * 10 ** (step % 3 - 1) for shape in shapes]
        for optimizer, parameters in zip(optimizers, (ours, theirs), strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            for group in optimizer.param_groups:
                group["lr"] = (1e-2 if group is optimizer.param_groups[0] else 3e-2) * (1 + math.cos(step / 5))
            optimizer.step()
    for first, second, initial in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
        assert (first - initial).abs().max() > 0.05


def test_fused_adamw_leaves_parameters_without_gradient() -> None:
    moved, resting = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([moved, resting], lr=0.1, weight_decay=0.5)
    moved.grad = torch.ones(3)
    optimizer.step()
    assert resting.tolist() == [1.0] * 3
    assert moved.tolist() != [1.0] * 3
    assert optimizer.param_groups[0]["step"] == 1
    assert optimizer.state[moved].keys() == {"exp_avg", "exp_avg_sq"}, "no step per parameter"


def rates(steps: list[int], rewarms: list[int] | None = None, **options: Any) -> list[float]:
    """The learning rate of every step of a plan whose phases have these lengths."""
    from megatron_ext.train.optimizer import learning_rate

    phases = [
        PhaseConfig(objective="clm", steps=length, learning_rate="rewarm" if number in (rewarms or []) else "continue")
        for number, length in enumerate(steps)
    ]
    plan = PhasePlan(phases, tokens_per_step=1)
    return [learning_rate(OptimizerConfig(**options), plan, step) for step in range(plan.total_steps)]


def test_wsd_is_linear_up_flat_and_linear_down() -> None:
    found = rates([60, 40], learning_rate=1.0, min_learning_rate=0.2, warmup_steps=10, decay_steps=20)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10:80] == [1.0] * 70
    assert found[80] == 1.0
    assert [a - b for a, b in zip(found[80:], found[81:], strict=False)] == pytest.approx([0.8 / 20] * 19)
    assert found[-1] == pytest.approx(0.2 + 0.8 / 20), "the step after the last would be at the minimum"


def test_cosine_follows_a_half_wave() -> None:
    found = rates([110], schedule="cosine", learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == pytest.approx(1.0)
    assert found[60] == pytest.approx(0.55)
    assert found[35] - 0.55 == pytest.approx(0.55 - found[85])
    assert all(later < earlier for earlier, later in zip(found[10:], found[11:], strict=False))
    assert found[-1] == pytest.approx(0.1, abs=1e-3)


def test_constant_stays_at_the_peak() -> None:
    found = rates([30], schedule="constant", learning_rate=0.3, warmup_steps=3)
    assert found == pytest.approx([0.1, 0.2] + [0.3] * 28)


@pytest.mark.parametrize("schedule, decay", [("wsd", 7), ("wsd", 0), ("cosine", 0), ("constant", 0)])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_rewarming_restarts_the_schedule(schedule: str, decay: int, warmup: int) -> None:
    options = {"schedule": schedule, "warmup_steps": warmup, "decay_steps": decay, "learning_rate": 1.0, "min_learning_rate": 0.05}
    whole = rates([10, 8, 12, 9, 6], rewarms=[2, 4], **options)
    parts = [rates([length], **options) for length in (18, 21)]
    if warmup + decay <= 6:
        parts.append(rates([6], **options))
        assert whole == sum(parts, [])
    else:
        assert whole[:39] == sum(parts, [])
    assert max(whole) <= 1.0
    assert min(whole) > 0.0
    if decay:
        assert whole[17] == whole[38] == pytest.approx(0.05 + 0.95 / decay)


@pytest.mark.parametrize("schedule, decay", [("wsd", 4), ("wsd", 12), ("cosine", 0), ("constant", 0)])
def test_short_schedules_never_exceed_the_peak(schedule: str, decay: int) -> None:
    for warmup in range(12 - decay + 1):
        found = rates([12], schedule=schedule, warmup_steps=warmup, decay_steps=decay, learning_rate=0.5, min_learning_rate=0.1)
        assert all(0 < rate <= 0.5 * (1 + 1e-12) for rate in found)
        assert max(found) == pytest.approx(0.5)


def _optimizer_values(optimizer: Any) -> dict[str, list[Any]]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [state for part in parts for state in part.optimizer.state.values()]
    return {
        "largest": [float(state[name].abs().max()) for state in states for name in ("exp_avg", "exp_avg_sq")],
        "steps": [group["step"] for part in parts for group in part.optimizer.param_groups if group["params"]],
    }


def measure_reset(dtype: torch.dtype, distributed: bool) -> dict[str, Any]:
    """One update after a reset, and the same update by an optimizer that is new at this point."""
    from megatron.core import parallel_state

    from megatron_ext.config import ParallelConfig, TrainingConfig
    from megatron_ext.runtime.backend import choose_backend
    from megatron_ext.runtime.topology import check_layout, initialize
    from megatron_ext.train.build import build_model, wrap_model
    from megatron_ext.train.optimizer import build_optimizer, reset_optimizer_state, set_learning_rate

    parallel = ParallelConfig(distributed_optimizer=distributed)
    layout, backend = check_layout(parallel, TrainingConfig(), ENCODER.num_layers, {}, 1), choose_backend("local")
    if not parallel_state.model_parallel_is_initialized():
        initialize(layout, backend)

    def new() -> tuple[Any, Any]:
        chunks = wrap_model(build_model(ENCODER, VOCAB_SIZE, layout, backend, dtype, seed=1), layout)
        return chunks[0], build_optimizer(CONFIG, chunks, dtype, distributed)

    def update(model: Any, optimizer: Any, number: int) -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        set_learning_rate(optimizer, CONFIG, 1e-2)
        optimizer.step()

    model, optimizer = new()
    initial = [parameter.detach().float().clone() for parameter in model.parameters()]
    for number in range(3):
        update(model, optimizer, number)
    trained = _optimizer_values(optimizer)
    reset_optimizer_state(optimizer)
    reset = _optimizer_values(optimizer)
    before = [parameter.detach().float().clone() for parameter in model.parameters()]
    update(model, optimizer, 9)
    after = [parameter.detach().float().clone() for parameter in model.parameters()]
    return {
        "trained": trained,
        "reset": reset,
        "moved": max(float((a - b).abs().max()) for a, b in zip(before, initial, strict=True)),
        "before": before,
        "after": after,
        "step": _optimizer_values(optimizer)["steps"],
    }


def measure_resets() -> dict[str, Any]:
    return {name: measure_reset(*case) for name, case in RESET_CASES.items()}


@pytest.fixture(scope="module")
def resets() -> dict[str, Any]:
    return run_on_ranks(measure_resets, 1)[0]


@pytest.mark.parametrize("name", RESET_CASES)
def test_reset_forgets_moments_and_step(resets: dict[str, Any], name: str) -> None:
    measured = resets[name]
    assert measured["moved"] > 0.01, "weights and master weights stay where training brought them"
    assert min(measured["trained"]["largest"]) > 0
    assert {int(step) for step in measured["trained"]["steps"]} == {3}
    assert max(measured["reset"]["largest"]) == 0
    assert {int(step) for step in measured["reset"]["steps"]} == {0}
    assert {int(step) for step in measured["step"]} == {1}


@pytest.mark.parametrize("name", RESET_CASES)
def test_first_update_after_a_reset_is_a_first_update(resets: dict[str, Any], name: str) -> None:
    """AdamW's first update is lr x (sign of the gradient + decay x weight), whatever the gradient's size."""
    tolerance = 1e-5 if name.startswith("float32") else 2e-2
    generator = torch.Generator().manual_seed(9)
    for before, after in zip(resets[name]["before"], resets[name]["after"], strict=True):
        gradient = torch.randn(before.shape, generator=generator)
        decay = 0.1 if before.dim() > 1 else 0.0
        expected = before - 1e-2 * (gradient.sign() + decay * before)
        torch.testing.assert_close(after, expected, rtol=tolerance, atol=tolerance * 0.2)
