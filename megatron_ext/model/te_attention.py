"""Core attention on Transformer Engine's packed (THD) kernels. Untested on a GPU: see docs/architecture.md."""

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ext.model.attention import AttentionLayout, mask_type


class TEDocumentAttention(TEDotProductAttention):
    """Takes the same `AttentionLayout` as `DocumentAttention` and hands TE what it wants for packed input."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: AttentionLayout,
        **kwargs: Any,
    ) -> Tensor:
        """Attend inside each run of tokens: [t, 1, n, d], [t, 1, g, d], [t, 1, g, d] -> [t, 1, n d]."""
        layout = packed_seq_params
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=layout.cu_seqlens_q,
            cu_seqlens_kv=layout.cu_seqlens_kv,
            max_seqlen_q=layout.max_seqlen_q,
            max_seqlen_kv=layout.max_seqlen_kv,
        )
        rows = (tensor.squeeze(1) for tensor in (query, key, value))
        output = super().forward(*rows, None, attn_mask_type=mask_type(layout, "transformer_engine"), packed_seq_params=packed)
        return output.reshape(query.shape[0], 1, -1)
