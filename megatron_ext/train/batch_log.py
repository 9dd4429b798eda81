"""A record of what was trained on: the index of every sample with sums of its tokens and of what the model saw of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.dataset import SampleSource
from megatron_ext.data.loader import StepData
from megatron_ext.train.line_file import LineFile

FOLDER = "batches"


class BatchLog:
    """Appends a line a sample to `<output_dir>/batches/data_rank_0000.jsonl`, for one data-parallel rank.

    Two runs that train on the same data, masks and phases write the same lines, whatever their layouts and interruptions; a step
    that is run again is written again.
    """

    def __init__(self, output_dir: Path, source: SampleSource, rank: int):
        """
        Args:
            output_dir: of the run.
            source: where the samples come from.
            rank: data-parallel rank.
        """
        self._lines = LineFile(output_dir / FOLDER / f"data_rank_{rank:04d}.jsonl")
        self._source = source

    def write(self, data: StepData, phase: str) -> None:
        """The samples of one step, in the phase with this name."""
        for batch, samples in zip(data.micro_batches, data.samples, strict=True):
            length = batch.input_ids.numel() // len(samples)
            for place, sample in enumerate(samples):
                line = {
                    "step": data.step,
                    "phase": phase,
                    "objective": batch.objective.name,
                    "sample": sample,
                    "tokens": _sum(self._source.sample(sample).tokens),
                    "seen": _seen(batch, place * length, length),
                }
                self._lines.append(json.dumps(line))


def _seen(batch: Any, start: int, length: int) -> str:
    """Sum over a sample's corrupted tokens, its positions, and which of them predict what."""
    rows = batch.target_positions.numpy()
    own = (rows >= start) & (rows < start + length)
    return _sum(
        batch.input_ids[start : start + length].numpy(),
        batch.position_ids[start : start + length].numpy(),
        rows[own] - start,
        batch.target_ids.numpy()[own],
    )


def _sum(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        digest.update(b"|")
    return digest.hexdigest()
