"""Transformer Engine's layers built on the meta device, against the local ones: same parameters, same checkpoint.

Shapes and names alone, for which Transformer Engine needs no GPU: these tests run wherever it can be imported. Every rank of a
layout is built over a fake process group. docs/results/transformer_engine.md says how to get there, and what came out.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

from megatron_ext.config import ParallelConfig, PrecisionConfig, TrainingConfig
from megatron_ext.model.initialization import global_name
from megatron_ext.model.layers import FUSED_NAMES, LayerKind
from megatron_ext.model.presets import PRESETS, EncoderConfig
from megatron_ext.runtime.backend import Backend
from megatron_ext.runtime.capabilities import transformer_engine_problem
from megatron_ext.runtime.cpu import patch_megatron, without_numbers
from megatron_ext.runtime.topology import check_layout, pretended_groups
from megatron_ext.train.build import build_model
from megatron_ext.train.checkpoint import sharded_state

PROBLEM = transformer_engine_problem()
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=f"Transformer Engine's modules cannot be imported: {PROBLEM}")

VOCAB_SIZE = 128_000
LAYOUTS = {
    "TP1 PP1": ParallelConfig(),
    "TP2 PP1": ParallelConfig(tensor=2),
    "TP2 PP1 without SP": ParallelConfig(tensor=2, sequence=False),
    "TP1 PP2": ParallelConfig(pipeline=2),
    "TP2 PP2": ParallelConfig(tensor=2, pipeline=2),
    "TP2 PP2 interleaved": ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2),
    "TP2 CP2": ParallelConfig(tensor=2, context=2),
}
VARIANTS = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "qk_norm": {"qk_norm": True},
    "qkv_bias": {"qkv_bias": True},
    "all three": {"tie_embeddings": True, "qk_norm": True, "qkv_bias": True},
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What training and loading need to know of one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sequence_parallel: bool
    """Its gradient is summed over the tensor-parallel ranks."""
    counts_in_norm: bool
    """This rank's part goes into the gradient norm: it is a shard, or the first copy."""


@dataclasses.dataclass(frozen=True)
class Rank:
    """What one rank of one layout holds and saves."""

    parameters: dict[str, Parameter]
    tensors: dict[tuple[str, str, tuple[int, ...]], tuple[Any, ...]]
    """For each (part of the state, key, offset in the whole tensor) all else that decides what is stored there."""
    extra_states: set[str]
    """Keys of the modules' states that are no tensors."""


def build_rank(
    encoder: EncoderConfig, parallel: ParallelConfig, rank: int, layers: LayerKind, precision: PrecisionConfig | None = None
) -> Rank:
    """Build one rank's chunks and its part of a checkpoint."""
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    layout = check_layout(parallel, TrainingConfig(global_batch_size=8), encoder.num_layers, {}, ranks)
    backend = Backend(torch.device("meta"), layers, "fake")
    with pretended_groups(layout, backend, rank), without_numbers((9, 0)):
        chunks = build_model(encoder, VOCAB_SIZE, layout, backend, torch.bfloat16, seed=0, precision=precision)
        parameters = {global_name(chunk, name): describe(p) for chunk in chunks for name, p in chunk.named_parameters()}
        leaves = [(part, leaf) for part, tree in sharded_state(chunks, None, is_loading=False).items() for leaf in flatten(tree)]
    tensors = {
        (part, leaf.key, leaf.global_offset): (
            *(leaf.global_shape, leaf.local_shape, leaf.dtype, leaf.replica_id),
            *(leaf.axis_fragmentations, leaf.prepend_axis_num),
        )
        for part, leaf in leaves
        if isinstance(leaf, ShardedTensor)
    }
    return Rank(parameters, tensors, {leaf.key for _, leaf in leaves if isinstance(leaf, ShardedObject)})


def describe(parameter: torch.nn.Parameter) -> Parameter:
    """The facts to be compared."""
    return Parameter(
        tuple(parameter.shape),
        parameter.dtype,
        getattr(parameter, "sequence_parallel", False),
        param_is_not_tensor_parallel_duplicate(parameter),
    )


def flatten(tree: Any) -> Iterator[ShardedTensor | ShardedObject]:
    """What a nested state saves, after the splits that megatron does when it saves."""
    if isinstance(tree, ShardedTensorFactory):
        yield from flatten(tree.build())
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from flatten(value)
    else:
        yield tree


