"""Bytes that one rank needs, by formula: weights, gradients and optimizer states exactly, activations as the modules keep them."""

from dataclasses import dataclass, fields

from megatron_ext.config import PrecisionConfig, TrainingConfig
from megatron_ext.model.presets import LOGITS_PER_CHUNK, EncoderConfig, padded_vocab_size
from megatron_ext.plan.shards import buffer_ranges, is_fp8, is_fp8_layer, stage_chunks
from megatron_ext.runtime.topology import Layout

CPU_LIBRARIES, CPU_LIBRARIES_BF16 = 24 * 2**20, 48 * 2**20
"""Buffers that torch's libraries keep for themselves on a CPU: measured, docs/results/memory.md."""
CPU_HOLES = 0.22
"""Share of what comes and goes in a step that a CPU run holds besides, in holes of its heap: fitted, docs/results/memory.md."""
FLOAT32 = 4
MOMENTS = 2 * FLOAT32


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, each at its largest."""

    weights: int
    """Weights and, under an FP8 recipe, their FP8 copies."""
    gradients: int
    """megatron's float32 buffers."""
    optimizer: int
    """Moments, and float32 master weights where the weights are in fewer bits."""
    activations: int
    """What the blocks and embedding keep for the backward pass, of all micro-batches in flight."""
    logits: int
    """What the head keeps, and one chunk of logits."""
    workspace: int
    """What comes and goes: gathered hidden states, a layer computed again, gradients of one parameter; on a CPU, holes too."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


def rank_memory(
    encoder: EncoderConfig,
    vocab_size: int,
    layout: Layout,
    training: TrainingConfig,
    precision: PrecisionConfig,
    sequence_length: int,
    stage: int,
    predicted_share: float,
    *,
    on_cpu: bool = False,
) -> RankMemory:
    """Bytes of a rank of a pipeline stage (the first data-parallel one: the others may have a few less).

    Args:
        encoder: the model's shape.
        vocab_size: ids that belong to tokens.
        layout: parallel sizes.
        training: batch sizes and recomputation.
        precision: numbers.
        sequence_length: tokens in a sample.
        stage: pipeline rank, from 0.
        predicted_share: share of the tokens with logits: 1 for CLM, the mask ratio for MLM.
        on_cpu: the local layers on a CPU instead of Transformer Engine's on a GPU.
    """
    element = 4 if precision.recipe == "fp32" else 2
    tokens = training.micro_batch_size * sequence_length // layout.context
    row = _Row(tokens, tokens // layout.tensor if layout.sequence_parallel else tokens, element)
    weights, gradients, optimizer = state_bytes(encoder, vocab_size, layout, precision, stage)
    activations = _activations(encoder, layout, training, precision, stage, row, on_cpu)
    logits, head_workspace = 0, 0
    if stage == layout.pipeline - 1:
        logits, head_workspace = _head(encoder, vocab_size, layout, row, predicted_share, on_cpu)
    workspace = max(head_workspace, _layer_workspace(encoder, layout, training, row, on_cpu))
    if on_cpu:
        workspace += CPU_LIBRARIES if element == FLOAT32 else CPU_LIBRARIES_BF16
        workspace += round(CPU_HOLES * (activations + logits + workspace))
    return RankMemory(weights, gradients, optimizer, activations, logits, workspace)


@dataclass(frozen=True)
class _Row:
    """A micro-batch on one rank."""

    tokens: int
    """In attention and the products."""
    local: int
    """In norms and the residual stream, which sequence parallelism splits."""
    element: int
    """Bytes of a number."""


def state_bytes(
    encoder: EncoderConfig, vocab_size: int, layout: Layout, precision: PrecisionConfig, stage: int
) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states, as megatron lays them out on the first data-parallel rank."""
    element = 4 if precision.recipe == "fp32" else 2
    ranks = layout.data * layout.context if layout.distributed_optimizer else 0
    per_number = MOMENTS + (FLOAT32 if element < FLOAT32 else 0)
    weights = gradients = optimizer = 0
    for chunk in stage_chunks(encoder, vocab_size, layout, stage):
        in_fp8 = [shard for shard in chunk if is_fp8(shard, encoder, precision)]
        groups = [chunk]
        if precision.fp8_parameters:
            groups = [[shard for shard in chunk if shard not in in_fp8], in_fp8]
        for number, group in enumerate(groups):
            length, ranges = buffer_ranges(group, ranks)
            weights += length * (1 if number else element)
            gradients += length * FLOAT32
            mine = length // max(1, ranks)
            optimizer += per_number * sum(max(0, min(end, mine) - start) for start, end in ranges)
    return weights + fp8_copies(encoder, vocab_size, layout, precision, stage), gradients, optimizer


def fp8_copies(encoder: EncoderConfig, vocab_size: int, layout: Layout, precision: PrecisionConfig, stage: int) -> int:
    """Bytes that kernels keep besides the weights: each in FP8 and its transpose, of which FP8 weights are the first themselves."""
    chunks = stage_chunks(encoder, vocab_size, layout, stage)
    numbers = sum(shard.size for chunk in chunks for shard in chunk if is_fp8(shard, encoder, precision))
    return numbers * (1 if precision.fp8_parameters else 2)


