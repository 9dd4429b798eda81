"""A small model's shape and made-up batches for it: what a layout is compared with one rank by.

Everything is a function of fixed seeds. The distributed tests use the same pieces. Needs no megatron.
"""

import math
from typing import Any

import numpy as np

from megatron_ext.config import MaskingConfig, ParallelConfig
from megatron_ext.data.batch import MicroBatch, collate
from megatron_ext.model.presets import EncoderConfig
from megatron_ext.objective import MASK_STREAM, OBJECTIVES, Vocabulary, make_example, random_generator

VOCAB_SIZE = 251
SAMPLES = 3
"""In a micro-batch; odd, so that context parallelism of two cuts through a sample."""
DOCUMENTS = 4
"""In a sample."""
SPECIAL_IDS = 5
MASK_ID = 1
MIXTURE = ("clm", "mlm", "mlm", "mntp")
"""Objectives of successive micro-batches under `mixed`."""


def sequence_length(parallel: ParallelConfig) -> int:
    """Tokens in a sample: 48, or the next number that tensor and context parallelism can split."""
    parts = parallel.tensor * parallel.context
    return math.ceil(48 / parts) * parts


def make_encoder(parallel: ParallelConfig, **other: Any) -> EncoderConfig:
    """Four layers and two key/value heads, or the smallest multiples that these sizes can split.

    Grouped-query attention and a head width that is not hidden_size / heads: both change how weights are cut. `other` fields are
    set besides.
    """
    stages = parallel.pipeline * parallel.virtual_pipeline
    groups = 2 if parallel.tensor <= 2 else parallel.tensor
    return EncoderConfig(
        num_layers=math.ceil(4 / stages) * stages,
        hidden_size=24 * groups,
        ffn_hidden_size=40 * groups,
        num_attention_heads=3 * groups,
        num_query_groups=groups,
        head_dim=16,
        init_std=0.1,
        max_position_embeddings=sequence_length(parallel),
        **other,
    )


def make_vocabulary() -> Vocabulary:
    """Ids 0..4 are special; every third piece continues a word."""
    return Vocabulary(MASK_ID, np.arange(VOCAB_SIZE) < SPECIAL_IDS, np.arange(VOCAB_SIZE) % 3 != 0)


def make_batch(number: int, objective: str, packed: bool, length: int) -> MicroBatch:
    """Micro-batch `number` of a made-up corpus: samples of random tokens, cut into documents.

    Args:
        number: of the micro-batch in the run.
        objective: clm, mlm or mntp; mixed takes turns.
        packed: documents do not see each other and count their positions from 0; otherwise the cuts only move targets.
        length: tokens in a sample.
    """
    chosen = OBJECTIVES[MIXTURE[number % len(MIXTURE)] if objective == "mixed" else objective]
    generator = np.random.default_rng(number)
    examples, segments = [], []
    for sample in range(SAMPLES):
        tokens = generator.integers(SPECIAL_IDS, VOCAB_SIZE, size=length)
        cuts = np.sort(generator.choice(np.arange(1, length), size=DOCUMENTS - 1, replace=False))
        segments.append(np.diff([0, *cuts, length]))
        masks = random_generator(7, MASK_STREAM, SAMPLES * number + sample)
        masking = MaskingConfig()
        examples.append(make_example(tokens, segments[-1], chosen, masking, masking.ratio, make_vocabulary(), masks))
    return collate(examples, segments, chosen, documents_attend_across=not packed, restart_positions=packed)
