"""Transformer layers as megatron specs, from torch modules or from Transformer Engine's, and megatron's configuration of them.

Both specs store the same checkpoint: the local spec's norms are saved under the names of TE's fused norm-and-linear modules.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from megatron_ext.config import PrecisionConfig, Recompute
from megatron_ext.model.attention import DocumentAttention
from megatron_ext.model.fp8_emulation import EmulatedColumnParallelLinear, EmulatedRowParallelLinear
from megatron_ext.model.presets import EncoderConfig
from megatron_ext.runtime.capabilities import can_fuse_weight_gradients
from megatron_ext.runtime.cpu_kernels import rms_norm, rotate, swiglu
from megatron_ext.runtime.precision import FP8_RECIPES, has_kernels, stays_in_bf16, transformer_settings
from megatron_ext.runtime.topology import Layout

LayerKind = Literal["local", "transformer_engine"]

FUSED_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""The local layer's norms, and where TE's fused norm-and-linear modules have them."""


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467) that works under sequence parallelism.

    megatron's own torch wrapper refuses it; all it takes is to mark the weight, whose gradient is then summed over the
    tensor-parallel ranks that each see a part of the tokens.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        if hidden.is_cuda:
            return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        return rms_norm(hidden, self.weight, self.eps)


class SwiGLU(MegatronModule):
    """The gate of megatron's MLP as one operation, in the place that megatron has for a module of Transformer Engine."""

    def forward(self, both: Tensor) -> Tensor:
        """[..., 2 f] with the gate first -> [..., f]."""
        return swiglu(both)


RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    "none": {},
    "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""`training.recompute` in megatron's words."""


@dataclass
class EncoderTransformerConfig(TransformerConfig):
    """megatron's configuration, and the precision section, which decides the modules of each layer."""

    precision: PrecisionConfig = field(default_factory=PrecisionConfig)


def transformer_config(
    encoder: EncoderConfig,
    layout: Layout,
    layers: LayerKind,
    dtype: torch.dtype,
    precision: PrecisionConfig | None = None,
    recompute: Recompute = "none",
) -> EncoderTransformerConfig:
    """megatron's configuration for this shape and layout.

    Args:
        encoder: the model's shape.
        layout: parallel sizes.
        layers: which modules run.
        dtype: of weights and activations.
        precision: the FP8 recipe; None for none.
        recompute: what the backward pass computes again.
    """
    precision = precision or PrecisionConfig()
    with_te = layers == "transformer_engine"
    interleaved = layout.virtual_pipeline > 1
    return EncoderTransformerConfig(
        precision=precision,
        **transformer_settings(precision),
        num_layers=encoder.num_layers,
        hidden_size=encoder.hidden_size,
        ffn_hidden_size=encoder.ffn_hidden_size,
        num_attention_heads=encoder.num_attention_heads,
        num_query_groups=encoder.num_query_groups,
        kv_channels=encoder.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=encoder.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=encoder.qkv_bias,
        qk_layernorm=encoder.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        rotary_interleaved=False,
        # Weights are set by name after the model is built, see initialization.py.
        perform_initialization=False,
        init_method_std=encoder.init_std,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        sequence_parallel=layout.sequence_parallel,
        # `context_parallel_size` stays 1: it would make TE split the row in its own way. megatron's schedules ask the groups.
        tp_comm_overlap=layout.overlap_tensor_communication,
        calculate_per_token_loss=True,
        # Freeing what was sent is only safe once it has left: gloo's separate calls still read it afterwards.
        deallocate_pipeline_outputs=not interleaved,
        # Batched point-to-point calls mix up the two messages between the same pair of ranks when two stages are interleaved:
        # the loss stays right and the gradients are silently wrong. Separate calls are right for any number of stages.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # These fusions are CUDA kernels, or are compiled.
        gradient_accumulation_fusion=can_fuse_weight_gradients(layers),
        bias_dropout_fusion=with_te,
        bias_activation_fusion=with_te,
        use_te_activation_func=not with_te,  # that is: an activation that is a module, here `SwiGLU`
        masked_softmax_fusion=False,
        apply_rope_fusion=with_te or rope_utils.fused_apply_rotary_pos_emb is rotate,
        **RECOMPUTE[recompute],
    )


def block_spec(config: EncoderTransformerConfig, layers: LayerKind, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers and final norm that this pipeline stage holds."""
    first, count = get_transformer_layer_offset(config, vp_stage), get_num_layers_to_build(config, vp_stage=vp_stage)
    layer = _te_layer if layers == "transformer_engine" else _local_layer
    specs = [layer(config, stays_in_bf16(config.precision, number, config.num_layers)) for number in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=_te_norm() if layers == "transformer_engine" else RMSNorm)


def _local_layer(config: EncoderTransformerConfig, in_bf16: bool) -> ModuleSpec:
    emulates, qk_norm = config.precision.emulation and not in_bf16, config.qk_layernorm
    column: type[Any] = EmulatedColumnParallelLinear if emulates else ColumnParallelLinear
    row: type[Any] = EmulatedRowParallelLinear if emulates else RowParallelLinear
    attention = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=DocumentAttention,
        linear_proj=row,
        q_layernorm=RMSNorm if qk_norm else IdentityOp,
        k_layernorm=RMSNorm if qk_norm else IdentityOp,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=_self_attention(attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_mlp(column, row, SwiGLU),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(FUSED_NAMES),
        ),
    )


def _te_layer(config: EncoderTransformerConfig, in_bf16: bool) -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

    from megatron_ext.model.te_attention import TEDocumentAttention
    from megatron_ext.model.te_bf16_layer import BFloat16Layer

    precision = config.precision
    # The other recipes are switched layer by layer, which megatron does itself.
    is_delayed = has_kernels(precision) and FP8_RECIPES[precision.recipe].megatron == "delayed"
    attention = SelfAttentionSubmodules(
        linear_qkv=TELayerNormColumnParallelLinear,
        core_attention=TEDocumentAttention if config.bf16 else DocumentAttention,  # TE's attention kernels take no float32
        linear_proj=TERowParallelLinear,
        q_layernorm=_te_norm() if config.qk_layernorm else IdentityOp,
        k_layernorm=_te_norm() if config.qk_layernorm else IdentityOp,
    )
    return ModuleSpec(
        module=BFloat16Layer if is_delayed and in_bf16 else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=_self_attention(attention),
            self_attn_bda=get_bias_dropout_add,
            mlp=_mlp(TELayerNormColumnParallelLinear, TERowParallelLinear),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _te_norm() -> type:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _self_attention(submodules: SelfAttentionSubmodules) -> ModuleSpec:
    # The mask type is fixed at construction and not read: the batch's AttentionLayout decides.
    return ModuleSpec(module=SelfAttention, params={"attn_mask_type": AttnMaskType.no_mask}, submodules=submodules)


def _mlp(linear_fc1: type, linear_fc2: type, activation: type | None = None) -> ModuleSpec:
    return ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2, activation_func=activation)
    )
