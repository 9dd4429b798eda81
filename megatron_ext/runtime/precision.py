"""What a precision recipe asks of megatron-core, of the device and of the model's shape.

The recipes are Transformer Engine's. A recipe is refused here, in one line, before anything is built: on a device without its
kernels, and where a matrix does not divide into what the kernels multiply. An emulated recipe (`model/fp8_emulation.py`) runs on
any device and keeps to the same shapes, so that what was tried with it can be run by the kernels as it is.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from megatron_ext.config import PrecisionConfig
from megatron_ext.errors import UserError
from megatron_ext.runtime.capabilities import FP8_CAPABILITY
from megatron_ext.runtime.topology import Layout

SMALL_WIDTH = 2560
"""Below this hidden size FP8 gains little; see `small_width_warning`."""


@dataclass(frozen=True)
class Fp8Recipe:
    """One of Transformer Engine's FP8 recipes."""

    megatron: Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
    """megatron-core's name of it."""
    format: Literal["hybrid", "e4m3"]
    """`hybrid`: gradients in e5m2, all else in e4m3; `e4m3`: everything."""
    multiple: int
    """Every side of a product must be a multiple of this."""
    capabilities: tuple[tuple[int, int], tuple[int, int] | None]
    """First compute capability that has the kernels, and the first that has them no more."""
    devices: str
    """The same for people."""


FP8_RECIPES = {
    "fp8-delayed": Fp8Recipe("delayed", "hybrid", 16, (FP8_CAPABILITY, None), "Hopper (9.0) or newer"),
    "fp8-tensorwise": Fp8Recipe("tensorwise", "hybrid", 16, (FP8_CAPABILITY, None), "Hopper (9.0) or newer"),
    "fp8-blockwise": Fp8Recipe("blockwise", "e4m3", 128, (FP8_CAPABILITY, None), "Hopper (9.0) or newer"),
    "mxfp8": Fp8Recipe("mxfp8", "e4m3", 32, ((10, 0), (12, 0)), "data-center Blackwell (10.x, 11.x)"),
}


class Shape(Protocol):
    """The sizes of an encoder that FP8 products see; `model.presets.EncoderConfig` has them."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int


def transformer_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of megatron's `TransformerConfig` for FP8 kernels; none without them, emulation included.

    Under delayed scaling megatron keeps no layer in bfloat16: `model.layers` does it there.
    """
    if not has_kernels(precision):
        return {}
    recipe = FP8_RECIPES[precision.recipe]
    settings: dict[str, Any] = {"fp8": recipe.format, "fp8_recipe": recipe.megatron, "fp8_param": precision.fp8_parameters}
    if recipe.megatron == "delayed":
        return {**settings, "fp8_amax_history_len": precision.amax_history_length, "fp8_amax_compute_algo": "max"}
    return {
        **settings,
        "first_last_layers_bf16": precision.bf16_first_layers + precision.bf16_last_layers > 0,
        "num_layers_at_start_in_bf16": precision.bf16_first_layers,
        "num_layers_at_end_in_bf16": precision.bf16_last_layers,
    }


def data_parallel_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of megatron's `DistributedDataParallelConfig`."""
    return {"fp8_param_gather": precision.fp8_parameters}


def optimizer_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of megatron's `OptimizerConfig`; the distributed optimizer shards FP8 weights as their recipe needs."""
    return {"fp8_recipe": FP8_RECIPES[precision.recipe].megatron} if precision.fp8_parameters else {}


def has_kernels(precision: PrecisionConfig) -> bool:
    """The recipe is run by FP8 kernels."""
    return precision.is_fp8 and not precision.emulation


def stays_in_bf16(precision: PrecisionConfig, layer: int, num_layers: int) -> bool:
    """Whether an FP8 recipe leaves this layer, counted from 0 over the whole model, in bfloat16."""
    return layer < precision.bf16_first_layers or layer >= num_layers - precision.bf16_last_layers


def check_precision(
    precision: PrecisionConfig,
    encoder: Shape,
    layout: Layout,
    tokens_per_micro_batch: int,
    capability: tuple[int, int] | None,
    has_te: bool,
) -> None:
    """Refuse a recipe that this device or this shape does not allow. Needs neither data nor process groups.

    Args:
        precision: the recipe.
        encoder: the model's shape.
        layout: parallel sizes.
        tokens_per_micro_batch: micro-batch size x sequence length, divided by the context-parallel size.
        capability: the GPU's compute capability; None without a GPU. For a dry run, that of the target.
        has_te: Transformer Engine can be used.

    Raises:
        UserError: naming the field, its value, the shard, and what would do.
    """
    if not precision.is_fp8:
        return
    if not precision.emulation:
        _check_device(precision, capability, has_te)
    _check_layers(precision, encoder, layout)
    _check_shape(precision, encoder, layout, tokens_per_micro_batch)


def small_width_warning(precision: PrecisionConfig, hidden_size: int) -> str | None:
    """What to expect of FP8 kernels at a small width; None where they pay, or do not run."""
    if not has_kernels(precision) or hidden_size >= SMALL_WIDTH:
        return None
    return (
        f"precision.recipe is {precision.recipe} with a hidden size of {hidden_size:,}: FP8 gains little at small width "
        "(published: 1.05x over bf16 at 1,280, 1.33x at 2,560), and less the longer the sequences are; compare with bf16 before a "
        "long run"
    )


