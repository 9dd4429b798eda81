"""Transformer Engine's buffers for tensor-parallel communication beside matrix products. Untested: it needs two GPUs."""

from megatron_ext.config import PrecisionConfig
from megatron_ext.errors import UserError
from megatron_ext.runtime.topology import Layout


def start_userbuffers(layout: Layout, tokens: int, hidden_size: int, precision: PrecisionConfig) -> None:
    """Make the buffers that `parallel.overlap_tensor_communication` needs, before the model is built; nothing without it.

    Args:
        layout: parallel sizes; the process groups must exist.
        tokens: of a micro-batch.
        hidden_size: of the model.
        precision: FP8 layers and bfloat16 layers have buffers of their own.

    Raises:
        UserError: Transformer Engine is too old.
    """
    if not layout.overlap_tensor_communication:
        return
    try:
        from transformer_engine.pytorch.module.base import UserBufferQuantizationMode, initialize_ub
    except ImportError:
        raise UserError(
            "parallel.overlap_tensor_communication is true: it needs Transformer Engine 2.7 or newer, the one here is older"
        ) from None
    modes = [UserBufferQuantizationMode.FP8] if precision.is_fp8 else []
    if not precision.is_fp8 or precision.bf16_first_layers or precision.bf16_last_layers:
        modes.append(UserBufferQuantizationMode.NONE)
    shape = [tokens // layout.context, hidden_size]
    initialize_ub(shape, layout.tensor, quantization_modes=modes, bootstrap_backend="nccl")
