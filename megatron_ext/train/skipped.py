"""Steps whose loss or gradients are not finite: written down, counted, and too many of them end the run."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.data.loader import StepData
from megatron_ext.errors import UserError, warn

FILE = "skipped_steps.jsonl"
"""Each line: the step (from 0 on), the half-open range of its samples, and its micro-batches with a loss that is not finite."""


@dataclass(frozen=True)
class SkippedStep:
    """A step of this rank as it is written down."""

    step: int
    """From 0 on."""
    samples: list[range]
    """Of each micro-batch."""
    objectives: list[str]
    """Of each micro-batch."""

    @classmethod
    def of(cls, data: StepData) -> "SkippedStep":
        """Without the tokens."""
        return cls(data.step, data.samples, [batch.objective.name for batch in data.micro_batches])


class SkippedSteps:
    """Counts skipped steps; all ranks count alike, for they agree on each."""

    def __init__(self, output_dir: Path, limit: int):
        """
        Args:
            output_dir: of the run.
            limit: steps in a row that may be skipped.
        """
        self._path = output_dir / FILE
        self._limit = limit
        self.in_a_row = 0
        """Skipped steps up to now without a good one between."""

    def good(self) -> None:
        """A step was finite."""
        self.in_a_row = 0

    def skip(self, skipped: SkippedStep, losses: list[float], gradient_norm: float) -> None:
        """A step was skipped: rank 0 writes it down; all ranks call it together.

        Args:
            skipped: this rank's micro-batches.
            losses: sum of the losses of each of them on the last pipeline stage, else empty.
            gradient_norm: global norm.

        Raises:
            UserError: too many steps in a row.
        """
        self.in_a_row += 1
        own = [
            {"samples": [samples.start, samples.stop], "objective": objective, "loss": repr(loss)}
            for objective, samples, loss in zip(skipped.objectives, skipped.samples, losses, strict=False)
            if not math.isfinite(loss)
        ]
        everything: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everything, (skipped.samples, own))
        samples = [index for ranges, _ in everything for part in ranges for index in part]
        offenders = {batch["samples"][0]: batch for _, batches in everything for batch in batches}
        record = {
            "step": skipped.step,
            "gradient_norm": repr(gradient_norm),
            "samples": [min(samples), max(samples) + 1],
            "offending_micro_batches": [offenders[first] for first in sorted(offenders)],
        }
        if torch.distributed.get_rank() == 0:
            self._write(record)
        if self.in_a_row > self._limit:
            raise UserError(
                f"the loss or the gradients of {self.in_a_row} steps in a row were not finite (training.max_skipped_steps "
                f"{self._limit}), the last one at step {skipped.step + 1}; {self._path} names their samples; a lower "
                "optimizer.learning_rate or a longer warmup usually helps"
            )

    def _write(self, record: dict[str, Any]) -> None:
        first, end = record["samples"]
        offenders = [f"{batch['samples'][0]} to {batch['samples'][1] - 1}" for batch in record["offending_micro_batches"]]
        where = f"the loss of samples {', '.join(offenders)}" if offenders else f"the gradient of samples {first} to {end - 1}"
        warn(f"step {record['step'] + 1} was skipped: {where} is not finite")
        try:
            with open(self._path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            warn(f"{self._path} cannot be written ({error.strerror})")
