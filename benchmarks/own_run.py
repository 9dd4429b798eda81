"""This project's step for a benchmark: process groups, and a model and its optimizer as the trainer builds them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from megatron_ext.config import OptimizerConfig, ParallelConfig, PrecisionConfig
    from megatron_ext.data.batch import MicroBatch
    from megatron_ext.model.presets import EncoderConfig
    from megatron_ext.runtime.backend import Backend
    from megatron_ext.runtime.topology import Layout
    from megatron_ext.train.step import Sums


@contextmanager
def own_groups(
    encoder: "EncoderConfig", micro_batch_size: int, micro_batches: int = 1, parallel: "ParallelConfig | None" = None
) -> Iterator[tuple["Layout", "Backend"]]:
    """Context in which megatron-core runs in this process, on its GPU if it has one: alone, or as one of torchrun's ranks.

    Args:
        encoder: the model's shape.
        micro_batch_size: samples in a micro-batch.
        micro_batches: that a data-parallel rank runs in a step.
        parallel: sizes; what is left of the ranks is data-parallel. None is no other parallelism.
    """
    from megatron_ext.config import ParallelConfig, TrainingConfig
    from megatron_ext.runtime.backend import choose_backend
    from megatron_ext.runtime.cpu import patch_megatron
    from megatron_ext.runtime.topology import check_layout, process_groups, world_size_from_environment

    patch_megatron()
    parallel, ranks = parallel or ParallelConfig(), world_size_from_environment()
    data = ranks // (parallel.tensor * parallel.pipeline * parallel.context)
    samples = micro_batch_size * micro_batches * data
    training = TrainingConfig(micro_batch_size=micro_batch_size, global_batch_size=samples)
    layout, backend = check_layout(parallel, training, encoder.num_layers, {}, ranks), choose_backend("auto")
    with process_groups(layout, backend):
        yield layout, backend


def own_step(
    encoder: "EncoderConfig",
    vocab_size: int,
    dtype: "torch.dtype",
    layout: "Layout",
    backend: "Backend",
    config: "OptimizerConfig",
    precision: "PrecisionConfig | None" = None,
) -> Callable[[Sequence["MicroBatch"]], "Sums"]:
    """Build the model and its optimizer; returns what makes a step on micro-batches of one size."""
    from megatron_ext.train.build import build_model, wrap_model
    from megatron_ext.train.optimizer import build_optimizer, update
    from megatron_ext.train.step import run_schedule

    chunks = wrap_model(build_model(encoder, vocab_size, layout, backend, dtype, 0, precision), layout)
    optimizer: Any = build_optimizer(config, chunks, dtype, layout.distributed_optimizer, precision)

    def step(batches: Sequence["MicroBatch"]) -> "Sums":
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        sums = run_schedule(chunks, batches, batches[0].input_ids.numel(), backend.device, False)
        update(optimizer, sums)
        return sums

    return step
