"""Grids of fine-tuning runs on real processes: nothing is done twice, a killed worker costs one run, a killed grid goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

from megatron_ext.errors import UserError
from megatron_ext.evaluation.grid_file import grid_runs, read_grid
from megatron_ext.evaluation.pool import run_all
from megatron_ext.locked_folder import only_one
from tests.unit.test_evaluation import rows_of, write_reviews, write_rows

ROOT = Path(__file__).parents[2]


def act(task: str) -> str:
    """A task that ends as its name says."""
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raise":
        raise ValueError("it was told to")
    return f"{task} done"


def test_a_worker_that_is_killed_costs_its_task_alone() -> None:
    tasks = ["a", "die", "b", "raise", "c", "die", "d"]
    found = list(run_all(act, tasks, 2))
    assert sorted(done.task for done in found) == sorted(tasks)
    assert {done.task: done.result for done in found if done.error is None} == {name: f"{name} done" for name in "abcd"}
    errors = sorted(done.error for done in found if done.error)
    assert errors == [
        "ValueError: it was told to",
        *["its process ended with code -9 (-9: killed, perhaps for want of memory)"] * 2,
    ]


def write_grid(folder: Path, models: dict[str, Path]) -> Path:
    """One task, two learning rates and two seeds: four runs for each model."""
    tree = {
        "models": {name: str(model) for name, model in models.items()},
        "tasks": ["rotten_tomatoes"],
        "data": {"rotten_tomatoes": str(write_reviews(folder))},
        "learning_rates": [1e-2, 1e-4],
        "seeds": [0, 1],
        "batch_size": 8,
    }
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture
def grid(small_encoder: Path, tmp_path: Path) -> Path:
    """Eight runs."""
    return write_grid(tmp_path, {"one": small_encoder, "other": small_encoder})


def command(grid: Path, output_dir: Path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "tools/run_grid.py"),
        str(grid),
        "--output-dir",
        str(output_dir),
        "--workers",
        "2",
        *arguments,
    ]


def table(output_dir: Path) -> Any:
    return pandas.read_parquet(output_dir / "results.parquet")


def test_a_grid_that_is_killed_goes_on_and_ends_as_if_it_had_not_been(grid: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(grid, whole), check=True, capture_output=True, timeout=200)
    process = subprocess.Popen(command(grid, killed, "--mlflow-uri", "none"), stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 100
    while len(list(killed.glob("runs/*.json"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("runs/*.json")}
    assert 2 <= len(kept) < 8
    subprocess.run(command(grid, killed, "--mlflow-uri", "none"), check=True, capture_output=True, timeout=200)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    timeless = [name for name in table(whole).columns if name != "seconds"]
    pandas.testing.assert_frame_equal(table(whole)[timeless], table(killed)[timeless])
    assert len(table(whole)) == 8 and set(table(whole)["model"]) == {"one", "other"}
    _check_mlflow(whole)


def _check_mlflow(output_dir: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output_dir}/mlflow.db")
    parent = json.loads((output_dir / "mlflow_run.json").read_text())["run_id"]
    runs = client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    found = {run.data.params["key"]: run.data.metrics["test"] for run in runs}
    assert found == dict(zip(table(output_dir)["key"], table(output_dir)["test"], strict=True))


def test_one_process_at_a_time_runs_a_grid(grid: Path, tmp_path: Path) -> None:
    with only_one(tmp_path / "out", "grid"):
        done = subprocess.run(command(grid, tmp_path / "out"), capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "another process runs this grid" in done.stderr


@pytest.mark.parametrize("uri", ["sqlite:///{grid}/mlflow.db", "http://127.0.0.1:1"], ids=["a file in a file", "nobody answers"])
def test_a_grid_does_without_mlflow(uri: str, grid: Path, tmp_path: Path) -> None:
    """One that cannot be used costs a warning, and its runs are there for the next call."""
    tree = yaml.safe_load(grid.read_text())
    grid.write_text(yaml.safe_dump({**tree, "seeds": [0], "learning_rates": [1e-2], "max_steps": 1}))
    done = subprocess.run(
        command(grid, tmp_path / "out", "--mlflow-uri", uri.format(grid=grid)),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0 and done.stderr.count("the grid goes on without it") == 1
    assert len(table(tmp_path / "out")) == 2
    if uri.startswith("http"):
        subprocess.run(command(grid, tmp_path / "out"), check=True, capture_output=True, timeout=100)
        _check_mlflow(tmp_path / "out")


def test_data_that_change_are_other_runs(grid: Path, tmp_path: Path) -> None:
    before = {run.key for run in grid_runs(read_grid(str(grid)))}
    data = tmp_path / "reviews.jsonl"
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    assert not before & {run.key for run in grid_runs(read_grid(str(grid)))}


def test_keys_are_those_of_what_a_run_depends_on(grid: Path, tmp_path: Path) -> None:
    keys = [run.key for run in grid_runs(read_grid(str(grid)))]
    assert len(set(keys)) == 8
    tree = yaml.safe_load(grid.read_text())
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({**tree, "seeds": [0, 1, 2, 3]}))
    assert set(keys) < {run.key for run in grid_runs(read_grid(str(tmp_path / "more.yaml")))}
    (tmp_path / "longer.yaml").write_text(yaml.safe_dump({**tree, "max_steps": 5}))
    assert not set(keys) & {run.key for run in grid_runs(read_grid(str(tmp_path / "longer.yaml")))}


def test_a_task_has_settings_of_its_own(grid: Path, tmp_path: Path) -> None:
    """And those of the others, and their keys, stay what they were."""
    tree = {**yaml.safe_load(grid.read_text()), "tasks": ["rotten_tomatoes", "boolq"], "max_steps": 7}
    alike, apart = tmp_path / "alike.yaml", tmp_path / "apart.yaml"
    alike.write_text(yaml.safe_dump(tree))
    apart.write_text(yaml.safe_dump({**tree, "for_task": {"boolq": {"batch_size": 3, "max_passes": 2}}}))
    before, after = (grid_runs(read_grid(str(file))) for file in (alike, apart))
    for one, other in zip(before, after, strict=True):
        own, settings = one.run.task == "boolq", other.run.settings
        assert (settings.batch_size, settings.max_passes, settings.max_steps) == ((3, 2, 7) if own else (8, 1, 7))
        assert (one.key != other.key) is own


def test_four_tasks_from_grid_to_report(small_encoder: Path, tmp_path: Path) -> None:
    """The tools in a row, on every family of tasks."""
    tasks = {"boolq": "sc", "entity_tweets": "tc", "disfl_qa": "qa", "boolq_retrieval": "ir"}
    data = {task: write_rows(tmp_path, task, rows_of(family)) for task, family in tasks.items()}
    settings = {"learning_rates": [3e-3, 1e-3], "seeds": [0, 1], "batch_size": 8}
    tree = {"models": {"one": str(small_encoder), "two": str(small_encoder)}, "tasks": list(tasks), "data": data, **settings}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(tree))
    subprocess.run(command(tmp_path / "grid.yaml", tmp_path / "out", "--mlflow-uri", "none"), check=True, timeout=300)
    report = [sys.executable, str(ROOT / "tools/report_study.py"), "--output-dir", str(tmp_path / "report"), str(tmp_path / "out")]
    subprocess.run(report, check=True, timeout=100)
    tests = pandas.read_csv(tmp_path / "report/tests.csv")
    assert set(tests["task"]) == set(tasks) and len(pandas.read_csv(tmp_path / "report/runs.csv")) == 32
    assert (tmp_path / "report/report.html").stat().st_size > 10_000
    twice = subprocess.run([*report, str(tmp_path / "out")], capture_output=True, text=True, timeout=100)
    assert twice.returncode == 2 and "both have runs of one on boolq: a score is of one grid" in twice.stderr


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": []}, r"seeds is \[\]: it needs one value at least"),
        ({"tasks": ["glue"]}, "the task is 'glue'"),
        ({"models": {}}, "there are no models"),
        ({"models": {"one": "nowhere"}}, "model one: there is no config.json in nowhere"),
        ({"learning_rates": [-1.0]}, "learning_rates has -1.0"),
        ({"attention": "both"}, "attention is both"),
        ({"precision": "fp8"}, "precision is fp8: allowed are fp32 and bf16"),
        ({"for_task": {"glue": {}}}, "the task is 'glue'"),
        ({"for_task": {"boolq": {"max_steps": 1}}}, "for_task has boolq, which is not in tasks"),
        ({"seeds": [-1]}, "seeds has -1: it must lie between 0"),
        ({"for_task": {"rotten_tomatoes": {"seed": 1}}}, "for_task.rotten_tomatoes.seed: allowed are max_steps, "),
        ({"for_task": {"rotten_tomatoes": {"max_steps": 0}}}, "for_task.rotten_tomatoes.max_steps is 0: it must be at least 1"),
        ({"seed": [1]}, "seed is no key that is known"),
    ],
)
def test_bad_grids_are_refused(grid: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(grid.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        grid_runs(read_grid(str(file)))
