"""Attention over a row of packed documents, causal or not, decided by the batch and not by the module.

A micro-batch of b samples of s tokens runs through the model as one row of t = b s tokens, `[t, 1, h]`. An `AttentionLayout`
travels with it and says where the runs of tokens that see each other begin, and whether they look ahead. Because the mask
belongs to the batch, nothing has to be switched on the layers at a phase edge: recomputation, pipelined micro-batches of
different objectives and prefetched batches are right by construction.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.data.batch import MicroBatch


@dataclass
class AttentionLayout(PackedSeqParams):
    """Who sees whom in a row of t tokens.

    megatron hands its `PackedSeqParams` through to the core attention untouched, recomputation included. The format stays
    `sbhd` for megatron, so that rotary embeddings are looked up by position; the core attention does the packing itself.
    """

    causal: bool = False
    segment_lengths: tuple[int, ...] = ()
    """Lengths of the runs of tokens that see each other; they sum to t. Kept on the host: no device sync to read them."""

    @classmethod
    def of(cls, batch: MicroBatch) -> "AttentionLayout":
        """The layout of a micro-batch."""
        longest = max(batch.segment_lengths)
        return cls(
            qkv_format="sbhd",
            cu_seqlens_q=batch.cumulative_lengths,
            cu_seqlens_kv=batch.cumulative_lengths,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            causal=batch.causal,
            segment_lengths=batch.segment_lengths,
        )


def mask_type(layout: AttentionLayout, layers: Literal["local", "transformer_engine"]) -> AttnMaskType:
    """The mask that the core attention of these layers applies to each run of tokens.

    The local one gets every run by itself. TE gets them packed, and allows only the `padding` masks for that; they need not
    mean that there is padding.
    """
    if layers == "transformer_engine":
        return AttnMaskType.padding_causal if layout.causal else AttnMaskType.padding
    return AttnMaskType.causal if layout.causal else AttnMaskType.no_mask


class DocumentAttention(MegatronModule):
    """Core attention on torch's scaled-dot-product kernels: one call per run of tokens, so the cost is sum(l^2)."""

    def __init__(self, config: TransformerConfig, **kwargs: Any):
        """Keeps no state. megatron passes layer number, mask type and groups, which are not needed here."""
        super().__init__(config=config)

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
        """Attend inside each run of tokens.

        Args:
            query: [t, 1, n, d], n query heads of this rank.
            key: [t, 1, g, d], g key/value heads of this rank.
            value: [t, 1, g, d].
            attention_mask: unused; the layout says it all.
            packed_seq_params: the batch's layout.

        Returns:
            [t, 1, n d].
        """
        layout = packed_seq_params
        lengths = layout.segment_lengths
        causal = mask_type(layout, "local") is AttnMaskType.causal
        tokens, _, heads, width = query.shape
        query, key, value = (tensor.view(tokens, -1, width) for tensor in (query, key, value))
        if len(set(lengths)) == 1:
            rows = (tensor.view(len(lengths), lengths[0], -1, width) for tensor in (query, key, value))
            return _attend(*rows, causal).reshape(tokens, 1, heads * width)
        pieces = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
        outputs = [_attend(*(piece[None] for piece in qkv), causal)[0] for qkv in pieces]
        return torch.cat(outputs).view(tokens, 1, heads * width)


def _attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """SDPA over [b, l, n, d], [b, l, g, d], [b, l, g, d] -> [b, l, n, d]."""
    repeats = query.shape[2] // key.shape[2]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)
