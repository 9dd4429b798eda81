"""When a run saves, what a failed save means, and which checkpoints stay."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint_files import complete_checkpoints
from megatron_ext.errors import UserError, warn
from megatron_ext.train.preflight import RunSetup
from megatron_ext.train.retention import KEPT, is_kept, is_saved, remove_old_checkpoints
from megatron_ext.train.saving import CheckpointSaver, Outcome
from megatron_ext.train.tracking import Trackers


@dataclass
class Saves:
    """The saves of a run, in the background if it is configured so. All ranks make the same calls."""

    folder: Path
    setup: RunSetup
    saver: CheckpointSaver
    trackers: Trackers
    mark: Callable[[str], None]
    """Called with what is being done while a save takes its time."""
    failures: int = 0
    """Saves in a row that failed."""

    def is_due(self, step: int) -> bool:
        """Whether to save after `step` completed steps."""
        return is_saved(self.setup.config.checkpoint, self.setup.plan, step)

    @property
    def is_writing(self) -> bool:
        """This rank's writer is at work."""
        return self.saver.is_writing

    def save(self, record: dict[str, Any], is_last: bool) -> None:
        """Save, in the background unless it is the run's last checkpoint.

        Args:
            record: what `run.json` says of the progress.
            is_last: the run ends after it: it must not fail.

        Raises:
            UserError: the last save failed, or too many in a row.
        """
        self.finish()
        kept = is_kept(self.setup.config.checkpoint, self.setup.plan, record["step"])
        outcome = self.saver.start({**record, KEPT: kept})
        if outcome is not None:
            self._take(outcome, is_last)
        elif is_last or not self.setup.config.checkpoint.asynchronous:
            self.finish(is_last)

    def collect(self, writers_at_work: bool) -> None:
        """Publish what the writers of all ranks have finished, without waiting.

        Args:
            writers_at_work: some rank's writer is not done; the same on all ranks.
        """
        if self.can_publish(writers_at_work):
            self.finish()

    def can_publish(self, writers_at_work: bool) -> bool:
        """Whether `collect` would."""
        return self.saver.is_open and not writers_at_work

    def finish(self, is_last: bool = False) -> None:
        """Wait for a save under way, and publish it."""
        if self.saver.is_open:
            self._take(self.saver.finish(60 * self.setup.config.training.timeout_minutes, self.mark), is_last)

    def abandon(self) -> None:
        """The run ends with an error: leave a save under way unfinished."""
        self.saver.abandon()

    def _take(self, outcome: Outcome, is_last: bool) -> None:
        if outcome.problem is None:
            self.failures = 0
            times = {"checkpoint/seconds": outcome.seconds, "checkpoint/stalled_seconds": outcome.stalled}
            self.trackers.log(outcome.step, times, outcome.phase)
            if torch.distributed.get_rank() == 0:
                remove_old_checkpoints(self.folder, self.setup.config.checkpoint, self.setup.plan)
            return
        self.failures += 1
        self.trackers.log(outcome.step, {"checkpoint/failures": self.failures}, outcome.phase)
        existing = complete_checkpoints(self.folder)
        newest = f"the newest checkpoint is {existing[-1]}" if existing else "there is no checkpoint yet"
        word = f"the checkpoint after step {outcome.step} could not be saved ({outcome.problem}): {newest}"
        limit = self.setup.config.checkpoint.max_failures
        if is_last or self.failures > limit:
            raise UserError(word if is_last else f"{word}; {self.failures} saves in a row failed (checkpoint.max_failures {limit})")
        if torch.distributed.get_rank() == 0:
            warn(f"{word}; training goes on")