def fused(name: str) -> str:
    """The name that a parameter of the local layers has in Transformer Engine's."""
    for local, other in FUSED_NAMES.items():
        name = name.replace(f".{local}", f".{other}")
    return name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_te_layers_hold_and_save_what_the_local_ones_do(preset: str, layout: str, variant: str) -> None:
    """Names, shapes, gradient marks; checkpoint keys, whole shapes, offsets and copies, on every rank."""
    patch_megatron()
    encoder = dataclasses.replace(PRESETS[preset](), **VARIANTS[variant])
    parallel = fit(LAYOUTS[layout], encoder)
    saved: dict[str, list[tuple[int, ...]]] = {}
    for rank in range(parallel.tensor * parallel.pipeline * parallel.context):
        local, te = (build_rank(encoder, parallel, rank, kind) for kind in ("local", "transformer_engine"))
        assert te.parameters == {fused(name): parameter for name, parameter in local.parameters.items()}
        assert te.tensors == local.tensors
        assert te.tensors, "the comparison must see something"
        assert te.extra_states - local.extra_states == only_te_saves(te)
        assert local.extra_states <= te.extra_states
        for (_, key, _), (shape, *_) in te.tensors.items():
            saved.setdefault(key, []).append(shape)
    assert {key: set(shapes) for key, shapes in saved.items()} == {key: {shape} for key, shape in whole_tensors(encoder).items()}


@pytest.mark.parametrize("layout", ["TP1 PP1", "TP2 PP2 interleaved"])
@pytest.mark.parametrize("recipe", ["fp8-delayed", "fp8-tensorwise", "fp8-blockwise"])
@pytest.mark.parametrize("preset", PRESETS)
def test_fp8_recipes_hold_and_save_what_bf16_does(preset: str, recipe: str, layout: str) -> None:
    """A checkpoint does not depend on the recipe, but for the extra states' content.

    `precision.fp8_parameters` is left out: Transformer Engine quantizes weights in its constructors then, which takes a GPU.
    """
    patch_megatron()
    encoder = PRESETS[preset]()
    parallel = fit(LAYOUTS[layout], encoder)
    precision = PrecisionConfig(recipe=recipe)
    for rank in range(parallel.tensor * parallel.pipeline * parallel.context):
        plain, fp8 = (build_rank(encoder, parallel, rank, "transformer_engine", p) for p in (None, precision))
        assert fp8 == plain


def fit(parallel: ParallelConfig, encoder: EncoderConfig) -> ParallelConfig:
    """26 layers do not divide by 4 chunks: interleave as many as do."""
    chunks = parallel.virtual_pipeline
    while chunks > 1 and encoder.num_layers % (parallel.pipeline * chunks):
        chunks += 1
    return dataclasses.replace(parallel, virtual_pipeline=chunks)


def only_te_saves(rank: Rank) -> set[str]:
    """Extra states that only Transformer Engine's layers have: those of its norms that are modules of their own. They are empty."""
    norms = ("final_layernorm.weight", "q_layernorm.weight", "k_layernorm.weight")
    return {name.removesuffix("weight") + "_extra_state" for name in rank.parameters if name.endswith(norms)}


def whole_tensors(encoder: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint and its whole shape, worked out from the encoder's shape alone."""
    hidden, width = encoder.hidden_size, encoder.head_dim
    heads, groups = encoder.num_attention_heads, encoder.num_query_groups
    padded = -(-VOCAB_SIZE // 256) * 256  # 128,000 is a multiple of 128 x tensor for all layouts here
    tensors = {"embedding.word_embeddings.weight": (padded, hidden), "decoder.final_layernorm.weight": (hidden,)}
    if not encoder.tie_embeddings:
        tensors["output_layer.weight"] = (padded, hidden)
    for layer in range(encoder.num_layers):
        prefix = f"decoder.layers.{layer}."
        qkv = width * (heads + 2 * groups)
        tensors |= {
            prefix + "self_attention.linear_qkv.layer_norm_weight": (hidden,),
            prefix + "self_attention.linear_qkv.weight": (qkv, hidden),
            prefix + "self_attention.linear_proj.weight": (hidden, width * heads),
            prefix + "mlp.linear_fc1.layer_norm_weight": (hidden,),
            prefix + "mlp.linear_fc1.weight": (2 * encoder.ffn_hidden_size, hidden),
            prefix + "mlp.linear_fc2.weight": (hidden, encoder.ffn_hidden_size),
        }
        if encoder.qkv_bias:
            tensors[prefix + "self_attention.linear_qkv.bias"] = (qkv,)
        if encoder.qk_norm:
            tensors |= {prefix + f"self_attention.{side}_layernorm.weight": (width,) for side in "qk"}
    return tensors
