"""This stack's own speed on one H100: what was wanted, what the model predicts, and what `benchmarks.gpu` measured there."""

import math
from dataclasses import dataclass

from megatron_ext.config import Recipe
from megatron_ext.model.presets import LOGITS_PER_CHUNK, PRESETS
from megatron_ext.plan.execution import Execution
from megatron_ext.plan.hardware import GPUS
from megatron_ext.plan.kernels import Constants
from megatron_ext.plan.speed import Prediction, predict
from megatron_ext.plan.workload import Shape, Workload

VOCABULARY, SEQUENCE, MASK_RATIO = 128_256, 2048, 0.4


@dataclass(frozen=True)
class OwnRun:
    """One GPU, rows of 2,048 tokens, one micro-batch a step."""

    preset: str
    micro_batch_size: int
    objective: str
    recipe: Recipe
    measured: float = math.nan
    """Tokens/s; not a number of a run that is yet to be measured."""
    measured_gib: float = math.nan
    """Peak of torch's allocator."""
    target: float | None = None
    """Tokens/s, set by counting alone before anything was built."""

    @property
    def work(self) -> Workload:
        """Model and objective; MLM at 0.4."""
        causal = self.objective == "clm"
        share = 1 - 1 / SEQUENCE if causal else MASK_RATIO
        return Workload(shape=Shape.of(PRESETS[self.preset](), VOCABULARY), sequence=SEQUENCE, causal=causal, predicted_share=share)

    @property
    def run(self) -> Execution:
        """One micro-batch on one GPU; what `Execution.of` makes of it, which needs torch."""
        return Execution(
            micro_batch=self.micro_batch_size,
            global_batch=self.micro_batch_size,
            recipe=self.recipe,
            bf16_layers=2,
            sequence_parallel=False,
            distributed_optimizer=False,
            fused_loss=True,
            logits_per_chunk=LOGITS_PER_CHUNK["gpu"],
        )

    def predict(self, constants: Constants) -> Prediction:
        """Of an H100."""
        return predict(GPUS["h100"], self.work, self.run, constants)


OWN_RUNS = (
    OwnRun("210m", 8, "mlm", "bf16", 265_192, 12.4),
    OwnRun("210m", 8, "clm", "bf16", 215_030, 12.4),
    OwnRun("210m", 32, "mlm", "bf16", 338_754, 29.5, 303e3),
    OwnRun("210m", 32, "mlm", "fp8-delayed", 348_734, 27.3),
    OwnRun("210m", 32, "mlm", "fp8-tensorwise", 344_682, 26.9),
    OwnRun("210m", 32, "mlm", "fp8-blockwise", 330_246, 26.9),
    OwnRun("610m", 16, "mlm", "bf16", 97_054, 46.4),
    OwnRun("610m", 24, "mlm", "bf16", 108_191, 62.3, 103e3),
    OwnRun("610m", 24, "mlm", "fp8-tensorwise", 114_379, 56.0),
    OwnRun("1b", 8, "mlm", "bf16", 50_852, 48.9),
    OwnRun("1b", 8, "mlm", "fp8-tensorwise", 54_931, 47.2),
    OwnRun("1b", 16, "mlm", "bf16", 53_958, 72.1, 52.6e3),
    OwnRun("1b", 16, "mlm", "fp8-tensorwise", 58_935, 66.9),
    OwnRun("2b", 4, "mlm", "bf16", 31_473, 59.0, 33.2e3),
    OwnRun("2b", 4, "mlm", "fp8-tensorwise", 33_517, 59.8),
)
"""H100 80GB HBM3, torch 2.11.0+cu130, Transformer Engine 2.20.2, megatron-core 0.16.1: docs/results/gpu.md. No constant was fitted
to them: the model is as it was before the first of them was measured."""
