"""Attention over a row of packed documents, causal or not, decided by the batch and not by the module.

A micro-batch of b samples of s tokens runs through the model as one row of t = b s tokens, `[t, 1, h]`. An `AttentionLayout`
travels with it and says where the runs of tokens that see each other begin, and whether they look ahead. Because the mask
belongs to the batch, nothing has to be switched on the layers at a phase edge: recomputation, pipelined micro-batches of
different objectives and prefetched batches are right by construction.

Under context parallelism a rank holds a part of the row. It gathers the keys and values of the whole row and lets its own tokens
look at what they may see of them, as in Llama 3 (arXiv 2407.21783, section 3.3.2).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.data.batch import Keys, MicroBatch


@dataclass
class AttentionLayout(PackedSeqParams):
    """Who sees whom in a row of t tokens.

    megatron hands its `PackedSeqParams` through to the core attention untouched, recomputation included. The format stays
    `sbhd` for megatron, so that rotary embeddings are looked up by position; the core attention does the packing itself.
    """

    causal: bool = False
    segment_lengths: tuple[int, ...] = ()
    """Lengths of the runs of tokens that see each other; they sum to t. Kept on the host: no device sync to read them."""
    key_lengths: tuple[int, ...] = ()
    """How many keys each run looks at: its own, unless the run is cut by context parallelism."""
    first_key: int = 0
    """Where they begin in the row of all context-parallel ranks."""

    @classmethod
    def of(cls, batch: MicroBatch) -> "AttentionLayout":
        """The layout of a micro-batch."""
        keys = batch.keys or Keys(0, batch.segment_lengths, batch.cumulative_lengths)
        return cls(
            qkv_format="sbhd",
            cu_seqlens_q=batch.cumulative_lengths,
            cu_seqlens_kv=keys.cumulative_lengths,
            max_seqlen_q=max(batch.segment_lengths),
            max_seqlen_kv=max(keys.lengths),
            causal=batch.causal,
            segment_lengths=batch.segment_lengths,
            key_lengths=keys.lengths,
            first_key=keys.first,
        )

    @property
    def is_cut(self) -> bool:
        """Some run looks at more keys than it has tokens here."""
        return self.segment_lengths != self.key_lengths

    def gather(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        """What this rank's tokens look at: [t, 1, g, d] keys or values of this rank -> [sum of key_lengths, 1, g, d].

        Backward, each rank gets the sum of the gradients that all ranks of the group have for its keys.
        """
        if group.size() == 1:
            return tensor
        whole = gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=True, group=group)
        return whole[self.first_key : self.first_key + sum(self.key_lengths)]


def mask_type(layout: AttentionLayout, layers: Literal["local", "transformer_engine"]) -> str:
    """The mask that the core attention of these layers applies to each run of tokens, by Transformer Engine's names.

    The local one gets every run by itself. TE gets them packed, and allows only the `padding` masks for that; they need not
    mean that there is padding. A run that is cut ends where its keys end: the causal diagonal is that of the bottom right corner.
    """
    if not layout.causal:
        return "padding" if layers == "transformer_engine" else "no_mask"
    mask = "causal_bottom_right" if layout.is_cut else "causal"
    return f"padding_{mask}" if layers == "transformer_engine" else mask


class DocumentAttention(MegatronModule):
    """Core attention on torch's scaled-dot-product kernels: one call per run of tokens, so the cost is sum(l^2)."""

    def __init__(self, config: TransformerConfig, *, pg_collection: ProcessGroupCollection, **kwargs: Any):
        """Keeps no state. megatron also passes layer number and mask type, which are not needed here."""
        super().__init__(config=config)
        self.cp_group = pg_collection.cp

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
        causal = mask_type(layout, "local") != "no_mask"
        key, value = (layout.gather(tensor, self.cp_group) for tensor in (key, value))
        tokens, _, heads, width = query.shape
        query, key, value = (tensor.squeeze(1) for tensor in (query, key, value))
        lengths = (layout.segment_lengths, layout.key_lengths, layout.key_lengths)
        if all(len(set(of_runs)) == 1 for of_runs in lengths):
            rows = (tensor.reshape(len(n), n[0], -1, width) for tensor, n in zip((query, key, value), lengths, strict=True))
            return _attend(*rows, causal).reshape(tokens, 1, heads * width)
        pieces = zip(*(tensor.split(n) for tensor, n in zip((query, key, value), lengths, strict=True)), strict=True)
        outputs = [_attend(*(piece[None] for piece in qkv), causal)[0] for qkv in pieces]
        return torch.cat(outputs).view(tokens, 1, heads * width)


def _attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """SDPA over [b, l, n, d], [b, k, g, d], [b, k, g, d] -> [b, l, n, d]; the last query is at the place of the last key."""
    repeats = query.shape[2] // key.shape[2]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    is_cut = causal and query.shape[2] < key.shape[2]
    mask = None
    if is_cut:
        from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler, which takes half a second

        mask = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal and not is_cut).transpose(1, 2)
