"""Outcomes of a grid on disk: a file for each run as it ends, and one Parquet table of all."""

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.evaluation.finetune import Outcome
from megatron_ext.evaluation.grid_file import GridRun
from megatron_ext.evaluation.tasks import find_task

TABLE = "results.parquet"
PLANNED = "planned.json"
"""Key -> model, task, learning rate and seed of every run of the grid, done or not."""


class Results:
    """The folder of a grid."""

    def __init__(self, folder: Path):
        """
        Args:
            folder: made if it is not there.
        """
        self.folder = folder
        for name in ("runs", "items", "failed"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def is_done(self, run: GridRun) -> bool:
        """Whether its outcome is there."""
        return self._file(run).exists()

    def row(self, run: GridRun) -> dict[str, Any]:
        """Of a run that is done."""
        return json.loads(self._file(run).read_text())

    def _file(self, run: GridRun) -> Path:
        return self.folder / "runs" / f"{run.key}.json"

    def add(self, run: GridRun, outcome: Outcome) -> dict[str, Any]:
        """Keep an outcome; the row that the table gets."""
        row = as_row(run, outcome)
        items = self.folder / "items" / f"{run.key}.npy"
        with _aside(items) as aside, open(aside, "wb") as file:
            np.save(file, outcome.test_items)
        with _aside(self._file(run)) as aside:
            aside.write_text(json.dumps(row))
        (self.folder / "failed" / f"{run.key}.json").unlink(missing_ok=True)
        return row

    def fail(self, run: GridRun, error: str) -> None:
        """Keep why there is none. The next call tries again."""
        (self.folder / "failed" / f"{run.key}.json").write_text(json.dumps({**_inputs(run), "error": error}))

    def plan(self, runs: list[GridRun]) -> None:
        """Note which runs there are to be: a report tells those that have no row."""
        planned = {run.key: [run.model, run.run.task, run.run.learning_rate, run.run.seed] for run in runs}
        with _aside(self.folder / PLANNED) as aside:
            aside.write_text(json.dumps(planned))

    def write_table(self, runs: list[GridRun]) -> Path:
        """One row for each run that has an outcome, in the grid's order."""
        import pyarrow
        import pyarrow.parquet

        rows = [self.row(run) for run in runs if self.is_done(run)]
        with _aside(self.folder / TABLE) as aside:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), aside)
        return self.folder / TABLE


def _inputs(run: GridRun) -> dict[str, Any]:
    task = find_task(run.run.task)
    settings = {name: value for name, value in asdict(run.run.settings).items() if name != "packages"}
    return {
        "key": run.key,
        "model": run.model,
        "folder": run.run.model,
        "family": task.family,
        "task": task.name,
        "metric": task.metric,
        "learning_rate": run.run.learning_rate,
        "seed": run.run.seed,
        **settings,
    }


def as_row(run: GridRun, outcome: Outcome) -> dict[str, Any]:
    """Of the table."""
    return {**_inputs(run), **outcome.figures()}


@contextlib.contextmanager
def _aside(path: Path) -> Any:
    """Context with a path to write to; what was written takes its place at the end."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    yield aside
    os.replace(aside, path)
