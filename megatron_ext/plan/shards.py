"""The parameters that one rank holds, by formula: what memory and communication are counted from."""

import math
from dataclasses import dataclass

from megatron_ext.config import PrecisionConfig
from megatron_ext.model.presets import EncoderConfig, padded_vocab_size
from megatron_ext.runtime.topology import Layout


@dataclass(frozen=True)
class Shard:
    """This rank's part of one parameter."""

    name: str
    size: int
    """Numbers in it."""
    is_product: bool = False
    """A layer's matrix, which an FP8 recipe multiplies in FP8."""
    layer: int = -1
    """Layer in the whole model; -1 outside the layers."""
    is_shared: bool = False
    """A tied embedding that the first and the last stage both hold."""


def stage_chunks(encoder: EncoderConfig, vocab_size: int, layout: Layout, stage: int) -> list[list[Shard]]:
    """The parameters of a pipeline stage, for each of its model chunks, in the order in which they are reduced backwards.

    Args:
        encoder: the model's shape.
        vocab_size: ids that belong to tokens.
        layout: parallel sizes.
        stage: pipeline rank.
    """
    layers = encoder.num_layers // (layout.pipeline * layout.virtual_pipeline)
    vocabulary = padded_vocab_size(vocab_size, layout.tensor) // layout.tensor * encoder.hidden_size
    is_shared = encoder.tie_embeddings and layout.pipeline > 1
    chunks = []
    for number in range(layout.virtual_pipeline):
        position = number * layout.pipeline + stage
        chunk = []
        if position == 0:
            chunk.append(Shard("embedding", vocabulary, is_shared=is_shared))
        for layer in range(position * layers, (position + 1) * layers):
            chunk += _layer(encoder, layout.tensor, layer)
        if position == layout.pipeline * layout.virtual_pipeline - 1:
            chunk.append(Shard("final norm", encoder.hidden_size))
            if not encoder.tie_embeddings or is_shared:
                chunk.append(Shard("head", vocabulary, is_shared=is_shared))
        chunks.append(chunk)
    return chunks


def _layer(encoder: EncoderConfig, tensor: int, layer: int) -> list[Shard]:
    hidden, width = encoder.hidden_size, encoder.head_dim
    qkv = width * (encoder.num_attention_heads + 2 * encoder.num_query_groups) // tensor
    ffn = encoder.ffn_hidden_size // tensor
    return [
        Shard("input norm", hidden, layer=layer),
        Shard("projection", width * encoder.num_attention_heads // tensor * hidden, True, layer),
        Shard("qkv", qkv * hidden, True, layer),
        *([Shard("qkv bias", qkv, layer=layer)] if encoder.qkv_bias else []),
        *([Shard("query norm", width, layer=layer), Shard("key norm", width, layer=layer)] if encoder.qk_norm else []),
        Shard("feed-forward norm", hidden, layer=layer),
        Shard("gate and up", 2 * ffn * hidden, True, layer),
        Shard("down", ffn * hidden, True, layer),
    ]


def is_fp8(shard: Shard, encoder: EncoderConfig, precision: PrecisionConfig) -> bool:
    """Whether kernels multiply this parameter in FP8: the first and last layers, the embedding and the head stay in bfloat16."""
    kernels = precision.is_fp8 and not precision.emulation
    return kernels and shard.is_product and is_fp8_layer(shard.layer, encoder, precision)


def is_fp8_layer(layer: int, encoder: EncoderConfig, precision: PrecisionConfig) -> bool:
    """Whether this layer's products are in FP8."""
    return precision.bf16_first_layers <= layer < encoder.num_layers - precision.bf16_last_layers


def buffer_ranges(shards: list[Shard], ranks: int) -> tuple[int, list[tuple[int, int]]]:
    """Length of the buffer in which megatron lays one chunk's parameters or gradients, and where each parameter lies.

    The distributed optimizer aligns parameters to 64 numbers and ends to a multiple of 128 and of its ranks.

    Args:
        shards: the parameters of the chunk.
        ranks: that share the buffer under the distributed optimizer; 0 for an unpadded buffer.
    """
    ranges, position = [], 0
    end_step = math.lcm(max(1, ranks), 128)
    for shard in reversed(shards):
        start = _round_up(position, 64) if ranks else position
        if ranks and shard.is_shared and ranges:
            start = _round_up(start, end_step)
        position = start + shard.size
        ranges.append((start, position))
        if ranks and shard.is_shared:
            position = _round_up(position, end_step)
    return (_round_up(position, end_step) if ranks else position), ranges


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