def chunks_in_flight(layout: Layout, micro_batches: int, stage: int) -> int:
    """Forward passes of a model chunk that wait for their backward pass, at most: 1F1B, interleaved or not."""
    p, v = layout.pipeline, layout.virtual_pipeline
    if v == 1:
        return min(p - stage, micro_batches)
    return min(2 * (p - stage - 1) + (v - 1) * p + 1, micro_batches * v)


def _activations(
    encoder: EncoderConfig,
    layout: Layout,
    training: TrainingConfig,
    precision: PrecisionConfig,
    stage: int,
    row: _Row,
    on_cpu: bool,
) -> int:
    in_flight = chunks_in_flight(layout, layout.micro_batches(training), stage)
    stages = layout.pipeline * layout.virtual_pipeline
    per_chunk = encoder.num_layers // stages
    layers = [
        number * layout.pipeline * per_chunk + stage * per_chunk + i
        for number in range(layout.virtual_pipeline)
        for i in range(per_chunk)
    ]
    fp8 = precision.is_fp8 and not precision.emulation
    total = sum(
        layer_bytes(encoder, layout, training.recompute, row, on_cpu, fp8 and is_fp8_layer(layer, encoder, precision))
        for layer in layers
    )
    total = total * in_flight // layout.virtual_pipeline
    if stage == 0:
        total += 8 * row.tokens * chunks_in_flight(layout, layout.micro_batches(training), 0) // layout.virtual_pipeline
    if stage == layout.pipeline - 1:
        stream = row.local * encoder.hidden_size
        total += stream * row.element + FLOAT32 * row.local
    return total


def layer_bytes(encoder: EncoderConfig, layout: Layout, recompute: str, row: _Row, on_cpu: bool, in_fp8: bool) -> int:
    """Bytes that one layer keeps of one micro-batch."""
    stream = row.local * encoder.hidden_size
    if recompute == "full":
        return stream * row.element
    product = 1 if in_fp8 else row.element
    ffn = row.tokens * encoder.ffn_hidden_size // layout.tensor
    norms = 2 * (stream * (row.element + product) + FLOAT32 * row.local)
    gated = ffn * (2 * row.element + product)
    rotation = 2 * row.tokens * encoder.head_dim * row.element if on_cpu else 0  # queries and keys each keep half a sine and cosine
    return norms + rotation + _attention_bytes(encoder, layout, recompute, row, on_cpu, in_fp8) + gated


def _attention_bytes(encoder: EncoderConfig, layout: Layout, recompute: str, row: _Row, on_cpu: bool, in_fp8: bool) -> int:
    """Queries, keys, values, result and the softmax's statistics; under context parallelism the keys of the whole row."""
    heads = encoder.num_attention_heads // layout.tensor
    groups = encoder.num_query_groups // layout.tensor
    queries = row.tokens * heads * encoder.head_dim
    keys = row.tokens * groups * encoder.head_dim
    numbers = 2 * queries + 2 * keys * (layout.context if recompute == "none" else 1)
    if on_cpu and recompute == "none" and heads > groups:
        numbers += 2 * layout.context * (queries - keys)  # repeated for every query head
    elif on_cpu:
        numbers += queries + keys  # the values are a view of one tensor with queries and keys as they were before rotation
    if on_cpu and recompute == "none":
        numbers += queries  # packed documents give a result each, which are joined to another tensor
    statistics = FLOAT32 * row.tokens * heads if recompute == "none" else 0
    if encoder.qk_norm:
        statistics += FLOAT32 * row.tokens * (heads + groups)
        if not on_cpu or heads > groups:
            # The norms' input: a view of queries, keys and values in one; grouped queries are copied out of it.
            numbers += queries * (2 if heads > groups else 1) + 2 * keys
    return numbers * row.element + (queries if in_fp8 else 0) + statistics


def _layer_workspace(encoder: EncoderConfig, layout: Layout, training: TrainingConfig, row: _Row, on_cpu: bool) -> int:
    """The widest point of one layer's backward pass, and under recomputation the layer that is computed again."""
    ffn = 3 * row.tokens * encoder.ffn_hidden_size // layout.tensor * row.element
    again = layer_bytes(encoder, layout, "none", row, on_cpu, False) if training.recompute == "full" else 0
    return ffn + again


def _head(encoder: EncoderConfig, vocab_size: int, layout: Layout, row: _Row, share: float, on_cpu: bool) -> tuple[int, int]:
    """What the head keeps with one chunk of logits, and what comes and goes."""
    vocabulary = padded_vocab_size(vocab_size, layout.tensor) // layout.tensor
    predicted = round(row.tokens * share)
    weight = vocabulary * encoder.hidden_size
    chunk = min(predicted, max(1, LOGITS_PER_CHUNK["cpu" if on_cpu else "gpu"] // vocabulary)) * vocabulary
    kept = predicted * encoder.hidden_size * row.element + weight * FLOAT32
    extra = row.element if row.element < FLOAT32 else 0
    logits = chunk * ((FLOAT32 + extra) if on_cpu else row.element)
    gathered = (row.tokens + predicted) * encoder.hidden_size * row.element
    forward = logits + gathered + (weight * extra if on_cpu else 0)
    # A weight that is not tied gets its gradient in place; what stands for it takes memory on a GPU, and none before it is touched.
    in_its_stead = 0 if on_cpu else weight * row.element
    backward = weight * (FLOAT32 + extra) if encoder.tie_embeddings else in_its_stead
    return kept + logits, max(forward, backward) - logits