def emulation_notice(precision: PrecisionConfig) -> str | None:
    """What a run says at its start if its FP8 is emulated."""
    if not precision.emulation:
        return None
    return (
        f"precision: {precision.label}: operands are rounded to FP8 in torch and multiplied in float32; this shows the recipe's "
        "losses, not its speed or memory"
    )


def _check_device(precision: PrecisionConfig, capability: tuple[int, int] | None, has_te: bool) -> None:
    recipe = FP8_RECIPES[precision.recipe]
    first, end = recipe.capabilities
    if capability is None:
        found = "has no GPU"
    elif capability < first or (end is not None and capability >= end):
        found = f"has a GPU of compute capability {capability[0]}.{capability[1]}"
    elif not has_te:
        found = "has no Transformer Engine"
    else:
        return
    raise UserError(
        f"precision.recipe is {precision.recipe}: its kernels need Transformer Engine on {recipe.devices}, and this machine "
        f"{found}; set precision.emulation to true to try its numbers here, or precision.recipe to bf16"
    )


def _check_layers(precision: PrecisionConfig, encoder: Shape, layout: Layout) -> None:
    first, last, layers = precision.bf16_first_layers, precision.bf16_last_layers, encoder.num_layers
    if first + last >= layers:
        raise UserError(
            f"precision.bf16_first_layers {first} + bf16_last_layers {last} leave none of the {layers} layers to "
            f"precision.recipe {precision.recipe}: lower them, or set the recipe to bf16"
        )
    most = layers // layout.pipeline
    for name, count in (("bf16_first_layers", first), ("bf16_last_layers", last)):
        if count > most:
            raise UserError(
                f"precision.{name} is {count}: megatron-core allows at most the {most} layers of a pipeline stage "
                f"({layers} layers, parallel.pipeline {layout.pipeline})"
            )


def _check_shape(precision: PrecisionConfig, encoder: Shape, layout: Layout, tokens: int) -> None:
    """Sides of the four products of a layer, as one rank has them. The head is not among them: it stays in bfloat16."""
    multiple, tensor = FP8_RECIPES[precision.recipe].multiple, layout.tensor
    heads, groups, width = encoder.num_attention_heads, encoder.num_query_groups, encoder.head_dim
    qkv, projection = (heads + 2 * groups) * width, heads * width
    shards = tensor if layout.sequence_parallel else 1

    def refuse(what: str, shard: str, fix: str) -> None:
        raise UserError(f"{what}: precision.recipe {precision.recipe} needs multiples of {multiple}, and {shard}; {fix}")

    if tokens % (multiple * shards):
        parts = f"a sequence-parallel rank has {tokens / shards:g}" if shards > 1 else f"{tokens} is none"
        allowed = _nearest(tokens, multiple * shards)
        refuse(
            f"a micro-batch has {tokens} tokens (training.micro_batch_size x data.sequence_length, per context-parallel rank)",
            parts,
            f"make it {allowed} tokens",
        )
    if encoder.hidden_size % multiple:
        # Every Hugging Face class wants the width to divide by the heads.
        allowed = _nearest(encoder.hidden_size, math.lcm(multiple, heads))
        refuse(f"model.hidden_size is {encoder.hidden_size}", f"{encoder.hidden_size} is none", f"set it to {allowed}")
    if encoder.ffn_hidden_size % (multiple * tensor):
        fix = f"set it to {_nearest(encoder.ffn_hidden_size, multiple * tensor)}"
        sizes = _tensor_sizes(encoder, multiple)
        refuse(
            f"model.ffn_hidden_size is {encoder.ffn_hidden_size}",
            f"a tensor-parallel rank has {encoder.ffn_hidden_size / tensor:g}" if tensor > 1 else "it is none",
            fix + (f", or parallel.tensor to {sizes}" if sizes and tensor > 1 else ""),
        )
    for name, size in ((f"({heads} heads + 2 x {groups} groups)", qkv), (f"{heads} heads", projection)):
        if size % (multiple * tensor):
            sizes = _tensor_sizes(encoder, multiple)
            fix = f"set parallel.tensor to {sizes}" if sizes else _head_fix(encoder, multiple)
            refuse(
                f"the attention of model.num_attention_heads {heads}, model.num_query_groups {groups} and model.head_dim {width} "
                f"has a projection of {name} x {width} = {size}",
                f"a tensor-parallel rank has {size / tensor:g} (parallel.tensor {tensor})",
                fix,
            )


def _nearest(value: int, step: int) -> str:
    """The allowed values on either side."""
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def _fits(encoder: Shape, multiple: int, tensor: int) -> bool:
    heads, groups = encoder.num_attention_heads, encoder.num_query_groups
    sizes = ((heads + 2 * groups) * encoder.head_dim, heads * encoder.head_dim, encoder.ffn_hidden_size)
    return all(size % (multiple * tensor) == 0 for size in sizes) and heads % tensor == 0 and groups % tensor == 0


def _tensor_sizes(encoder: Shape, multiple: int) -> str:
    """Tensor-parallel sizes at which all of a layer's shards fit, as text; empty if none does."""
    sizes = [size for size in range(1, encoder.num_query_groups + 1) if _fits(encoder, multiple, size)]
    return " or ".join(map(str, sizes[-2:]))


def _head_fix(encoder: Shape, multiple: int) -> str:
    """A head width at which both attention projections fit on one rank."""
    heads, groups = encoder.num_attention_heads, encoder.num_query_groups
    step = math.lcm(*(multiple // math.gcd(multiple, count) for count in (heads + 2 * groups, heads)), 2)
    return f"set model.head_dim to {_nearest(encoder.head_dim, step)} (with parallel.tensor 1)"
