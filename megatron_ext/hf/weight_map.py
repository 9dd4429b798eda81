"""Which Hugging Face tensors a checkpoint's tensors are, either way: a table of names, each with a typed layout converter.

Llama's names are those of every family that is converted. A converter states the shape on either side, so that shapes are checked
and files planned before any tensor is read.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_ext.model.presets import EncoderConfig

Shape = tuple[int, ...]


class Converter(Protocol):
    """Turns one megatron tensor into one or more Hugging Face tensors."""

    @property
    def megatron_shape(self) -> Shape:
        """Shape of the whole (unsharded) megatron tensor."""

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors, in the order `to_hf` returns them."""

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Rearrange a tensor of `megatron_shape`; the results may be views of it."""

    def from_hf(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The inverse: tensors of `hf_shapes` as one of `megatron_shape`."""


@dataclass(frozen=True)
class Copy:
    """The same tensor on both sides."""

    shape: Shape

    @property
    def megatron_shape(self) -> Shape:
        """The shape itself."""
        return self.shape

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """The shape itself."""
        return (self.shape,)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The tensor itself."""
        return (tensor,)

    def from_hf(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The tensor itself."""
        return tensors[0]


@dataclass(frozen=True)
class StripVocabularyPadding:
    """[padded_vocab_size, h] -> [vocab_size, h]; the padding depends on the tensor-parallel size of the training."""

    vocab_size: int
    padded_vocab_size: int
    hidden_size: int

    @property
    def megatron_shape(self) -> Shape:
        """[padded_vocab_size, h]."""
        return (self.padded_vocab_size, self.hidden_size)

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """[vocab_size, h]."""
        return ((self.vocab_size, self.hidden_size),)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Drop the rows that belong to no token."""
        return (tensor[: self.vocab_size],)

    def from_hf(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Add rows of zeros."""
        return torch.nn.functional.pad(tensors[0], (0, 0, 0, self.padded_vocab_size - self.vocab_size))


@dataclass(frozen=True)
class SplitQKV:
    """[(n + 2 g) d, h], whose rows are per key/value head the n/g query heads, the key and the value -> q, k, v.

    Biases, [(n + 2 g) d], are rows of one number each: `hidden_size` None.
    """

    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    hidden_size: int | None

    @property
    def _row(self) -> Shape:
        return () if self.hidden_size is None else (self.hidden_size,)

    @property
    def megatron_shape(self) -> Shape:
        """[(n + 2 g) d, h]."""
        return ((self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim, *self._row)

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """[n d, h], [g d, h], [g d, h]."""
        heads = (self.num_attention_heads, self.num_query_groups, self.num_query_groups)
        return tuple((count * self.head_dim, *self._row) for count in heads)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Gather each kind of head over the groups; the order inside a head is the same, as both rotate halves."""
        per_group = self.num_attention_heads // self.num_query_groups
        grouped = tensor.view(self.num_query_groups, per_group + 2, self.head_dim, *self._row)
        parts = grouped.split((per_group, 1, 1), dim=1)
        return tuple(part.reshape(-1, *self._row) for part in parts)

    def from_hf(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Put each group's heads together."""
        grouped = [tensor.view(self.num_query_groups, -1, self.head_dim, *self._row) for tensor in tensors]
        return torch.cat(grouped, dim=1).view(self.megatron_shape)


@dataclass(frozen=True)
class SplitGateUp:
    """[2 ffn, h], the gate's rows and then the up projection's -> gate, up."""

    ffn_hidden_size: int
    hidden_size: int

    @property
    def megatron_shape(self) -> Shape:
        """[2 ffn, h]."""
        return (2 * self.ffn_hidden_size, self.hidden_size)

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """[ffn, h], [ffn, h]."""
        return ((self.ffn_hidden_size, self.hidden_size),) * 2

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Cut in half."""
        return tensor.split(self.ffn_hidden_size)

    def from_hf(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """One after the other."""
        return torch.cat(tensors)


@dataclass(frozen=True)
class Mapping:
    """One megatron tensor and the Hugging Face tensors that it becomes."""

    megatron_key: str
    hf_names: tuple[str, ...]
    converter: Converter

    @property
    def parameters(self) -> int:
        """Numbers in the Hugging Face tensors."""
        return sum(math.prod(shape) for shape in self.converter.hf_shapes)

    def to_hf(self, tensor: Tensor) -> dict[str, Tensor]:
        """Hugging Face name -> tensor."""
        return dict(zip(self.hf_names, self.converter.to_hf(tensor), strict=True))

    def from_hf(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The tensors named `hf_names`, in this order, as the megatron tensor."""
        return self.converter.from_hf(tensors)


def is_vocabulary(mapping: Mapping) -> bool:
    """Whether the tensor has one row for each token: the embedding and the head."""
    return isinstance(mapping.converter, StripVocabularyPadding)


def build_mappings(encoder: EncoderConfig, vocab_size: int, padded_vocab_size: int) -> list[Mapping]:
    """The table of a model of this shape, in the model's order.

    Args:
        encoder: the model's shape.
        vocab_size: ids that belong to tokens.
        padded_vocab_size: rows of the megatron embedding.
    """
    vocabulary = StripVocabularyPadding(vocab_size, padded_vocab_size, encoder.hidden_size)
    mappings = [Mapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary)]
    for index in range(encoder.num_layers):
        mappings += _layer(encoder, index)
    mappings.append(Mapping("decoder.final_layernorm.weight", ("model.norm.weight",), Copy((encoder.hidden_size,))))
    if not encoder.tie_embeddings:
        mappings.append(Mapping("output_layer.weight", ("lm_head.weight",), vocabulary))
    return mappings


def _layer(encoder: EncoderConfig, index: int) -> list[Mapping]:
    hidden, ffn = encoder.hidden_size, encoder.ffn_hidden_size
    heads_width = encoder.num_attention_heads * encoder.head_dim
    norm = Copy((hidden,))
    heads = (encoder.num_attention_heads, encoder.num_query_groups, encoder.head_dim)
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    table: list[tuple[str, tuple[str, ...], Converter]] = [
        ("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm",), norm),
        ("self_attention.linear_qkv.weight", projections, SplitQKV(*heads, hidden)),
    ]
    if encoder.qkv_bias:
        table.append(("self_attention.linear_qkv.bias", projections, SplitQKV(*heads, None)))
    if encoder.qk_norm:
        table += [
            (f"self_attention.{kind}_layernorm.weight", (f"self_attn.{kind}_norm",), Copy((encoder.head_dim,))) for kind in "qk"
        ]
    table += [
        ("self_attention.linear_proj.weight", ("self_attn.o_proj",), Copy((hidden, heads_width))),
        ("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm",), norm),
        ("mlp.linear_fc1.weight", ("mlp.gate_proj", "mlp.up_proj"), SplitGateUp(ffn, hidden)),
        ("mlp.linear_fc2.weight", ("mlp.down_proj",), Copy((hidden, ffn))),
    ]
    return [
        Mapping(
            f"decoder.layers.{index}.{key}",
            tuple(f"model.layers.{index}.{name}.{'bias' if key.endswith('.bias') else 'weight'}" for name in names),
            converter,
        )
        for key, names, converter in table
    ]
