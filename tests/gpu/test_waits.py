"""On a GPU: an optimizer step is given to the device without ever waiting for it; torch refuses whatever would."""

from contextlib import ExitStack

import pytest
import torch

from benchmarks.contenders import Shape, encoder_of, own_micro_batch
from benchmarks.own_run import own_groups, own_step
from megatron_ext.config import OptimizerConfig, PrecisionConfig
from megatron_ext.runtime.launch import run_on_ranks

SHAPE = Shape("tiny", None, 8192, 8, 256)


def steps_without_waiting(recipe: str) -> list[float]:
    """Losses per predicted token of steps under torch's ban on waits, after two in which kernels are compiled and state is made."""
    with ExitStack() as stack:
        layout, backend = stack.enter_context(own_groups(encoder_of(SHAPE), SHAPE.batch_size))
        precision = PrecisionConfig(recipe=recipe)
        step = own_step(encoder_of(SHAPE), SHAPE.vocab_size, torch.bfloat16, layout, backend, OptimizerConfig(), precision)
        batches = [own_micro_batch(SHAPE, "mlm", seed) for seed in range(3)]
        seen = [step(batches), step(batches)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            seen += [step(batches) for _ in range(4)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [sums.reduce().mean_losses()["mlm"] for sums in seen]


@pytest.mark.parametrize("recipe", ["bf16", "fp8-delayed", "fp8-tensorwise"])
def test_the_host_never_waits_in_a_step(transformer_engine: None, recipe: str) -> None:
    if recipe != "bf16" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip(f"{recipe} needs compute capability (9, 0)")
    (losses,) = run_on_ranks(steps_without_waiting, 1, recipe, on_gpus=True)
    assert losses[-1] < losses[0]
