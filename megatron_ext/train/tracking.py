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
import uuid
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_ext.config import RunConfig

Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]
"""MLflow's words. SCHEDULED: the run stopped where it was told to and is to be continued."""

RUN_KEY_TAG = "megatron_ext.run_key"
"""MLflow tag with the key that a run gives itself: it is found again by it if the server had not yet answered with an id."""

SECONDS_TO_FINISH = 30.0
"""How long the end of a run waits for MLflow to take what is queued."""

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
    record = record or {"step": 0, "mlflow_run_id": None, "run_key": None, "parent": None}
    if not is_first_rank:
        return Trackers([])
    trackers: list[Tracker] = [ConsoleTracker(record["step"], total_steps), JsonlTracker(Path(config.output_dir) / "metrics.jsonl")]
    if config.tracking.mlflow:
        trackers.append(MlflowTracker(config, record["mlflow_run_id"], record["run_key"], record["parent"]))
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

    def __init__(self, config: RunConfig, run_id: str | None, run_key: str | None, parent: dict[str, Any] | None):
        """
        Args:
            config: the run's configuration.
            run_id: the run to continue; None looks for the key, and creates a run if there is none with it.
            run_key: the key of the run to continue; None makes one up.
            parent: the checkpoint of another run that this one branched from, for the lineage tags.
        """
        self._config = config
        self.run_id = run_id
        """The run's id once the server has given it."""
        self.run_key = run_key or uuid.uuid4().hex
        lineage = {f"parent_{name}": str(value) for name, value in (parent or {}).items()}
        self._tags = {RUN_KEY_TAG: self.run_key, **lineage}
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue()
        self._phase = ""
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

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
        self._thread.join(timeout=SECONDS_TO_FINISH)

    def _work(self) -> None:
        try:
            client = self._open()
        except Exception as error:  # whatever MLflow raises must not reach training
            self._warn(error)
            client = None
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
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow.tracking import MlflowClient

        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=tracking_uri(self._config))
        if self.run_id is None or not _run_exists(client, self.run_id):
            self.run_id = self._find_or_create_run(client)
        client.update_run(self.run_id, status="RUNNING")
        return client

    def _find_or_create_run(self, client: Any) -> str:
        tracking = self._config.tracking
        experiment = client.get_experiment_by_name(tracking.experiment)
        if experiment is None:
            location = None if tracking.uri else (Path(self._config.output_dir) / "mlflow_artifacts").resolve().as_uri()
            return self._create_run(client, client.create_experiment(tracking.experiment, artifact_location=location))
        found = client.search_runs([experiment.experiment_id], f"tags.`{RUN_KEY_TAG}` = '{self.run_key}'", max_results=1)
        return found[0].info.run_id if found else self._create_run(client, experiment.experiment_id)

    def _create_run(self, client: Any, experiment_id: str) -> str:
        from mlflow.entities import Param

        name = self._config.tracking.run_name or Path(self._config.output_dir).name
        run_id = client.create_run(experiment_id, tags=self._tags, run_name=name).info.run_id
        flat = [Param(key, str(value)[:PARAMETER_LENGTH]) for key, value in flatten(self._config.as_dict()).items()]
        for start in range(0, len(flat), PARAMETERS_PER_BATCH):
            client.log_batch(run_id, params=flat[start : start + PARAMETERS_PER_BATCH])
        client.log_dict(run_id, self._config.as_dict(), "config.yaml")
        return run_id

    def _write(self, client: Any, kind: str, arguments: tuple[Any, ...]) -> None:
        if kind == "metrics":
            from mlflow.entities import Metric

            step, metrics, now = arguments
            client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])
        elif kind == "tag":
            client.set_tag(self.run_id, *arguments)
        else:
            client.set_terminated(self.run_id, status=arguments[0])

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            print(
                f"warning: MLflow at {tracking_uri(self._config)} failed ({error}); metrics go on to metrics.jsonl", file=sys.stderr
            )
            self._warned = True


def _run_exists(client: Any, run_id: str) -> bool:
    """Whether the server knows the run: a run may go on with another server than it began with."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


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
