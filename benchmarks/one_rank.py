"""A rank of its own for a benchmark: groups of one, and this project's step as a run of one rank makes it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from megatron_ext.config import OptimizerConfig
    from megatron_ext.data.batch import MicroBatch
    from megatron_ext.model.presets import EncoderConfig
    from megatron_ext.runtime.backend import Backend
    from megatron_ext.runtime.topology import Layout
    from megatron_ext.train.step import Sums


@contextmanager
def one_rank(encoder: "EncoderConfig", micro_batch_size: int, micro_batches: int = 1) -> Iterator[tuple["Layout", "Backend"]]:
    """Context in which megatron-core runs on this process's CPU alone."""
    from megatron_ext.config import ParallelConfig, TrainingConfig
    from megatron_ext.runtime.backend import choose_backend
    from megatron_ext.runtime.cpu import patch_megatron
    from megatron_ext.runtime.topology import check_layout, process_groups

    patch_megatron()
    training = TrainingConfig(micro_batch_size=micro_batch_size, global_batch_size=micro_batch_size * micro_batches)
    layout, backend = check_layout(ParallelConfig(), training, encoder.num_layers, {}, 1), choose_backend("local")
    with process_groups(layout, backend):
        yield layout, backend


def own_step(
    encoder: "EncoderConfig", vocab_size: int, dtype: "torch.dtype", layout: "Layout", backend: "Backend", config: "OptimizerConfig"
) -> Callable[[list["MicroBatch"]], "Sums"]:
    """Build the model and its optimizer; returns what makes a step on micro-batches of one size."""
    from megatron_ext.train.build import build_model, wrap_model
    from megatron_ext.train.optimizer import build_optimizer, gradient_norm, update
    from megatron_ext.train.step import run_schedule

    chunks = wrap_model(build_model(encoder, vocab_size, layout, backend, dtype, 0), layout)
    optimizer: Any = build_optimizer(config, chunks, dtype, False)

    def step(batches: list["MicroBatch"]) -> "Sums":
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        sums = run_schedule(chunks, batches, batches[0].input_ids.numel(), backend.device, False)
        update(optimizer, gradient_norm(optimizer))
        return sums

    return step
