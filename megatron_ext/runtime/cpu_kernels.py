"""Norm, gate and rotation with backward passes of their own: a CPU's time for them is the number of passes over memory.

Same values and gradients as torch's operations one after the other, in a different order of roundings. A GPU has kernels that do
each in one pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis: [..., h], [h] -> [..., h]. Kept for the backward pass are x and a number a row."""
    return _RMSNormFunction.apply(hidden, weight, eps)


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, arXiv 2002.05202): [..., 2 f], the gate first, -> [..., f]. Kept is the input alone."""
    return _SwiGLUFunction.apply(both)


class _RMSNormFunction(torch.autograd.Function):
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


class _SwiGLUFunction(torch.autograd.Function):
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


def rotate(heads: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864), in the place that megatron has for a fused kernel.

    Args:
        heads: [t, 1, n, d] queries or keys.
        angles: [t, 1, 1, d] in float32; the second half repeats the first.
        interleaved: must be false: feature i turns with feature i + d / 2.
    """
    assert not interleaved, "pairs of neighbours are not implemented"
    half = angles[..., : angles.shape[-1] // 2]
    return _RotationFunction.apply(heads, half.cos().to(heads.dtype), half.sin().to(heads.dtype))


class _RotationFunction(torch.autograd.Function):
    """Backward, the gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(heads, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad, *ctx.saved_tensors, -1), None, None


def _turn(heads: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    turned = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    (first, second), (turned_first, turned_second) = heads.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin, value=direction)
    return turned
