"""Delivers a spool to MLflow, in order, many readings in one request.

Delivery is at least once, and its effect is exact: a reading is stored with its own time, and MLflow's databases keep one of
equal (name, step, time, value). The file store keeps both, so before anything is repeated there it is asked what it has. (A
server that uses a file store cannot be told from one with a database; there a crash may leave repeats of one batch.)

A step that ran twice, because a run was killed and continued from an earlier checkpoint, counts as it ran last, as in
`metrics.jsonl`. What had not been delivered of the first attempt never is; what had been stays, for MLflow deletes no reading.
A value that the server has already is then not sent again, so MLflow's history gets a second point, with the later time, only
where a value differs: speed, mostly. What it has is asked, not remembered: a reading before the acknowledged place may have been
left out because the step was to be run again, and that attempt may have been killed in its turn.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.errors import warn
from megatron_ext.secrets import redact
from megatron_ext.train.spool import Spool, Starts

RUN_KEY_TAG = "megatron_ext.run_key"
"""MLflow tag with the key that a run gives itself: it is found again by it if the server had not yet answered with an id."""

ITEMS_PER_BATCH = 1000
PARAMETERS_PER_BATCH = 100
PARAMETER_LENGTH = 6000
ARTIFACT_ATTEMPTS = 3
"""An artifact store may be broken for good while the server is well; its file then holds nothing else up."""

REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")
"""Error codes that another attempt would only meet again."""

Refused = list[tuple[dict[str, Any], str]]
"""Records, each with the reason why the server does not take it."""


def tracking_uri(uri: str | None, output_dir: Path) -> str:
    """The configured server, or an SQLite file in the output folder."""
    return uri or f"sqlite:///{(output_dir / 'mlflow.db').resolve()}"


def reason_of(error: Exception) -> str:
    """An exception's message in one line of at most 300 characters: what was tried stands first, and the cause last."""
    text = " ".join(redact(str(error)).split())  # before it is cut: a half secret would not be known as one
    return text if len(text) <= 300 else f"{text[:140]} ... {text[-155:]}"


