"""Where metrics go: a progress bar on the terminal, a JSONL file, and MLflow, behind one interface.

Only rank 0 tracks. `metrics.jsonl` holds every metric; MLflow gets them through a spool and a thread (`mlflow_tracker`). Neither
a full disk nor MLflow stops training or makes it wait.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from megatron_ext.config import RunConfig
from megatron_ext.train.line_file import METRICS_FILE, LineFile
from megatron_ext.train.mlflow_tracker import MlflowTracker, Status


class Tracker(Protocol):
    """Takes metrics of a training run."""

    def log(self, step: int, metrics: dict[str, float], phase: str) -> None:
        """Metrics after `step` completed steps, in the phase with this name."""

    def finish(self, status: Status) -> None:
        """The run is over; nothing is logged after this."""


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: list[Tracker]):
        self._trackers = trackers

    def log(self, step: int, metrics: dict[str, float], phase: str) -> None:
        """Log to all."""
        for tracker in self._trackers:
            tracker.log(step, metrics, phase)

    def finish(self, status: Status) -> None:
        """Finish all."""
        for tracker in self._trackers:
            tracker.finish(status)

    def identity(self) -> dict[str, str | None]:
        """What a checkpoint stores so that the run is continued in MLflow: its id, as far as known, and its own key."""
        for tracker in self._trackers:
            if isinstance(tracker, MlflowTracker):
                return {"mlflow_run_id": tracker.run_id, "run_key": tracker.run_key}
        return {"mlflow_run_id": None, "run_key": None}


def build_trackers(config: RunConfig, total_steps: int, record: dict[str, Any] | None, is_first_rank: bool) -> Trackers:
    """The trackers of this process: none unless it is rank 0.

    Args:
        config: the run's configuration.
        total_steps: steps of the plan.
        record: `run.json` of the checkpoint that the run continues from.
        is_first_rank: this is rank 0.
    """
    if not is_first_rank:
        return Trackers([])
    first_step = record["step"] if record else 0
    mlflow = [MlflowTracker(config, record)] if config.tracking.mlflow else []
    return Trackers([ConsoleTracker(first_step, total_steps), JsonlTracker(Path(config.output_dir), first_step), *mlflow])


class ConsoleTracker:
    """A progress bar; where there is no terminal, a line for each reading."""

    SHOWN = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "mfu", "validation_mlm_loss")

    def __init__(self, first_step: int, total_steps: int):
        from tqdm import tqdm

        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=None)
        self._total = total_steps

    def log(self, step: int, metrics: dict[str, float], phase: str) -> None:
        """Show the main metrics."""
        shown = {name: f"{metrics[name]:.4g}" for name in self.SHOWN if name in metrics}
        if not shown:
            return
        with contextlib.suppress(OSError):  # a log file on a full disk
            self._show(step, shown, phase)

    def _show(self, step: int, shown: dict[str, str], phase: str) -> None:
        if self._bar.disable:
            line = f"step {step}/{self._total} {phase} " + " ".join(f"{name} {value}" for name, value in shown.items())
            print(line, file=sys.stderr, flush=True)
            return
        self._bar.set_description(phase)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def finish(self, status: Status) -> None:
        """Close the bar."""
        with contextlib.suppress(OSError):
            self._bar.close()


class JsonlTracker:
    """`metrics.jsonl`: one JSON object a line with step, phase, time and metrics. `line_file.read_metrics` reads it."""

    def __init__(self, output_dir: Path, first_step: int):
        """
        Args:
            output_dir: the run's folder.
            first_step: the step that the run goes on from; a file that has lines already says so in its next one.
        """
        path = output_dir / METRICS_FILE
        self._mark = {"resumed_from": first_step} if path.is_file() and path.stat().st_size else {}
        self._lines = LineFile(path)

    def log(self, step: int, metrics: dict[str, float], phase: str) -> None:
        """Append a line."""
        self._lines.append(json.dumps({"step": step, "phase": phase, "time": time.time(), **self._mark, **metrics}))
        self._mark = {}

    def finish(self, status: Status) -> None:
        """Close the file."""
        self._lines.close()
