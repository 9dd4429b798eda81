"""Predicted time of a training step: counted work at modelled rates, pipeline bubbles, and the communication that shows.

Predictions, not measurements. docs/results/planner.md holds the model against published runs.
"""

from dataclasses import dataclass

from megatron_ext.plan.collectives import context_seconds, data_seconds, pipeline_seconds, tensor_seconds
from megatron_ext.plan.execution import Execution
from megatron_ext.plan.hardware import Gpu
from megatron_ext.plan.kernels import CALIBRATED, Constants
from megatron_ext.plan.layer_cost import LayerCost, Parts, head_seconds, layer_cost, optimizer_seconds, stage_parameters
from megatron_ext.plan.workload import Workload


@dataclass(frozen=True)
class Prediction:
    """One training step."""

    gpu: Gpu
    work: Workload
    run: Execution
    parts: Parts
    """Seconds by kind."""

    @property
    def seconds(self) -> float:
        """The step."""
        return self.parts.total

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.run.global_batch * self.work.sequence / self.seconds / self.run.gpus

    @property
    def flops_per_second(self) -> float:
        """Counted operations of one GPU; recomputation does not count."""
        return self.tokens_per_second * self.work.flops_per_token()

    @property
    def mfu(self) -> float:
        """Counted operations in units of the data sheet's rate of the recipe."""
        return self.flops_per_second / self.gpu.peak(self.run.is_fp8)


def predict(gpu: Gpu, work: Workload, run: Execution, constants: Constants = CALIBRATED) -> Prediction:
    """Predict one optimizer step.

    Args:
        gpu: the GPU.
        work: model and objective.
        run: layout, batch, numbers.
        constants: fitted constants.
    """
    stage = _stage(gpu, constants, work, run)
    head = head_seconds(gpu, constants, work, run)
    micro_batches = run.micro_batches
    parts = Parts()
    for name in ("products", "attention", "memory", "recomputed", "waiting_for_host", "tensor", "context", "pipeline"):
        setattr(parts, name, micro_batches * getattr(stage, name))
    # The last stage sets the pace, and the others wait for its head: it is busy for 1 / p of that time on the mean GPU. Filling
    # and draining the pipeline costs (p - 1) / v micro-batches more.
    parts.head = micro_batches * head / run.pipeline
    parts.bubble = micro_batches * head - parts.head + (run.pipeline - 1) / run.virtual * (stage.total + head / run.pipeline)
    parts.optimizer = optimizer_seconds(gpu, work, run)
    forward = stage.total / (4 if run.recompute == "full" else 3)
    parts.data = data_seconds(gpu, constants, run, stage_parameters(work, run), forward, stage.total + head - forward)
    return Prediction(gpu, work, run, parts)


def _stage(gpu: Gpu, constants: Constants, work: Workload, run: Execution) -> Parts:
    """Seconds of one micro-batch in one pipeline stage, without the head."""
    layers = work.shape.layers / run.pipeline
    high = min(run.bf16_layers, work.shape.layers) / work.shape.layers if run.is_fp8 else 1.0
    parts = Parts()
    for share, in_fp8 in ((high, False), (1.0 - high, True)):
        if share:
            _add(parts, layer_cost(gpu, constants, work, run, in_fp8=in_fp8), layers * share, run.recompute)
    parts.tensor = layers * tensor_seconds(gpu, constants, work, run)
    parts.context = layers * context_seconds(gpu, work, run)
    parts.pipeline = pipeline_seconds(gpu, constants, work, run)
    return parts


def _add(parts: Parts, cost: LayerCost, layers: float, recompute: str) -> None:
    parts.products += layers * (cost.forward_products + cost.backward_products)
    parts.attention += layers * (cost.forward_attention + cost.backward_attention)
    parts.memory += layers * (cost.forward_memory + cost.backward_memory)
    again = {"none": 0.0, "attention": cost.forward_attention, "full": cost.forward}[recompute]
    parts.recomputed += layers * again
    device = cost.forward + cost.backward + again
    parts.waiting_for_host += layers * max(0.0, cost.host * (1.3 if recompute == "full" else 1.0) - device)
