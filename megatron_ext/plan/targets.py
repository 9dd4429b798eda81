"""This stack's own targets on one H100, and what the model predicts for them: nothing of it has been measured."""

from dataclasses import dataclass, replace

from megatron_ext.model.presets import LOGITS_PER_CHUNK, PRESETS
from megatron_ext.plan.execution import Execution
from megatron_ext.plan.hardware import GPUS
from megatron_ext.plan.kernels import Constants
from megatron_ext.plan.speed import predict
from megatron_ext.plan.workload import Shape, Workload

VOCABULARY, SEQUENCE, RATIO = 128_256, 2048, 0.4
TARGETS = (("210m", 32, 303e3), ("610m", 16, 103e3), ("1b", 8, 52.6e3), ("2b", 4, 33.2e3))
"""Preset, micro-batch that fits, and tokens/s."""
LARGER_CHUNK = 2**28


@dataclass(frozen=True)
class Target:
    """Tokens/s and MFU: what is wanted, and what is predicted for the head as it is and as it could be."""

    preset: str
    target: float
    target_mfu: float
    as_built: tuple[float, float]
    larger_chunks: tuple[float, float]
    """With eight times the logits at a time: the gradient of the head's weight is summed up less often."""
    fused_loss: tuple[float, float]
    """And with one kernel from bfloat16 logits to their gradient."""


def predict_targets(constants: Constants) -> list[Target]:
    """Predict each of the targets."""
    gpu = GPUS["h100"]
    rows = []
    for preset, micro, wanted in TARGETS:
        work = Workload(shape=Shape.of(PRESETS[preset](), VOCABULARY), sequence=SEQUENCE, predicted_share=RATIO)
        as_built = Execution(micro_batch=micro, global_batch=512, distributed_optimizer=False, logits_per_chunk=LOGITS_PER_CHUNK)
        larger = replace(as_built, logits_per_chunk=LARGER_CHUNK)
        predictions = [predict(gpu, work, run, constants) for run in (as_built, larger, replace(larger, fused_loss=True))]
        figures = [(each.tokens_per_second, each.mfu) for each in predictions]
        rows.append(Target(preset, wanted, wanted * work.flops_per_token() / gpu.bf16_peak, *figures))
    return rows
