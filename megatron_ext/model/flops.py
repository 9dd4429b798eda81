"""Parameters and floating-point operations of an encoder, counted once for the MFU metric and every plan.

Counted is the work that is done: attention over the length each token really sees, and the head only where there are logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.model.presets import EncoderConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model by part."""

    blocks: int
    """Attention and feed-forward matrices of all layers."""
    norms: int
    """Norms and biases."""
    embedding: int
    head: int
    """0 when tied to the embedding."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.blocks + self.norms + self.embedding + self.head


def count_parameters(config: EncoderConfig, vocab_size: int) -> ParameterCount:
    """Count parameters.

    Args:
        config: the model's shape.
        vocab_size: rows of the embedding that belong to tokens (padding rows are not counted).
    """
    hidden, width = config.hidden_size, config.head_dim
    attention = hidden * width * (2 * config.num_attention_heads + 2 * config.num_query_groups)
    biases = config.qkv_bias * width * (config.num_attention_heads + 2 * config.num_query_groups)
    head_norms = config.qk_norm * 2 * width
    feed_forward = 3 * hidden * config.ffn_hidden_size
    return ParameterCount(
        blocks=config.num_layers * (attention + feed_forward),
        norms=(2 * config.num_layers + 1) * hidden + config.num_layers * (biases + head_norms),
        embedding=vocab_size * hidden,
        head=0 if config.tie_embeddings else vocab_size * hidden,
    )


def attended_length(segment_lengths: Sequence[int], causal: bool, key_lengths: Sequence[int] | None = None) -> float:
    """Sum over tokens of the length each attends to: sum(l^2), or half of it if causal.

    Args:
        segment_lengths: [k] lengths of the runs of tokens that see each other.
        causal: whether tokens see only what came before.
        key_lengths: [k] what each run looks at, where it is the end of a longer one; None: itself.
    """
    queries = np.asarray(segment_lengths, dtype=np.float64)
    keys = queries if key_lengths is None else np.asarray(key_lengths, dtype=np.float64)
    return float((queries * (keys - queries / 2 if causal else keys)).sum())


def training_flops(config: EncoderConfig, vocab_size: int, *, tokens: float, attended: float, predicted: float) -> float:
    """Floating-point operations of forward and backward, without recomputation.

    Args:
        config: the model's shape.
        vocab_size: vocabulary rows that get a logit.
        tokens: tokens that pass through the blocks.
        attended: sum over these tokens of the length each attends to (see `attended_length`).
        predicted: positions with logits.
    """
    blocks = 6.0 * count_parameters(config, vocab_size).blocks * tokens
    attention = 12.0 * config.num_layers * config.num_attention_heads * config.head_dim * attended
    head = 6.0 * config.hidden_size * vocab_size * predicted
    return blocks + attention + head
