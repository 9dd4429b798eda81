"""What a grid's file says: models, tasks, learning rates and seeds as data; and the runs that it stands for."""

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.config_tree import build
from megatron_ext.config_yaml import read_file
from megatron_ext.errors import UserError
from megatron_ext.evaluation.finetune import FinetuneRun
from megatron_ext.evaluation.tasks import find_task
from megatron_ext.evaluation.training import Settings

ALGORITHM = 2
"""Counts up when fine-tuning comes to do something else with the same settings: what was run before is then run again."""
COUNTS = ("max_steps", "max_passes", "batch_size", "max_rows", "max_test_rows")
"""Settings that a task may have of its own."""
PAPER_RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4]


@dataclass(kw_only=True)
class Grid:
    """Every model on every task at every learning rate with every seed."""

    tasks: list[str]
    models: dict[str, str] = field(default_factory=dict)
    """Name -> folder."""
    models_dir: str | None = None
    """Folder whose folders are models as well, under their own names: a study's `models`."""
    learning_rates: list[float] = field(default_factory=lambda: list(PAPER_RATES))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    data: dict[str, str] = field(default_factory=dict)
    """Task -> own copy of its data."""
    max_steps: int = 1000
    max_passes: int = 1
    """Over the training rows; `max_steps` ends a run before."""
    batch_size: int = 32
    attention: str = "bidirectional"
    max_rows: int | None = None
    """Training rows of a task, the first so many; null: all."""
    max_test_rows: int | None = None
    """Validation and test rows, the first so many."""
    precision: str | None = None
    """Of products: fp32, or bf16; null: bf16 on a GPU, fp32 on a CPU."""
    packages: str = "build/data"
    """Where `tools/fetch_demo_data.py` puts its sets."""
    for_task: dict[str, dict[str, int]] = field(default_factory=dict)
    """Task -> what it has of its own: max_steps, max_passes, batch_size, max_rows or max_test_rows."""

    def __post_init__(self) -> None:
        for name in ("tasks", "learning_rates", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} is {values}: it needs one value at least, and each once")
        for task in (*self.tasks, *self.data, *self.for_task):
            find_task(task)
        if not self.models and self.models_dir is None:
            raise UserError("there are no models: give models, or models_dir")
        if self.attention not in ("bidirectional", "causal"):
            raise UserError(f"attention is {self.attention}: allowed are bidirectional and causal")
        if self.precision not in (None, "fp32", "bf16"):
            raise UserError(f"precision is {self.precision}: allowed are fp32 and bf16")
        for where, values in {"": {name: getattr(self, name) for name in COUNTS}, **self.for_task}.items():
            for name, value in values.items():
                place = f"for_task.{where}.{name}" if where else name
                if name not in COUNTS:
                    raise UserError(f"{place}: allowed are {', '.join(COUNTS)}")
                if value is not None and value < 1:
                    raise UserError(f"{place} is {value}: it must be at least 1")
        if others := [task for task in self.for_task if task not in self.tasks]:
            raise UserError(f"for_task has {others[0]}, which is not in tasks")
        if wrong := [seed for seed in self.seeds if not 0 <= seed < 2**32]:
            raise UserError(f"seeds has {wrong[0]}: it must lie between 0 and 2^32 - 1")
        if bad := [rate for rate in self.learning_rates if rate <= 0]:
            raise UserError(f"learning_rates has {bad[0]}: it must be greater than 0")


@dataclass(frozen=True)
class GridRun:
    """One run of a grid."""

    model: str
    """Its name."""
    run: FinetuneRun
    key: str
    """Of everything that its outcome depends on: the name of its files."""


def read_grid(path: str) -> Grid:
    """Read a grid's file.

    Raises:
        UserError: it is missing, or says something that is not allowed; the line is named.
    """
    return build(Grid, read_file(path, path))


def grid_runs(grid: Grid) -> list[GridRun]:
    """All of them; those of one model and task follow each other.

    Raises:
        UserError: a model's folder is not there.
    """
    runs = []
    for name, folder in _models(grid).items():
        print_of_model = _print_of_model(name, folder)
        for task, rate, seed in itertools.product(grid.tasks, grid.learning_rates, grid.seeds):
            run = FinetuneRun(
                model=str(folder),
                task=task,
                learning_rate=rate,
                seed=seed,
                data=grid.data.get(task),
                source_data=grid.data.get(find_task(task).trained_on or ""),
                settings=_settings(grid, task),
            )
            told = {
                "algorithm": ALGORITHM,
                **asdict(run),
                "name": name,
                "model": print_of_model,
                **_about_task(grid, task),
                "settings": {**asdict(run.settings), "packages": ""},
            }
            key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
            runs.append(GridRun(name, run, key))
    return runs


def _settings(grid: Grid, task: str) -> Settings:
    counts = {name: getattr(grid, name) for name in COUNTS} | grid.for_task.get(task, {})
    chosen: dict[str, Any] = {name: getattr(grid, name) for name in ("attention", "precision", "packages")}
    return Settings(**counts, **chosen)


def _about_task(grid: Grid, task: str) -> dict[str, Any]:
    """What else a run's outcome depends on: the data's files, by size and time, and how long an example may be."""
    found = find_task(task)
    places = [grid.data.get(name) for name in (task, found.trained_on) if name]
    places = [place for place in places if place] or ([f"{grid.packages}/{task}.jsonl"] if found.hub is None else [])
    files = [file for place in map(Path, places) for file in (sorted(place.iterdir()) if place.is_dir() else [place])]
    return {"max_length": found.max_length, "files": [_print_of_file(file) for file in files if file.is_file()]}


def _print_of_file(file: Path) -> list[Any]:
    return [file.name, file.stat().st_size, file.stat().st_mtime_ns]


def _models(grid: Grid) -> dict[str, Path]:
    found = {name: Path(folder) for name, folder in grid.models.items()}
    if grid.models_dir is not None:
        folder = Path(grid.models_dir)
        if not folder.is_dir():
            raise UserError(f"models_dir {folder}: there is no such folder")
        found = {path.name: path for path in sorted(folder.iterdir()) if (path / "config.json").is_file()} | found
    if not found:
        raise UserError(f"models_dir {grid.models_dir} has no folder with a config.json")
    return found


def _print_of_model(name: str, folder: Path) -> list[Any]:
    """What tells a model from another of its name: its files' sizes and times. Weights of gigabytes are not read for it."""
    if not (folder / "config.json").is_file():
        raise UserError(f"model {name}: there is no config.json in {folder}")
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return [_print_of_file(path) for path in files]
