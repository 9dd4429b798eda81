"""Core attention on Transformer Engine's packed (THD) kernels."""

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention

from megatron_ext.model.attention import AttentionLayout, mask_type


class TEDocumentAttention(TEDotProductAttention):
    """Takes the same `AttentionLayout` as `DocumentAttention` and hands TE what it wants for packed input."""

    def __init__(self, *, pg_collection: ProcessGroupCollection, attention_type: str, **kwargs: Any):
        """Args as of `TEDotProductAttention`.

        A run that context parallelism cuts has fewer queries than keys, which TE's unfused kernel asks of cross-attention alone.
        """
        is_cut = pg_collection.cp.size() > 1
        super().__init__(pg_collection=pg_collection, attention_type="cross" if is_cut else attention_type, **kwargs)
        self.context_group = pg_collection.cp  # `cp_group` is TE's, and stays empty: keys and values are gathered here

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
        """Attend inside each run of tokens: [t, 1, n, d], [t, 1, g, d], [t, 1, g, d] -> [t, 1, n d].

        megatron's own forward is passed by: it knows no `padding_causal_bottom_right`.
        """
        layout = packed_seq_params
        key, value = (layout.gather(tensor, self.context_group) for tensor in (key, value))
        output = DotProductAttention.forward(
            self,
            *(tensor.squeeze(1) for tensor in (query, key, value)),
            qkv_format="thd",
            cu_seqlens_q=layout.cu_seqlens_q,
            cu_seqlens_kv=layout.cu_seqlens_kv,
            max_seqlen_q=layout.max_seqlen_q,
            max_seqlen_kv=layout.max_seqlen_kv,
            attn_mask_type=mask_type(layout, "transformer_engine"),
        )
        return output.reshape(query.shape[0], 1, -1)
