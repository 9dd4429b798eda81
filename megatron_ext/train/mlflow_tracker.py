"""MLflow as a tracker: what it is to be told goes to the spool at once, and from there to the server on a thread."""

import shlex
import threading
import uuid
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_ext.config import RunConfig
from megatron_ext.errors import say, warn
from megatron_ext.secrets import has_user_info, redact
from megatron_ext.train.mlflow_delivery import Delivery, reason_of
from megatron_ext.train.spool import Spool
from megatron_ext.tree import flatten

Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]
"""MLflow's words. SCHEDULED: the run stopped where it was told to and is to be continued."""

SECONDS_TO_FINISH = 30.0
"""How long the end of a run waits at most for MLflow to take what is left."""

ATTEMPTS_TO_FINISH = 3
"""It waits no longer than for this many failures in a row: a server that is gone does not come back within seconds."""

SECONDS_TO_COLLECT = 1.0
"""Readings of this time go in one request, so that MLflow's work takes little time from training."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before another attempt after the first failure; doubled with each in a row, up to the longest."""


def pause_after(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures - 1, 10))


def replay_command(output_dir: Path) -> str:
    """The command line that delivers what is left in a spool."""
    return f"python tools/replay_metrics.py {shlex.quote(str(output_dir))}"


class MlflowTracker:
    """An MLflow run. Nothing here waits for the server but `finish`, and that not for long."""

    def __init__(self, config: RunConfig, record: dict[str, Any] | None = None):
        """
        Args:
            config: the run's configuration.
            record: `run.json` of the checkpoint that the run continues from.
        """
        record = record or {"step": 0, "mlflow_run_id": None, "run_key": None, "parent": None}
        self._output_dir = Path(config.output_dir)
        self._uri = config.tracking.uri
        self._spool = Spool(self._output_dir)
        self._delivery = Delivery(self._spool, self._uri, self._output_dir)
        self._first_id = record["mlflow_run_id"]
        self.run_key: str = self._start(config, record)
        """The key that the run gave itself; kept through resumes."""
        self._phase = ""
        self._failures = 0
        self._warned = False
        self._something_new = threading.Event()
        self._ending = threading.Event()
        self._given_up = threading.Event()
        if self._uri and self._uri.startswith("http") and has_user_info(self._uri):
            warn(
                f"tracking.uri {self._uri} holds credentials, which other users of this machine may see in the list of "
                "processes: give the address alone, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The run's id, once the server has given it."""
        return self._delivery.progress.runs.get(self.run_key, self._first_id)

    def log(self, step: int, metrics: dict[str, float], phase: str) -> None:
        """Put metrics in the spool, and the phase as a tag when it changes."""
        if phase != self._phase:
            self._phase = phase
            self._spool.append("tags", tags={"phase": phase})
        self._spool.append("metrics", step=step, metrics=metrics)
        self._something_new.set()

    def finish(self, status: Status) -> None:
        """Put the status in the spool, give MLflow a while to take what is left, and say what it has not."""
        self._spool.append("status", status=status)
        self._spool.close_file()
        self._ending.set()
        self._something_new.set()
        self._thread.join(timeout=SECONDS_TO_FINISH)
        self._given_up.set()
        left = self._spool.count(self._delivery.progress.offset)
        if left:
            say(
                f"MLflow has not taken {left} record(s), which stay in {self._spool.path}; once the server is well, deliver them "
                f"with: {replay_command(self._output_dir)}"
            )

    def _start(self, config: RunConfig, record: dict[str, Any]) -> str:
        """Put the run's start in the spool; returns its key."""
        tree = config.public_dict()
        parameters = {name: str(value) for name, value in flatten(tree).items()} | {"precision": config.precision.label}
        starts = [start for _, start in self._spool.starts()]
        key = record["run_key"] or self._key_of_same_run(config, starts[-1:], parameters) or uuid.uuid4().hex
        fields = {
            "step": record["step"],
            "run_key": key,
            "run_id": record["mlflow_run_id"],
            "uri": self._uri,
            "experiment": config.tracking.experiment,
            "run_name": config.tracking.run_name or self._output_dir.name,
            "tags": {f"parent_{name}": str(value) for name, value in (record["parent"] or {}).items()},
            "parameters": parameters,
        }
        self._spool.append("start", **redact(fields))
        if all(start["run_key"] != key for start in starts):
            text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
            self._spool.append("artifact", file="config.yaml", text=text)
        return key

    def _key_of_same_run(self, config: RunConfig, last: list[dict[str, Any]], parameters: dict[str, str]) -> str | None:
        """The key of the run that was killed before its first checkpoint, if this process is to continue it (`resume: auto`)."""
        is_same = config.resume == "auto" and last and {**last[0]["parameters"], "resume": ""} == {**parameters, "resume": ""}
        return last[0]["run_key"] if is_same else None

    def _work(self) -> None:
        while not self._given_up.is_set() and self._step():
            pass

    def _step(self) -> bool:
        """Deliver a batch or wait for one; False at the end."""
        is_ending = self._ending.is_set()  # asked first: whatever was put in the spool before it is seen below
        self._something_new.clear()
        try:
            is_more = self._delivery.deliver_next()
        except Exception as error:  # whatever MLflow raises must not reach training
            self._failures += 1
            self._warn(error)
            if is_ending and self._failures >= ATTEMPTS_TO_FINISH:
                return False
            self._pause(pause_after(self._failures))
            return True
        self._failures = 0
        if not is_more and not is_ending:
            self._something_new.wait()
            self._pause(SECONDS_TO_COLLECT)
        return is_more or not is_ending

    def _pause(self, seconds: float) -> None:
        """Wait; the run's end cuts the wait short, once."""
        (self._given_up if self._ending.is_set() else self._ending).wait(seconds)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            warn(f"MLflow at {self._delivery.uri} failed ({reason_of(error)}); training goes on, and what is not sent is kept")
            self._warned = True
