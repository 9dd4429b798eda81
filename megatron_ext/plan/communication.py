"""Bytes that one rank sends in one optimizer step, by kind: counted for ring algorithms, for the modules as built.

Of n bytes over r ranks an all-gather or a reduce-scatter sends n (r - 1) / r from each rank, an all-reduce twice that.
"""

from megatron_ext.config import PrecisionConfig, TrainingConfig
from megatron_ext.model.presets import EncoderConfig
from megatron_ext.plan.shards import is_fp8, stage_chunks
from megatron_ext.runtime.topology import Layout

KINDS = ("tensor", "pipeline", "context", "reduce_scatter", "all_gather", "all_reduce", "embedding")
"""Tensor-, pipeline- and context-parallel traffic; the gradients' reduce-scatter and the weights' all-gather (distributed
optimizer) or the gradients' all-reduce; and the tied embedding's gradient between first and last stage."""
FLOAT32 = 4


def step_traffic(
    encoder: EncoderConfig,
    vocab_size: int,
    layout: Layout,
    training: TrainingConfig,
    precision: PrecisionConfig,
    sequence_length: int,
    stage: int,
    predicted_share: float,
) -> dict[str, float]:
    """Bytes that a rank of a pipeline stage sends in a step; arguments as of `memory.rank_memory`.

    Returns:
        Every one of `KINDS`, 0 where there is nothing to send.
    """
    element = 4 if precision.recipe == "fp32" else 2
    tokens = training.micro_batch_size * sequence_length // layout.context
    micro_batches = layout.micro_batches(training)
    chunks = stage_chunks(encoder, vocab_size, layout, stage)
    layers = encoder.num_layers // layout.pipeline
    stream = tokens * encoder.hidden_size * element
    recompute = training.recompute == "full"
    traffic = dict.fromkeys(KINDS, 0.0)

    per_batch = _tensor_bytes(encoder, layout, layers, stream, stage, tokens * predicted_share, recompute)
    traffic["tensor"] = per_batch * micro_batches
    sent = layout.virtual_pipeline * 2 - (stage == 0) - (stage == layout.pipeline - 1)
    traffic["pipeline"] = sent * micro_batches * stream / (layout.tensor if layout.sequence_parallel else 1)
    if layout.pipeline == 1:
        traffic["pipeline"] = 0.0
    # Forward gathers keys and values, and again where it is computed again; backward scatters their gradients.
    keys_and_values = 2 * tokens * layout.context * encoder.num_query_groups * encoder.head_dim // layout.tensor * element
    traffic["context"] = micro_batches * layers * (2 + (training.recompute != "none")) * _share(layout.context) * keys_and_values

    numbers = sum(shard.size for chunk in chunks for shard in chunk)
    fp8 = sum(shard.size for chunk in chunks for shard in chunk if is_fp8(shard, encoder, precision)) * precision.fp8_parameters
    ranks = layout.data * layout.context
    if layout.distributed_optimizer:
        traffic["reduce_scatter"] = FLOAT32 * numbers * _share(ranks)
        traffic["all_gather"] = (element * (numbers - fp8) + fp8) * _share(ranks)
    else:
        traffic["all_reduce"] = 2 * FLOAT32 * numbers * _share(ranks)
    shared = sum(shard.size for chunk in chunks for shard in chunk if shard.is_shared)
    traffic["embedding"] = 2 * FLOAT32 * shared * _share(2)
    return traffic


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


def _tensor_bytes(
    encoder: EncoderConfig, layout: Layout, layers: int, stream: int, stage: int, predicted: float, recompute: bool
) -> float:
    """Bytes of one micro-batch, in forward and backward."""
    # A pair of gather and scatter is as much as one all-reduce. With sequence parallelism the two inputs that were split are
    # gathered once more in the backward pass, for the gradients of their weights.
    halves = layers * (4 + 4 + (2 if layout.sequence_parallel else 0) + (4 if recompute else 0))
    if stage == 0:
        halves += 2
    total = float(halves * stream)
    if stage == layout.pipeline - 1:
        total += 2 * stream + 2 * 3 * FLOAT32 * predicted
    return total * _share(layout.tensor)
