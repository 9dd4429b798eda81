"""FP8 training emulated in torch: megatron's linear layers, the operands of whose three products are rounded to FP8.

    output = input x weight^T        gradient of the input = gradient x weight        gradient of the weight = gradient^T x input

Each operand is rounded as a recipe says, the codes are multiplied in float32, and the result is rounded once to the layer's type.
That is what FP8 kernels compute, up to the order and width of their sums; it says nothing of their speed. Communication is as in
megatron's layers: the gathered input, and the gathered gradient under sequence parallelism, are rounded whole.

Delayed scaling takes the scales of a step from the steps before. Each layer notes the largest values that it sees; `end_step` takes
the largest over the ranks into the history, once a step, so a layer that is computed again for its gradients notes the same values
and changes nothing. (Transformer Engine does it once a forward pass: the same with one micro-batch a step.)
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_ext.checkpoint_files import FP8_HISTORY
from megatron_ext.model.fp8_rounding import (
    Rounded,
    ScaleRule,
    block_scale,
    largest_number,
    microscale,
    round_blocks,
    round_with_scale,
    tensor_scale,
)
from megatron_ext.runtime.precision import FP8_RECIPES

INPUT, WEIGHT, GRADIENT = range(3)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {"hybrid": (E4M3, E4M3, E5M2), "e4m3": (E4M3, E4M3, E4M3)}


class Blocks(NamedTuple):
    """Values that share a scale in one operand."""

    along_columns: tuple[int, int] | None
    """Rows and columns of a block where the product sums over the columns; None is the whole matrix."""
    along_rows: tuple[int, int] | None
    """The same where it sums over the rows."""


WHOLE = Blocks(None, None)
BLOCKS = {
    "delayed": (WHOLE, WHOLE, WHOLE),
    "tensorwise": (WHOLE, WHOLE, WHOLE),
    "blockwise": (Blocks((1, 128), (128, 1)), Blocks((128, 128), (128, 128)), Blocks((1, 128), (128, 1))),
    "mxfp8": (Blocks((1, 32), (32, 1)),) * 3,
}
"""By megatron's name of a recipe: of input, weight and gradient."""
RULES: dict[str, ScaleRule] = {"tensorwise": tensor_scale, "blockwise": block_scale, "mxfp8": microscale}


class _EmulatedProducts(torch.nn.Module):
    """What the two kinds of layers share. `ColumnParallelLinear` and `RowParallelLinear` compute through `_forward_impl`."""

    def __init__(self, *args: Any, **kwargs: Any):
        """Args as of megatron's layer; its configuration is an `EncoderTransformerConfig`."""
        super().__init__(*args, **kwargs)
        precision, dtype = self.config.precision, self.config.params_dtype
        recipe = FP8_RECIPES[precision.recipe]
        self.fp8_recipe = recipe.megatron
        self.fp8_formats = FORMATS[recipe.format]
        if self.is_delayed:
            # The largest values of past steps, newest first; in the type of the rounded matrices, which holds them exactly,
            # whatever the model is cast to.
            self.register_buffer(FP8_HISTORY, torch.zeros(precision.amax_history_length, 3, dtype=dtype))
            self.register_buffer("amax", torch.zeros(3, dtype=dtype), persistent=False)

    @property
    def is_delayed(self) -> bool:
        """Scales come from past steps."""
        return self.fp8_recipe == "delayed"

    def round_operand(self, matrix: Tensor, operand: int) -> tuple[Rounded, Rounded]:
        """A matrix as it enters products that sum over its columns, and over its rows.

        Args:
            matrix: [rows, columns].
            operand: INPUT, WEIGHT or GRADIENT.
        """
        dtype = self.fp8_formats[operand]
        if self.is_delayed:
            if self.training:
                self.amax[operand] = torch.maximum(self.amax[operand], matrix.abs().amax())
            rounded = round_with_scale(matrix, self.scale(operand), dtype)
            return rounded, rounded
        blocks, rule = BLOCKS[self.fp8_recipe][operand], RULES[self.fp8_recipe]
        along_columns = round_blocks(matrix, blocks.along_columns, dtype, rule)
        if blocks.along_rows == blocks.along_columns:
            return along_columns, along_columns
        return along_columns, round_blocks(matrix, blocks.along_rows, dtype, rule)

    def scale(self, operand: int) -> Tensor:
        """The delayed scale: from the largest value of past steps, 1 before there are any."""
        past = getattr(self, FP8_HISTORY)[:, operand].amax().float()
        return tensor_scale(past, largest_number(self.fp8_formats[operand]))

    def note_step(self, amax: Tensor) -> None:
        """Put a step's largest values [3] at the head of the history."""
        history = getattr(self, FP8_HISTORY)
        history.copy_(torch.cat([amax[None].to(history.dtype), history[:-1]]))

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: ProcessGroup | None,
        **unused: Any,
    ) -> Tensor:
        """Called by megatron's layer in place of its own product: [t, 1, k] -> [t, 1, n]."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = _Product.apply(input, weight, self)
        return output if bias is None else output + bias


class EmulatedColumnParallelLinear(_EmulatedProducts, ColumnParallelLinear):
    """megatron's layer with emulated FP8 products."""


class EmulatedRowParallelLinear(_EmulatedProducts, RowParallelLinear):
    """megatron's layer with emulated FP8 products."""


class _Product(torch.autograd.Function):
    """input x weight^T and its two gradients, of rounded operands. Kept for the backward pass are codes, a byte a value."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, layer: _EmulatedProducts) -> Tensor:
        matrix = input.reshape(-1, input.shape[-1])
        rounded_input, input_along_rows = layer.round_operand(matrix, INPUT)
        rounded_weight, weight_along_rows = layer.round_operand(weight, WEIGHT)
        ctx.save_for_backward(*input_along_rows, *weight_along_rows)
        ctx.layer = layer
        output = rounded_input.values() @ rounded_weight.values().t()
        return output.to(input.dtype).view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        saved = ctx.saved_tensors
        input, weight = Rounded(*saved[:2]).values(), Rounded(*saved[2:]).values()
        along_columns, along_rows = ctx.layer.round_operand(gradient.reshape(-1, gradient.shape[-1]), GRADIENT)
        grad_input = (along_columns.values() @ weight).to(gradient.dtype).view(*gradient.shape[:-1], -1)
        grad_weight = (along_rows.values().t() @ input).to(gradient.dtype)
        return grad_input, grad_weight, None


def end_step(chunks: Iterable[torch.nn.Module], is_bad: torch.Tensor) -> None:
    """Delayed scaling: take this step's largest values over the tensor- and data-parallel ranks into the histories.

    Called by all ranks together after each step; without layers of delayed scaling it does nothing.

    Args:
        chunks: this rank's model chunks.
        is_bad: scalar, 1 if the optimizer left the step out: what a step that is not finite has seen is forgotten.
    """
    layers = list(_delayed_layers(chunks))
    if not layers:
        return
    if not is_bad:
        largest = torch.stack([layer.amax for layer in layers]).float()
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True, tp_only_amax_red=False)
        torch.distributed.all_reduce(largest, op=ReduceOp.MAX, group=group)
        for layer, amax in zip(layers, largest, strict=True):
            layer.note_step(amax)
    for layer in layers:
        layer.amax.zero_()


def _delayed_layers(chunks: Iterable[torch.nn.Module]) -> Iterator[_EmulatedProducts]:
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, _EmulatedProducts) and module.is_delayed:
                yield module
