"""Is the arithmetic of a layout that of one rank? A small model is run at both, and loss and gradients are compared.

The layout's ranks are real processes: gloo on CPUs, NCCL where there is a GPU for each. The reference is one rank with the
local layers in float32.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_ext.config import OptimizerConfig, ParallelConfig, PrecisionConfig, TrainingConfig
from megatron_ext.doctor.report import Report
from megatron_ext.errors import UserError
from megatron_ext.runtime.launch import run_on_ranks

if TYPE_CHECKING:
    from torch import Tensor

Precision = Literal["fp32", "bf16"]

OBJECTIVES = ("clm", "mlm", "mntp", "mixed")
"""`mixed` has micro-batches of all three in one step, so that a pipeline holds several at a time."""
MICRO_BATCHES = 8
SEED = 3
# Large steps and a clipped gradient, so that a wrong norm or update shows in the steps after it.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, epsilon=1e-3, clip_grad_norm=0.5)


@dataclass(frozen=True)
class Tolerance:
    """How far a layout may be from one float32 rank."""

    loss: float
    """Relative."""
    gradient: float
    """Of the largest element of the parameter's gradient."""
    gradient_norm: float
    """Relative."""


# fp32: only the order of sums differs. bf16: one rank is as far from float32 as any layout is, by its eight bits alone; that
# distance, doubled. docs/doctor.md has the measurements of both.
TOLERANCES = {
    "fp32": Tolerance(loss=1e-5, gradient=2e-5, gradient_norm=1e-5),
    "bf16": Tolerance(loss=1e-3, gradient=1e-1, gradient_norm=1e-2),
}


@dataclass(frozen=True)
class Trial:
    """One model run at one layout; everything that follows from it is the same in every process."""

    parallel: ParallelConfig
    shape: ParallelConfig
    """The sizes that the model must fit, so that the reference has the same model."""
    precision: Precision
    packed: bool
    objectives: tuple[str, ...]
    steps: int
    micro_batches: int

    @property
    def training(self) -> TrainingConfig:
        """Batch sizes."""
        from megatron_ext.doctor.small_model import SAMPLES

        return TrainingConfig(micro_batch_size=SAMPLES, global_batch_size=SAMPLES * self.micro_batches)


def parse_layout(text: str) -> tuple[ParallelConfig, int]:
    """Read `tensor=2,pipeline=2,data=2,sequence=false`.

    Returns:
        The sizes, and the data-parallel size.

    Raises:
        UserError: an unknown name, or a value that is not of its kind.
    """
    fields = {"data": int, **{name: type(value) for name, value in asdict(ParallelConfig()).items()}}
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in fields:
            raise UserError(f"--layout {text}: there is no '{name}'; allowed are {', '.join(sorted(fields))}, each NAME=VALUE")
        found[name] = _parse(text, name, value.strip().lower(), fields[name])
    data = found.pop("data", 1)
    try:
        parallel = ParallelConfig(**found)
    except UserError as error:
        raise UserError(f"--layout {text}: {error}") from None
    if data < 1:
        raise UserError(f"--layout {text}: data is {data}: it must be greater than 0")
    return parallel, data


def _parse(text: str, name: str, value: str, kind: type) -> Any:
    if kind is bool and value in ("true", "false"):
        return value == "true"
    if kind is int and value.isdecimal():
        return int(value)
    raise UserError(f"--layout {text}: {name} is '{value}'; allowed are {'true and false' if kind is bool else 'whole numbers'}")


