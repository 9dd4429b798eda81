"""Where metrics go: a progress bar on the terminal, a JSONL file, and MLflow, behind one interface.

Only rank 0 tracks. MLflow runs on a thread of its own: what it cannot take is dropped there with one warning, and stays in the
JSONL file, which holds every metric.
"""

import json
import logging
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_ext.config import RunConfig

Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]
"""MLflow's words. SCHEDULED: the run stopped where it was told to and is to be continued."""

RUN_ID_TIMEOUT = 60.0
PARAMETERS_PER_BATCH = 100
PARAMETER_LENGTH = 6000


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

    @property
    def mlflow_run_id(self) -> str | None:
        """Id of the MLflow run, if there is one."""
        return next((tracker.run_id for tracker in self._trackers if isinstance(tracker, MlflowTracker)), None)


def build_trackers(config: RunConfig, first_step: int, total_steps: int, run_id: str | None, is_first_rank: bool) -> Trackers:
    """The trackers of this process: none unless it is rank 0.

    Args:
        config: the run's configuration.
        first_step: completed steps so far.
        total_steps: steps of the plan.
        run_id: MLflow run to continue.
        is_first_rank: this is rank 0.
    """
    if not is_first_rank:
        return Trackers([])
    trackers: list[Tracker] = [ConsoleTracker(first_step, total_steps), JsonlTracker(Path(config.output_dir) / "metrics.jsonl")]
    if config.tracking.mlflow:
        trackers.append(MlflowTracker(config, run_id))
    return Trackers(trackers)


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
        if self._bar.disable:
            print(
                f"step {step}/{self._total} {phase} " + " ".join(f"{k} {v}" for k, v in shown.items()), file=sys.stderr, flush=True
            )
            return
        self._bar.set_description(phase)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def finish(self, status: Status) -> None:
        """Close the bar."""
        self._bar.close()


class JsonlTracker:
    """One JSON object a line: step, phase, time, metrics."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a")  # noqa: SIM115 - closed by finish

    def log(self, step: int, metrics: dict[str, float], phase: str) -> None:
        """Append a line."""
        self._file.write(json.dumps({"step": step, "phase": phase, "time": time.time(), **metrics}) + "\n")
        self._file.flush()

    def finish(self, status: Status) -> None:
        """Close the file."""
        self._file.close()


class MlflowTracker:
    """An MLflow run, written by a thread so that a slow or absent server never holds training up."""

    def __init__(self, config: RunConfig, run_id: str | None):
        """
        Args:
            config: the run's configuration.
            run_id: the run to continue; None creates one.
        """
        self._config = config
        self._run_id = run_id
        self._ready = threading.Event()
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue()
        self._phase = ""
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The run's id; waits for the server that gives it, though not for ever."""
        self._ready.wait(RUN_ID_TIMEOUT)
        return self._run_id

    def log(self, step: int, metrics: dict[str, float], phase: str) -> None:
        """Queue metrics, and the phase as a tag when it changes."""
        now = int(time.time() * 1000)
        self._queue.put(("metrics", (step, dict(metrics), now)))
        if phase != self._phase:
            self._phase = phase
            self._queue.put(("tag", ("phase", phase)))

    def finish(self, status: Status) -> None:
        """Write what is queued, then the status."""
        self._queue.put(("status", (status,)))
        self._queue.put(None)
        self._thread.join(timeout=RUN_ID_TIMEOUT)

    def _work(self) -> None:
        try:
            client = self._open()
        except Exception as error:  # whatever MLflow raises must not reach training
            self._warn(error)
            client = None
        self._ready.set()
        while (item := self._queue.get()) is not None:
            if client is None:
                continue
            try:
                self._write(client, *item)
            except Exception as error:  # see above
                self._warn(error)

    def _open(self) -> Any:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # An absent server is found out in seconds instead of minutes: the metrics are in the JSONL file in any case.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow.tracking import MlflowClient

        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=tracking_uri(self._config))
        if self._run_id is None:
            self._run_id = self._create_run(client)
        client.update_run(self._run_id, status="RUNNING")
        return client

    def _create_run(self, client: Any) -> str:
        tracking = self._config.tracking
        experiment = client.get_experiment_by_name(tracking.experiment)
        if experiment is None:
            location = None if tracking.uri else (Path(self._config.output_dir) / "mlflow_artifacts").resolve().as_uri()
            experiment_id = client.create_experiment(tracking.experiment, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        name = tracking.run_name or Path(self._config.output_dir).name
        run_id = client.create_run(experiment_id, run_name=name).info.run_id
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:PARAMETER_LENGTH]) for key, value in flatten(self._config.as_dict()).items()]
        for start in range(0, len(flat), PARAMETERS_PER_BATCH):
            client.log_batch(run_id, params=flat[start : start + PARAMETERS_PER_BATCH])
        client.log_dict(run_id, self._config.as_dict(), "config.yaml")
        return run_id

    def _write(self, client: Any, kind: str, arguments: tuple[Any, ...]) -> None:
        if kind == "metrics":
            from mlflow.entities import Metric

            step, metrics, now = arguments
            client.log_batch(self._run_id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])
        elif kind == "tag":
            client.set_tag(self._run_id, *arguments)
        else:
            client.set_terminated(self._run_id, status=arguments[0])

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            print(
                f"warning: MLflow at {tracking_uri(self._config)} failed ({error}); metrics go on to metrics.jsonl", file=sys.stderr
            )
            self._warned = True


def tracking_uri(config: RunConfig) -> str:
    """The configured server, or an SQLite file in the output folder."""
    return config.tracking.uri or f"sqlite:///{(Path(config.output_dir) / 'mlflow.db').resolve()}"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; lists are numbered."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
