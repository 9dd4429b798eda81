"""Runs a grid: what is done is not done again, what fails is one run less, and every run is a row and an MLflow run."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ext.errors import UserError, warn
from megatron_ext.evaluation.finetune import finetune
from megatron_ext.evaluation.grid_file import GridRun
from megatron_ext.evaluation.pool import Done, run_all
from megatron_ext.evaluation.results import Results

TABLE_EVERY = 60.0
"""Seconds between two writings of the table while the grid runs."""

Executor = Callable[[list[GridRun]], Iterator[Done]]


def execute(runs: list[GridRun], results: Results, executor: Executor, track: Callable[[dict[str, Any]], None]) -> int:
    """Do what is not done yet. Returns how many runs failed.

    Args:
        runs: of the grid.
        results: their folder.
        executor: `on_this_machine` or `on_a_cluster`.
        track: called with the row of every run that ended well, also of those that were done before.
    """
    results.plan(runs)
    left = []
    for run in runs:
        if results.is_done(run):
            track(results.row(run))
        else:
            left.append(run)
    failed, written = 0, time.monotonic()
    with tqdm(total=len(runs), initial=len(runs) - len(left), unit="run", desc="fine-tuning", disable=None) as bar:
        for done in executor(left):
            if done.error is None:
                track(results.add(done.task, done.result))
            else:
                failed += 1
                results.fail(done.task, done.error)
                run = done.task.run
                warn(f"{done.task.model}, {run.task}, learning rate {run.learning_rate:g}, seed {run.seed}: {done.error}")
            bar.update()
            if time.monotonic() - written > TABLE_EVERY:
                results.write_table(runs)
                written = time.monotonic()
    results.write_table(runs)
    return failed


def run_one(run: GridRun) -> Any:
    """In a worker."""
    return finetune(run.run)


def on_this_machine(workers: int) -> Executor:
    """So many processes."""
    return lambda runs: run_all(run_one, runs, workers)


def on_a_cluster(address: str, gpus_per_run: float) -> Executor:
    """Tasks of the Ray cluster at this address; models, data and results are on a file system that all nodes share.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--cluster needs Ray: pip install 'megatron_ext[cluster]'") from None
    try:
        ray.init(address=address, log_to_driver=False)
    except ConnectionError as error:
        raise UserError(f"--cluster {address}: {error}") from None

    def submit(runs: list[GridRun]) -> Iterator[Done]:
        remote = ray.remote(num_cpus=1, num_gpus=gpus_per_run, max_retries=2)(run_one)
        pending = {remote.remote(run): run for run in runs}
        while pending:
            (ready,), _ = ray.wait(list(pending), num_returns=1)
            run = pending.pop(ready)
            try:
                yield Done(run, ray.get(ready))
            except Exception as error:  # Ray's own, for whatever happened to the task or its node
                yield Done(run, error=f"{type(error).__name__}: {str(error).splitlines()[-1] if str(error) else ''}"[:500])

    return submit


def mlflow_tracker(uri: str, name: str, folder: Path) -> Callable[[dict[str, Any]], None]:
    """Makes each row a run below one of the grid's own. MLflow being down costs a warning and no result; it is not asked again.

    Args:
        uri: of the tracking server.
        name: of the grid's run.
        folder: of the grid, which keeps the number of that run.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # workers wait for who hears of their runs
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    try:
        client = MlflowClient(uri)
        parent = _parent_run(client, uri, name, folder)
        told = _keys_below(client, parent)
    except Exception as error:  # whatever a server, a file or a network can say
        warn(f"MLflow at {uri} cannot be used ({type(error).__name__}): the grid goes on without it")
        return lambda row: None

    is_up = True

    def track(row: dict[str, Any]) -> None:
        nonlocal is_up
        if not is_up or row["key"] in told:
            return
        try:
            tags = {"mlflow.parentRunId": parent.info.run_id, "mlflow.runName": f"{row['model']} {row['task']}"}
            run = client.create_run(parent.info.experiment_id, tags=tags)
            now = int(time.time() * 1000)
            figures = ("validation", "test", "train_loss", "seconds", "steps")
            metrics = [Metric(figure, float(row[figure]), now, 0) for figure in figures]
            params = [Param(key, str(value)) for key, value in row.items() if key not in figures]
            client.log_batch(run.info.run_id, metrics=metrics, params=params)
            client.set_terminated(run.info.run_id)
        except Exception as error:
            is_up = False
            warn(f"MLflow at {uri} does not take runs any more ({type(error).__name__}): the next call of this grid sends the rest")

    return track


def _keys_below(client: Any, parent: Any) -> set[str]:
    """Of the runs that the server has."""
    keys, token = set(), None
    while True:
        filters = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and attributes.status = 'FINISHED'"
        found = client.search_runs([parent.info.experiment_id], filters, page_token=token)
        keys |= {run.data.params["key"] for run in found}
        token = found.token
        if not token:
            return keys


def _parent_run(client: Any, uri: str, name: str, folder: Path) -> Any:
    """The grid's own run: the one it had before at this server, if it goes on."""
    from mlflow.exceptions import MlflowException

    note = folder / "mlflow_run.json"
    with contextlib.suppress(OSError, ValueError, KeyError, MlflowException):  # no note, half a note, or a run that was deleted
        before = json.loads(note.read_text())
        if before["uri"] == uri:
            return client.get_run(before["run_id"])
    experiment = client.get_experiment_by_name("fine-tuning")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("fine-tuning")
    parent = client.create_run(experiment_id, tags={"mlflow.runName": name})
    note.write_text(json.dumps({"uri": uri, "run_id": parent.info.run_id}))
    return parent