def check_equivalence(layout: str, precision: Precision, packed: bool, objectives: Sequence[str], steps: int) -> Report:
    """Run the small model at a layout and on one float32 rank, and compare.

    Args:
        layout: as `parse_layout` reads it.
        precision: of the layout's ranks.
        packed: documents do not see each other.
        objectives: of `OBJECTIVES`.
        steps: optimizer steps; loss, gradients and gradient norm are compared at each.

    Raises:
        UserError: sizes that do not fit together.
    """
    import torch

    from megatron_ext.doctor.small_model import VOCAB_SIZE, make_encoder
    from megatron_ext.runtime.backend import ON_CPU, check_overlap, choose_backend
    from megatron_ext.runtime.capabilities import check_apex

    check_apex()
    parallel, data = parse_layout(layout)
    world_size = parallel.tensor * parallel.pipeline * parallel.context * data
    unit = data * parallel.pipeline
    trial = Trial(parallel, parallel, precision, packed, tuple(objectives), steps, -(-MICRO_BATCHES // unit) * unit)
    name = str(_layout(trial, world_size))
    on_gpus = torch.cuda.device_count() >= world_size
    check_overlap(parallel, choose_backend("local" if precision == "fp32" else "auto") if on_gpus else ON_CPU)
    print(f"{name}: starting {world_size} + 1 processes on {'GPUs' if on_gpus else 'the CPU'}", file=sys.stderr)
    report = Report("equivalence")
    report.facts = {
        "layout": name,
        **asdict(parallel),
        "data": data,
        "world_size": world_size,
        "precision": precision,
        "packing": "packed" if packed else "unpacked",
        "device": "cuda" if on_gpus else "cpu",
        "communication": "nccl" if on_gpus else "gloo",
        "steps": steps,
        "model": {**asdict(make_encoder(parallel)), "vocab_size": VOCAB_SIZE},
        "micro_batches": trial.micro_batches,
        "tolerance": asdict(TOLERANCES[precision]),
        "results": [],
    }
    reference = Trial(ParallelConfig(), parallel, "fp32", packed, trial.objectives, steps, trial.micro_batches)
    try:
        expected = run_on_ranks(measure, 1, reference, on_gpus=on_gpus)[0]
        found = run_on_ranks(measure, world_size, trial, on_gpus=on_gpus)[0]
    except RuntimeError as error:
        report.facts["traceback"] = str(error)
        report.problems.append(f"the ranks failed: {str(error).strip().splitlines()[-1]}")
        return report
    for objective in trial.objectives:
        for step in range(steps):
            row = compare(found[objective][step], expected[objective][step], TOLERANCES[precision])
            report.facts["results"].append({"objective": objective, "step": step + 1, **row})
            report.problems += [f"{objective}, step {step + 1}: {line}" for line in row["failures"]]
    return report


def compare(found: dict[str, Any], expected: dict[str, Any], tolerance: Tolerance) -> dict[str, Any]:
    """Differences of one step, relative as `Tolerance` says, and what lies beyond it.

    Args:
        found: loss, predicted tokens, gradient norm and gradients at the layout.
        expected: the same of one rank.
        tolerance: what is allowed.
    """
    loss = _relative(found["loss"], expected["loss"])
    norm = _relative(found["gradient_norm"], expected["gradient_norm"])
    names = expected["gradients"].keys()
    lacking = sorted(names - found["gradients"].keys())
    differences = {name: _gradient_difference(found["gradients"][name], expected["gradients"][name]) for name in names - {*lacking}}
    # NaN compares as false with everything: it is the worst there is.
    worst = max(differences, key=lambda name: (differences[name] != differences[name], differences[name]))
    failures = [f"parameter {name} has no gradient at the layout" for name in lacking]
    if found["predicted"] != expected["predicted"]:
        failures.append(f"{found['predicted']} tokens are predicted, {expected['predicted']} on one rank")
    for what, difference, limit in (
        ("the loss", loss, tolerance.loss),
        ("the gradient norm", norm, tolerance.gradient_norm),
        (f"the gradient of {worst}", differences[worst], tolerance.gradient),
    ):
        if not difference <= limit:
            failures.append(f"{what} differs by {difference:.2g}, allowed is {limit:.2g}")
    return {
        "loss": found["loss"],
        "loss_one_rank": expected["loss"],
        "loss_difference": loss,
        "gradient_norm": found["gradient_norm"],
        "gradient_norm_one_rank": expected["gradient_norm"],
        "gradient_norm_difference": norm,
        "worst_parameter": worst,
        "worst_gradient_difference": differences[worst],
        "gradient_differences": dict(sorted(differences.items())),
        "failures": failures,
        "ok": not failures,
    }


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


def _gradient_difference(found: "Tensor", expected: "Tensor") -> float:
    """Largest difference, as a share of the largest gradient; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def _layout(trial: Trial, world_size: int) -> Any:
    from megatron_ext.doctor.small_model import SAMPLES, make_encoder, sequence_length
    from megatron_ext.runtime.topology import check_layout

    encoder = make_encoder(trial.shape)
    shards = {
        "the model's heads,": encoder.num_attention_heads,
        "its key/value heads,": encoder.num_query_groups,
        "its FFN width": encoder.ffn_hidden_size,
    }
    tokens = SAMPLES * sequence_length(trial.shape)
    return check_layout(trial.parallel, trial.training, encoder.num_layers, shards, world_size, tokens=tokens)


def measure(trial: Trial) -> dict[str, list[dict[str, Any]]] | None:
    """Run a trial in this rank: objective -> for each step the loss, the predicted tokens, the gradient norm, the gradients.

    The first rank returns the numbers of all.
    """
    import torch

    from megatron_ext.doctor.small_model import SAMPLES, make_encoder, sequence_length
    from megatron_ext.runtime.backend import choose_backend
    from megatron_ext.runtime.topology import process_groups
    from megatron_ext.runtime.userbuffers import start_userbuffers

    layout = _layout(trial, torch.distributed.get_world_size())
    # Transformer Engine's attention kernels take no float32.
    backend = choose_backend("local" if trial.precision == "fp32" else "auto")
    with process_groups(layout, backend):
        tokens, hidden_size = SAMPLES * sequence_length(trial.shape), make_encoder(trial.shape).hidden_size
        start_userbuffers(layout, tokens, hidden_size, PrecisionConfig())
        results = {objective: _run(trial, objective, layout, backend) for objective in trial.objectives}
    return results if torch.distributed.get_rank() == 0 else None


def _run(trial: Trial, objective: str, layout: Any, backend: Any) -> list[dict[str, Any]]:
    """A fresh model trained for some steps under one objective."""
    import torch

    from megatron_ext.doctor.small_model import VOCAB_SIZE, make_encoder
    from megatron_ext.train.build import build_model, wrap_model
    from megatron_ext.train.optimizer import build_optimizer

    dtype = torch.bfloat16 if trial.precision == "bf16" else torch.float32
    bare = build_model(make_encoder(trial.shape), VOCAB_SIZE, layout, backend, dtype, SEED)
    wrapped = wrap_model(bare, layout)
    optimizer = build_optimizer(OPTIMIZER, wrapped, dtype, layout.distributed_optimizer)
    return [_step(trial, objective, step, bare, wrapped, optimizer, backend.device) for step in range(trial.steps)]


def _step(trial: Trial, objective: str, step: int, bare: Any, wrapped: Any, optimizer: Any, device: Any) -> dict[str, Any]:
    from megatron_ext.doctor.small_model import SAMPLES, make_batch, sequence_length
    from megatron_ext.doctor.whole_tensors import own_share, whole_gradients
    from megatron_ext.train.optimizer import update
    from megatron_ext.train.step import run_schedule

    length = sequence_length(trial.shape)
    first = step * trial.micro_batches
    batches = own_share([make_batch(first + k, objective, trial.packed, length) for k in range(trial.micro_batches)])
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    own_sums = run_schedule(wrapped, batches, SAMPLES * length, device, forward_only=False)
    sums = own_sums.reduce()
    gradients = whole_gradients(bare, wrapped, trial.parallel.distributed_optimizer)
    predicted = sum(sums.predicted.values())
    return {
        "loss": sum(sums.losses.values()) / predicted,
        "predicted": predicted,
        "gradients": gradients,
        "gradient_norm": float(update(optimizer, own_sums)[0]),
    }
