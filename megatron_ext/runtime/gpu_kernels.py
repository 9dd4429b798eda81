"""The loss of a chunk of logits in two kernels: torch's operations one after the other move eight times the bytes.

Written in Triton, which comes with torch where there is a GPU. The logits stay in their own dtype; sums are in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 8192
"""Logits of a row that a program has in its registers at a time."""
WARPS = 16


def row_sums(logits: Tensor, local_ids: Tensor) -> tuple[Tensor, Tensor]:
    """One pass over the logits.

    Args:
        logits: [n, v] contiguous.
        local_ids: [n] column of each row's target; outside [0, v) if it is not here.

    Returns:
        [n] float32 the largest logit, and [2, n] float32 sums of exp(logit - largest), and the target's logit - largest or 0.
    """
    count, width = logits.shape
    largest = torch.empty(count, dtype=torch.float32, device=logits.device)
    sums = torch.empty(2, count, dtype=torch.float32, device=logits.device)
    _row_sums[(count,)](logits, local_ids, largest, sums, count, width, COLUMNS, num_warps=WARPS)
    return largest, sums


def turn_into_gradient(logits: Tensor, local_ids: Tensor, largest: Tensor, total: Tensor) -> None:
    """logits <- softmax - one_hot, in place and in one pass.

    Args:
        logits: [n, v] contiguous.
        local_ids: [n] column of each row's target; outside [0, v) if it is not here.
        largest: [n] float32 the largest logit of the whole row.
        total: [n] float32 sum of exp(logit - largest) over the whole row.
    """
    count, width = logits.shape
    grid = (count, triton.cdiv(width, COLUMNS))
    _gradient[grid](logits, local_ids, largest, total, width, COLUMNS, num_warps=WARPS)


@triton.jit
def _row_sums(logits, local_ids, largest, sums, count, width: tl.constexpr, columns: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * width
    highest = float("-inf")
    total = 0.0
    for first in range(0, width, columns):
        place = first + tl.arange(0, columns)
        values = tl.load(start + place, mask=place < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(values, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher), axis=0)
        highest = higher
    target = tl.load(local_ids + row)
    is_here = (target >= 0) & (target < width)
    logit = tl.load(start + target, mask=is_here, other=0.0).to(tl.float32)
    tl.store(largest + row, highest)
    tl.store(sums + row, total)
    tl.store(sums + count + row, tl.where(is_here, logit - highest, 0.0))


@triton.jit
def _gradient(logits, local_ids, largest, total, width: tl.constexpr, columns: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * width
    place = tl.program_id(1) * columns + tl.arange(0, columns)
    values = tl.load(start + place, mask=place < width, other=float("-inf")).to(tl.float32)
    share = tl.exp(values - tl.load(largest + row)) / tl.load(total + row)
    share -= tl.where(place == tl.load(local_ids + row), 1.0, 0.0)
    tl.store(start + place, share.to(logits.dtype.element_ty), mask=place < width)