class Delivery:
    """Takes a spool to one server; used by one thread."""

    def __init__(self, spool: Spool, uri: str | None, output_dir: Path):
        """
        Args:
            spool: what is to be delivered.
            uri: the tracking server with its credentials, if it has any; None is an SQLite file in `output_dir`.
            output_dir: the run's folder.
        """
        self.spool = spool
        self.uri = tracking_uri(uri, output_dir)
        self.progress = spool.read_delivered(self.uri)
        self.records_delivered = 0
        self.items_refused = 0
        self._artifact_folder = None if uri else (output_dir / "mlflow_artifacts").resolve().as_uri()
        self._keeps_repeats = uri is not None and (uri.startswith("file:") or "://" not in uri)
        self._may_repeat_until = 0
        self._client: Any = None
        self._artifact_failures = 0
        self._checked_runs: set[str] = set()
        self._starts = Starts([])
        self._run_again_until: dict[str, int] = {}
        self._stored: dict[tuple[str, str], dict[int, float]] = {}

    def deliver_next(self) -> bool:
        """Deliver some records in one go; False if there are none.

        Raises:
            Exception: whatever MLflow raises when it cannot be reached or is not well: nothing is lost, try again later.
        """
        if self._client is None:
            self._connect()
        batch = self._next_batch()
        if not batch:
            return False
        try:
            refused = self._deliver(batch)
        except _StartOver:
            return True
        except Exception as error:
            self._may_repeat_until = batch[-1][1]
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                self._checked_runs.clear()
            raise
        self.records_delivered += len(batch)
        if refused:
            self.spool.set_aside(refused)
            if not self.items_refused:
                warn(f"MLflow refused {len(refused)} item(s) for good ({refused[0][1]}); they are kept beside {self.spool.path}")
            self.items_refused += len(refused)
        self.progress.offset = batch[-1][1]
        self.spool.write_delivered(self.progress)
        return True

    def _connect(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # with the credentials in it
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # repeated here, with longer pauses
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        from mlflow.tracking import MlflowClient

        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=self.uri)
        self._read_reruns()
        self._may_repeat_until = self.spool.size()  # an earlier process may have delivered more than it could write down
        self._client = client

    def _read_reruns(self) -> None:
        """Find the starts, and up to which step a run may be known to the server although a later start runs it again."""
        self._starts = Starts(self.spool.starts())
        self._run_again_until, self._stored = {}, {}
        if len(self._starts.found) < 2:
            return
        for offset, _, record in self.spool.records(0):
            if offset >= self.progress.offset:
                break
            if record["kind"] == "metrics" and self._starts.supersede(offset, record["step"]):
                key = self._starts.before(offset)["run_key"]
                self._run_again_until[key] = max(self._run_again_until.get(key, 0), record["step"])

    def _next_batch(self) -> list[tuple[int, int, dict[str, Any]]]:
        """One record, or as many readings and tags as go in one request."""
        batch: list[tuple[int, int, dict[str, Any]]] = []
        items = 0
        for offset, end, record in self.spool.records(self.progress.offset):
            items += len(record.get("metrics") or record.get("tags") or ())
            joins = record["kind"] in ("metrics", "tags")
            if batch and (not joins or items > ITEMS_PER_BATCH):
                break
            batch.append((offset, end, record))
            if not joins:
                break
        return batch

    def _deliver(self, batch: list[tuple[int, int, dict[str, Any]]]) -> Refused:
        offset, _, record = batch[0]
        kind = record["kind"]
        if kind == "start":
            self._starts.add(offset, record)
        start = self._starts.before(offset)
        if kind == "damaged" or start is None:
            return [(item, "it is damaged, or no start stands before it") for _, _, item in batch]
        run_id = self._run_id(start)
        if kind == "start":
            return self._tell_start(run_id, record)
        if kind == "artifact":
            return self._tell_artifact(run_id, record)
        if kind == "status":
            return self._tell_status(run_id, record)
        return self._tell_readings(run_id, start["run_key"], batch)

    def _tell_start(self, run_id: str, start: dict[str, Any]) -> Refused:
        from mlflow.entities import Param

        known = self._client.get_run(run_id).data.params  # they cannot be changed
        items = [Param(name, value[:PARAMETER_LENGTH]) for name, value in start["parameters"].items() if name not in known]
        refused: Refused = []
        for first in range(0, len(items), PARAMETERS_PER_BATCH):
            refused += self._log(run_id, items[first : first + PARAMETERS_PER_BATCH])
        return refused + self._tell_status(run_id, {"kind": "status", "status": "RUNNING", "time": start["time"]})

    def _tell_artifact(self, run_id: str, record: dict[str, Any]) -> Refused:
        try:
            self._client.log_text(run_id, record["text"], record["file"])
        except Exception as error:  # the artifact store's own
            self._client.get_run(run_id)  # raises if it is the server that is not well
            self._artifact_failures += 1
            if self._artifact_failures < ARTIFACT_ATTEMPTS:
                raise
            return [(record, reason_of(error))]
        return []

    def _tell_status(self, run_id: str, record: dict[str, Any]) -> Refused:
        from mlflow.exceptions import MlflowException

        try:
            if record["status"] == "RUNNING":
                self._client.update_run(run_id, status="RUNNING")
            else:
                self._client.set_terminated(run_id, status=record["status"], end_time=record["time"])
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            return [(record, reason_of(error))]
        return []

    def _tell_readings(self, run_id: str, key: str, batch: list[tuple[int, int, dict[str, Any]]]) -> Refused:
        from mlflow.entities import Metric, RunTag

        tags: dict[str, str] = {}
        metrics: list[Any] = []
        refused: Refused = []
        for offset, _, record in batch:
            tags.update(record.get("tags", {}))
            if record["kind"] == "tags" or self._starts.supersede(offset, record["step"]):
                continue
            for name, value in record["metrics"].items():
                may_be_there = record["step"] <= self._run_again_until.get(key, -1)
                if may_be_there and _equal(self._last_value(run_id, name, record["step"]), value):
                    continue
                if isinstance(value, int | float):
                    metrics.append(Metric(name, float(value), record["time"], record["step"]))
                else:
                    refused.append(({**record, "metrics": {name: value}}, "it is not a number"))
        if self._keeps_repeats and batch[0][0] < self._may_repeat_until:
            metrics = self._not_stored_yet(run_id, metrics)
        items = [*metrics, *(RunTag(name, value) for name, value in tags.items())]
        for first in range(0, len(items), ITEMS_PER_BATCH):
            refused += self._log(run_id, items[first : first + ITEMS_PER_BATCH])
        return refused

    def _last_value(self, run_id: str, name: str, step: int) -> float | None:
        """What the server had of a metric at a step when it was first asked; the reading of the latest time."""
        if (run_id, name) not in self._stored:
            found = sorted(self._client.get_metric_history(run_id, name), key=lambda metric: metric.timestamp)
            self._stored[run_id, name] = {metric.step: metric.value for metric in found}
        return self._stored[run_id, name].get(step)

    def _not_stored_yet(self, run_id: str, metrics: list[Any]) -> list[Any]:
        stored = {
            (found.key, found.step, found.timestamp, repr(found.value))
            for name in {metric.key for metric in metrics}
            for found in self._client.get_metric_history(run_id, name)
        }
        return [item for item in metrics if (item.key, item.step, item.timestamp, repr(item.value)) not in stored]

    def _log(self, run_id: str, items: Sequence[Any]) -> Refused:
        """Log metrics, parameters and tags; a refused batch is taken apart until only what is really refused is left."""
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        if not items:
            return []
        of_kind = {kind: [item for item in items if isinstance(item, kind)] for kind in (Metric, Param, RunTag)}
        try:
            self._client.log_batch(run_id, metrics=of_kind[Metric], params=of_kind[Param], tags=of_kind[RunTag])
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            is_deleted = self._client.get_run(run_id).info.lifecycle_stage == "deleted"
            if len(items) == 1 or is_deleted:
                return [(_record_of(item), reason_of(error)) for item in items]
            half = len(items) // 2
            return self._log(run_id, items[:half]) + self._log(run_id, items[half:])
        return []

    def _run_id(self, start: dict[str, Any]) -> str:
        """The server's run for a start: the one it was known by, the one with its key, or a new one.

        A run may go on with another server than it began with, or with an emptied one: a new run is told everything from its
        beginning.
        """
        key = start["run_key"]
        if key in self._checked_runs:
            return self.progress.runs[key]
        known = [run_id for run_id in (self.progress.runs.get(key), start["run_id"]) if run_id]
        run_id = next((run_id for run_id in known if self._exists(run_id)), None) or self._find_or_create_run(start)
        self.progress.runs[key] = run_id
        self._checked_runs.add(key)
        self.spool.write_delivered(self.progress)
        return run_id

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    def _find_or_create_run(self, start: dict[str, Any]) -> str:
        experiment = self._client.get_experiment_by_name(start["experiment"])
        if experiment is None:
            experiment_id = self._client.create_experiment(start["experiment"], artifact_location=self._artifact_folder)
        else:
            experiment_id = experiment.experiment_id
            found = self._client.search_runs([experiment_id], f"tags.`{RUN_KEY_TAG}` = '{start['run_key']}'", max_results=1)
            if found:
                return found[0].info.run_id
        beginning = self._starts.beginning_of(start["run_key"])
        if beginning < self.progress.offset:
            # Stored before the run is made: whatever interrupts this, the run is told everything.
            self.progress.offset = beginning
            self.progress.runs.pop(start["run_key"], None)
            self.spool.write_delivered(self.progress)
            self._read_reruns()
            raise _StartOver
        tags = {RUN_KEY_TAG: start["run_key"], **start["tags"]}
        return self._client.create_run(experiment_id, start["time"], tags, start["run_name"]).info.run_id


class _StartOver(Exception):
    """The server knows nothing of the run: delivery goes on from the run's beginning."""


def _equal(one: Any, other: Any) -> bool:
    return one == other or (one != one and other != other)


def _record_of(item: Any) -> dict[str, Any]:
    """An MLflow entity as a record of the spool."""
    kind = type(item).__name__
    if kind == "Metric":
        return {"kind": "metrics", "time": item.timestamp, "step": item.step, "metrics": {item.key: item.value}}
    return {"kind": {"RunTag": "tags", "Param": "parameters"}[kind], item.key: item.value}
