"""Language-model head on the predicted positions only, vocabulary-parallel, in chunks.

The loss of a masked objective needs logits at 40 % of the positions or fewer, so the hidden states are gathered first and the
vocabulary matmul runs on these rows. The rows are processed in chunks; each chunk's logits are turned into loss and gradients
at once and dropped, so peak memory does not grow with tokens x vocabulary. Same loss, same gradients as the dense head.
"""

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.model.cross_entropy import cross_entropy_
from megatron_ext.model.presets import LOGITS_PER_CHUNK


class LanguageModelHead(ColumnParallelLinear):
    """Vocabulary-parallel output layer. Rows that pad the vocabulary get no logit, so the loss does not depend on padding."""

    def __init__(self, *args: Any, vocab_size: int, config: TransformerConfig, **kwargs: Any):
        """Args as of `ColumnParallelLinear`, which gets the padded size.

        Args:
            vocab_size: ids that belong to tokens; rows from here on are padding.
            config: megatron's configuration.
        """
        config = copy.copy(config)
        config.gradient_accumulation_fusion = False  # the chunks below sum up by themselves; megatron would ask for Apex here
        super().__init__(*args, config=config, **kwargs)
        self.first_id = self.tp_group.rank() * self.output_size_per_partition
        self.valid_rows = max(0, min(vocab_size - self.first_id, self.output_size_per_partition))

    def forward(self, hidden: Tensor, positions: Tensor, target_ids: Tensor, weight: Tensor | None = None) -> Tensor:
        """Sum of the cross-entropy losses.

        Args:
            hidden: [t, 1, h], or this rank's part [t / tp, 1, h] under sequence parallelism.
            positions: [n] rows of the full sequence that predict something; n may be 0.
            target_ids: [n] what they predict.
            weight: the tied embedding [v / tp, h], if it is not the head's own.

        Returns:
            float32 scalar, equal on all tensor-parallel ranks.
        """
        is_tied = weight is not None
        weight = self.weight if weight is None else weight
        rows = self._gather(hidden).index_select(0, positions)
        return _ChunkedCrossEntropy.apply(rows, weight, target_ids, self.first_id, self.valid_rows, self.tp_group, is_tied)

    def logits(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """Logits at every position, padded rows included: [t, 1, h] -> [t, padded vocabulary]. For checks, not for training."""
        weight = self.weight if weight is None else weight
        return gather_from_tensor_model_parallel_region(self._gather(hidden) @ weight.t(), group=self.tp_group)

    def _gather(self, hidden: Tensor) -> Tensor:
        """[t, h] with gradients summed over the tensor-parallel ranks, each of which sees a part of the vocabulary."""
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return hidden.view(-1, hidden.shape[-1])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; the gradients of a chunk are formed in the forward pass, while its logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        target_ids: Tensor,
        first_id: int,
        valid_rows: int,
        group: ProcessGroup,
        is_tied: bool,
    ) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        valid = weight[:valid_rows]
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        grad_rows = torch.empty_like(rows) if needs_grad else None
        grad_weight = _start_of_gradient(weight, valid_rows, rows.shape[0] == 0) if needs_grad else None
        # Of the padded part, which is equally wide on all ranks: they must reduce the same chunks.
        step = max(1, LOGITS_PER_CHUNK["gpu" if rows.is_cuda else "cpu"] // weight.shape[0])
        for start in range(0, rows.shape[0], step):
            chunk = rows[start : start + step]
            local_ids = target_ids[start : start + step] - first_id
            part, grad_logits = cross_entropy_(chunk @ valid.t(), local_ids, group)
            loss += part
            if needs_grad:
                torch.mm(grad_logits, valid, out=grad_rows[start : start + step])
                _add_product(grad_weight[:valid_rows], grad_logits.t(), chunk, is_first=start == 0)
        ctx.save_for_backward(grad_rows, grad_weight)
        ctx.weight, ctx.is_tied = weight, is_tied
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_weight = ctx.saved_tensors
        grad_rows *= grad_loss.to(grad_rows.dtype)
        if ctx.is_tied or not hasattr(ctx.weight, "main_grad"):
            return grad_rows, (grad_weight * grad_loss).to(ctx.weight.dtype), None, None, None, None, None
        return grad_rows, _hand_over(grad_weight, grad_loss, ctx.weight), None, None, None, None, None


def _start_of_gradient(weight: Tensor, valid_rows: int, is_all: bool) -> Tensor:
    """Float32 memory for a weight's gradient. Rows that the first chunk's product fills are not cleared."""
    grad_weight = torch.empty_like(weight, dtype=torch.float32)
    grad_weight[0 if is_all else valid_rows :].zero_()
    return grad_weight


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """Add left @ right to a float32 sum, in place and without a temporary where the dtypes allow it."""
    if left.dtype is not total.dtype and left.is_cuda:
        torch.addmm(total, left, right, beta=0 if is_first else 1, out_dtype=total.dtype, out=total)
    elif left.dtype is not total.dtype:
        product = left @ right
        total.copy_(product) if is_first else total.add_(product)
    elif is_first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


def _hand_over(grad_weight: Tensor, grad_loss: Tensor, weight: Tensor) -> Tensor:
    """Add the gradient to the weight's buffer here; returns a tensor without meaning, as megatron's layers do in its stead.

    A tied weight gets a second gradient, of the embedding, which is added up with what the head returns: that one must be real.
    """
    weight.main_grad.addcmul_(grad_weight, grad_loss.to(grad_weight.dtype))
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)
