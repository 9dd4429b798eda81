"""Cross-entropy of a chunk of logits, which are turned into their gradient in place, over tensor-parallel ranks."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from megatron_ext.runtime.capabilities import has_triton


def cross_entropy_(logits: Tensor, local_ids: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Sum of the losses, and softmax - one_hot in the dtype of the logits, whose memory it may take.

    Two all-reduces over the tensor-parallel ranks: the row maxima, then the sums of exponentials and the targets' logits.

    Args:
        logits: [n, valid rows] of this rank's part of the vocabulary.
        local_ids: [n] targets, counted from this rank's first id; outside [0, valid rows) if another rank has them.
        group: the tensor-parallel ranks.
    """
    if logits.is_cuda and logits.numel() and has_triton():
        return _in_two_kernels(logits, local_ids, group)
    return _in_torch(logits, local_ids, group)


def _in_two_kernels(logits: Tensor, local_ids: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    from megatron_ext.runtime.gpu_kernels import row_sums, turn_into_gradient

    largest, sums = row_sums(logits, local_ids)
    if group.size() > 1:
        own = largest.clone()
        all_reduce(largest, op=ReduceOp.MAX, group=group)
        width = logits.shape[1]
        sums[0] *= (own - largest).exp()
        sums[1] += (own - largest) * ((local_ids >= 0) & (local_ids < width))
        all_reduce(sums, group=group)
    turn_into_gradient(logits, local_ids, largest, sums[0])
    return (sums[0].log() - sums[1]).sum(), logits


def _in_torch(logits: Tensor, local_ids: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    values = logits.float()
    count, width = values.shape
    largest = values.amax(dim=1) if width else torch.full((count,), float("-inf"), device=values.device)
    if group.size() > 1:
        all_reduce(largest, op=ReduceOp.MAX, group=group)
    values -= largest[:, None]
    is_local = (local_ids >= 0) & (local_ids < width)
    rows = torch.arange(count, device=values.device)
    column = local_ids.clamp(0, max(0, width - 1))
    target_logit = values[rows, column] * is_local if width else torch.zeros_like(largest)
    values.exp_()
    sums = torch.stack([values.sum(dim=1), target_logit])
    if group.size() > 1:
        all_reduce(sums, group=group)
    loss = (sums[0].log() - sums[1]).sum()
    values /= sums[0][:, None]
    if width:
        values[rows, column] -= is_local.to(values.dtype)
    return loss, values if values is logits else logits.copy_(values)
