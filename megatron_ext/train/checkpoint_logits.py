"""Logits of a checkpoint, computed by the training stack itself: what an exported model is held against."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_ext.checkpoint_files import read_run_file
from megatron_ext.config import ParallelConfig, TrainingConfig
from megatron_ext.data.batch import MicroBatch, collate
from megatron_ext.model.presets import EncoderConfig
from megatron_ext.objective import OBJECTIVES, Example
from megatron_ext.runtime.backend import ON_CPU
from megatron_ext.runtime.cpu import patch_megatron
from megatron_ext.runtime.topology import check_layout, process_groups
from megatron_ext.train.build import build_model
from megatron_ext.train.checkpoint import load_checkpoint


def checkpoint_logits(checkpoint: Path, token_rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Run a checkpoint on one CPU rank in float32, with the attention of its last objective.

    Args:
        checkpoint: a published checkpoint, saved at any layout.
        token_rows: token ids of each text.

    Returns:
        For each text float32 logits [length, vocab_size], without the padded vocabulary.

    Raises:
        UserError: the directory is not a complete checkpoint.
    """
    record = read_run_file(checkpoint)
    encoder = EncoderConfig(**record["encoder"])
    patch_megatron()
    layout = check_layout(ParallelConfig(), TrainingConfig(), encoder.num_layers, {}, world_size=1)
    with process_groups(layout, ON_CPU), torch.no_grad():
        chunks = build_model(encoder, record["vocab_size"], layout, ON_CPU, torch.float32, seed=0)
        load_checkpoint(checkpoint, chunks, optimizer=None)
        return [chunks[0](_row(row, record["causal"]), return_logits=True)[:, : record["vocab_size"]] for row in token_rows]


def _row(token_ids: Sequence[int], causal: bool) -> MicroBatch:
    """One text as a batch without predictions."""
    nothing = np.zeros(0, dtype=np.int64)
    example = Example(np.asarray(token_ids, dtype=np.int64), nothing, nothing)
    objective = OBJECTIVES["clm" if causal else "mlm"]
    lengths = [np.asarray([len(token_ids)])]
    return collate([example], lengths, objective, documents_attend_across=True, restart_positions=True)
