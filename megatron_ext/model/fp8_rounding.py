"""Rounding a matrix to FP8 in torch, with the scales that Transformer Engine's recipes take: one for a block of the matrix.

A scale multiplies a value before it is rounded. The recipes differ in the block that shares one (all of the matrix, 128 values or
128 x 128, 32 values) and in how it follows from the block's largest value:

- per tensor: largest float / largest value, as it is;
- blockwise: the same, rounded down to a power of two;
- mxfp8: the inverse is a power of two (e8m0), rounded up, so that nothing saturates. OCP Microscaling Formats 1.0 has the formats,
  and would round down; Transformer Engine rounds up.

Formats: Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EXPONENT_BITS = 0x7F800000
MANTISSA_BITS = 0x007FFFFF
MANTISSA_WIDTH = 23

ScaleRule = Callable[[Tensor, float], Tensor]
"""(largest absolute values of the blocks, the format's largest number) -> scales; float32."""


class Rounded(NamedTuple):
    """A matrix in FP8."""

    codes: Tensor
    """[row blocks, rows of a block, column blocks, columns of a block], float8."""
    inverse_scales: Tensor
    """[row blocks, 1, column blocks, 1], float32."""

    def values(self) -> Tensor:
        """What the codes stand for: [rows, columns], float32."""
        row_blocks, rows, column_blocks, columns = self.codes.shape
        return (self.codes.float() * self.inverse_scales).view(row_blocks * rows, column_blocks * columns)


def largest_number(dtype: torch.dtype) -> float:
    """448 for e4m3, 57,344 for e5m2."""
    return torch.finfo(dtype).max


def tensor_scale(amax: Tensor, largest: float) -> Tensor:
    """Scales that bring the largest values to the format's largest number; 1 where there is nothing to bring, or no bringing it."""
    # Not `largest / amax`, which torch computes as a product with the reciprocal: one rounding more.
    scale = (torch.full_like(amax, largest) / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where((amax == 0) | amax.isinf(), 1.0, scale)


def block_scale(amax: Tensor, largest: float) -> Tensor:
    """The same, rounded down to powers of two."""
    bits = tensor_scale(amax, largest).view(torch.int32) & EXPONENT_BITS
    return torch.where(amax.isnan(), amax, bits.view(torch.float32))


def microscale(amax: Tensor, largest: float) -> Tensor:
    """Powers of two whose inverses are `amax / largest`, rounded up."""
    bits = (amax * (1 / largest)).view(torch.int32)
    exponent = (bits >> MANTISSA_WIDTH) + ((bits & MANTISSA_BITS) > 0)
    # Both the scale and its inverse must be normal floats; beyond lie only values that no weight or gradient has.
    scale = (254 - exponent.clamp(1, 253)) << MANTISSA_WIDTH
    return torch.where(amax.isnan(), amax, scale.view(torch.float32))


def round_blocks(matrix: Tensor, block: tuple[int, int] | None, dtype: torch.dtype, rule: ScaleRule) -> Rounded:
    """Round a matrix, each block with the scale that its own largest value gives.

    Args:
        matrix: [rows, columns].
        block: rows and columns of a block, which must divide the matrix; None takes the whole matrix.
        dtype: an FP8 format.
        rule: scales from largest values.
    """
    blocks = _in_blocks(matrix, block)
    return _round(blocks, rule(blocks.abs().amax(dim=(1, 3), keepdim=True).float(), largest_number(dtype)), dtype)


def round_with_scale(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Rounded:
    """Round a matrix with a scale that is known (a scalar); what it lifts above the format's largest number saturates."""
    return _round(_in_blocks(matrix, None), scale.float().view(1, 1, 1, 1), dtype)


def _in_blocks(matrix: Tensor, block: tuple[int, int] | None) -> Tensor:
    rows, columns = block or matrix.shape
    return matrix.reshape(matrix.shape[0] // rows, rows, matrix.shape[1] // columns, columns)


def _round(blocks: Tensor, scale: Tensor, dtype: torch.dtype) -> Rounded:
    largest = largest_number(dtype)
    # Clamped first: torch rounds what is too large to NaN or infinity, the kernels to the largest number.
    return Rounded((blocks.float() * scale).clamp(-largest, largest).to(dtype), 1 / scale)
