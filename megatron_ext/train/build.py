"""Builds this rank's model chunks and wraps them for data parallelism."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module

from megatron_ext.config import PrecisionConfig, Recompute
from megatron_ext.model.encoder import EncoderModel
from megatron_ext.model.initialization import initialize_parameters
from megatron_ext.model.layers import transformer_config
from megatron_ext.model.presets import EncoderConfig, padded_vocab_size
from megatron_ext.runtime.backend import Backend
from megatron_ext.runtime.precision import data_parallel_settings
from megatron_ext.runtime.topology import Layout
from megatron_ext.train.gradients import finalize_gradients


def build_model(
    encoder: EncoderConfig,
    vocab_size: int,
    layout: Layout,
    backend: Backend,
    dtype: torch.dtype,
    seed: int,
    precision: PrecisionConfig | None = None,
    recompute: Recompute = "none",
) -> list[EncoderModel]:
    """This rank's model chunks on its device, with their initial weights; one chunk unless the pipeline is interleaved.

    Args:
        encoder: the model's shape.
        vocab_size: ids that belong to tokens.
        layout: parallel sizes; the process groups must exist.
        backend: device and layers.
        dtype: of the weights.
        seed: of the weights.
        precision: the FP8 recipe; None for none.
        recompute: what the backward pass computes again.
    """
    model_parallel_cuda_manual_seed(seed)
    config = transformer_config(encoder, layout, backend.layers, dtype, precision, recompute)
    config.finalize_model_grads_func = finalize_gradients
    chunks = []
    for number in range(layout.virtual_pipeline):
        vp_stage = number if layout.virtual_pipeline > 1 else None
        chunk = EncoderModel(
            config,
            encoder,
            backend.layers,
            vocab_size,
            padded_vocab_size(vocab_size, layout.tensor),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        initialize_parameters(chunk, encoder, vocab_size, seed)
        chunks.append(chunk.to(backend.device))
    return chunks


def wrap_model(chunks: list[EncoderModel], layout: Layout) -> list[torch.nn.Module]:
    """Wrap chunks for bf16 and data parallelism; gradients are accumulated and reduced in float32."""
    wrapped = []
    for number, chunk in enumerate(chunks):
        module = Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_grad_reduce=layout.overlap_gradient_reduce,
            overlap_param_gather=layout.overlap_parameter_gather,
            **data_parallel_settings(chunk.config.precision),
        )
        wrapped.append(DistributedDataParallel(chunk.config, ddp, module, disable_bucketing=number > 0))
        if not torch.cuda.is_available():
            _add_gradients_in_place(chunk)
    if layout.overlap_gradient_reduce:
        # Only the last micro-batch's gradients are on their way while the backward pass goes on.
        no_sync = [chunk.no_sync for chunk in wrapped]
        chunks[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def _add_gradients_in_place(chunk: EncoderModel) -> None:
    """From now on the layers' weights have a gradient buffer: products add to it, and no gradient of its own is made."""
    for module in chunk.modules():
        if type(module) in (ColumnParallelLinear, RowParallelLinear):  # those of emulated FP8 have products of their own
            module.gradient_accumulation_fusion = True


@contextmanager
def whole_weights(wrapped: list[torch.nn.Module]) -> Iterator[None]:
    """Context in which all updated weights are there. With `overlap_parameter_gather` a module's come when it is next used."""
    waiting = [chunk for chunk in wrapped if chunk.ddp_config.overlap_param_gather]
    for chunk in waiting:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in waiting:
            chunk.enable_forward_pre_hook()
