"""Norm and gate with backward passes of their own: they read and write memory, and so a CPU's time is the number of passes.

Same values and gradients as torch's operations one after the other, in a different order of roundings. A GPU has kernels that do
each in one pass; there these are not used.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight over the last axis. Kept for the backward pass are x and a number a row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = hidden.float()
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, inverse)
        return (x * inverse).mul_(weight.float()).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, inverse = ctx.saved_tensors
        width = hidden.shape[-1]
        x, grad32, weight32 = hidden.float().reshape(-1, width), grad.float().reshape(-1, width), weight.float()
        inverse = inverse.view(-1)
        product = x * grad32
        grad_weight = inverse @ product
        # d/dx of x_i / rms: the part of the gradient along x itself is taken out.
        along = (product @ weight32).mul_(inverse.pow(3)).div_(-width)
        grad_hidden = torch.mul(grad32, weight32, out=product).mul_(inverse[:, None]).addcmul_(x, along[:, None])
        return grad_hidden.view_as(hidden).to(hidden.dtype), grad_weight.to(weight.dtype), None


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up (Shazeer, arXiv 2002.05202) of [..., 2 f] with the gate first. Kept for the backward pass is the input."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        grad_both = torch.empty_like(both)
        grad_gate, grad_up = grad_both.chunk(2, dim=-1)
        scratch = F.silu(gate)
        torch.mul(grad, scratch, out=grad_up)
        torch.mul(grad, up, out=scratch)
        torch.ops.aten.silu_backward.grad_input(scratch, gate, grad_input=grad_gate)
        return grad_both
