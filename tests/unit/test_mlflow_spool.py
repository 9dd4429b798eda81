"""The spool and its delivery, against MLflow's own SQLite and file stores; server processes are in tests/distributed."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from megatron_ext.config import DataConfig, DataSource, PhaseConfig, RunConfig, TrackingConfig
from megatron_ext.errors import UserError
from megatron_ext.train import mlflow_tracker, spool
from megatron_ext.train.replay import replay
from megatron_ext.train.tracking import Trackers, build_trackers
from tests.mlflow_server import history, logged, runs_named

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"
"""The discard port of this machine: nobody listens."""


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def output_dir(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mlflow_tracker, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(mlflow_tracker, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(mlflow_tracker, "SECONDS_TO_COLLECT", 0.01)
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(empty_database, folder)
    return folder


def open_run(output_dir: Path, uri: str | None = None, record: dict[str, Any] | None = None, resume: str = "never") -> Trackers:
    config = RunConfig(
        output_dir=str(output_dir),
        data=DataConfig(tokenizer="t", train=[DataSource(prefix="p")]),
        phases=[PhaseConfig(objective="mlm", steps=100)],
        tracking=TrackingConfig(uri=uri),
        resume=resume,
    )
    return build_trackers(config, 100, record, is_first_rank=True)


def resumed_from(step: int, identity: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's run.json says of it."""
    return {"step": step, "parent": None, **identity}


def log(trackers: Trackers, steps: range, speed: float = 1.0, **more: float) -> None:
    for step in steps:
        trackers.log(step, {"loss": 1 / step, "speed": speed, **more}, "0-mlm")


def only_run(output_dir: Path, uri: str | None = None) -> tuple[MlflowClient, Any]:
    client = MlflowClient(uri or f"sqlite:///{output_dir / 'mlflow.db'}")
    (run,) = runs_named(client, "run")
    return client, run


def points(output_dir: Path, uri: str | None = None) -> dict[tuple[str, int], list[float]]:
    return history(*only_run(output_dir, uri))


def test_what_a_killed_process_had_logged_is_delivered(output_dir: Path) -> None:
    """SIGKILL while the server is away; continued from step 10 with a server: one run, each step once, as it ran last."""
    script = (
        "import sys; from pathlib import Path; from tests.unit.test_mlflow_spool import *\n"
        "run = open_run(Path(sys.argv[1]), NOWHERE)\n"
        "log(run, range(1, 18))\n"
        "print(json.dumps(run.identity()), flush=True)\n"
        "signal.pause()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(output_dir)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    identity = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    run = open_run(output_dir, record=resumed_from(10, identity))
    log(run, range(11, 31), speed=2.0)
    run.finish("FINISHED")
    assert points(output_dir) == logged(output_dir)
    assert sorted({step for _, step in logged(output_dir)}) == list(range(1, 31))
    _, found = only_run(output_dir)
    assert (found.info.status, found.data.params["phases.0.steps"]) == ("FINISHED", "100")


def test_a_step_that_ran_twice_counts_as_it_ran_last(output_dir: Path) -> None:
    """Delivered readings cannot be taken back: what came out equal stays one point, what differs gets a later one."""
    first = open_run(output_dir)
    log(first, range(1, 18), speed=1.0)
    first.finish("KILLED")
    identity = first.identity()
    assert identity["mlflow_run_id"] == only_run(output_dir)[1].info.run_id
    second = open_run(output_dir, record=resumed_from(10, identity))
    log(second, range(11, 21), speed=2.0)
    second.finish("FINISHED")
    found = points(output_dir)
    assert {point: values[-1:] for point, values in found.items()} == logged(output_dir)
    assert [found["loss", step] for step in range(1, 21)] == [[1 / step] for step in range(1, 21)]
    assert [found["speed", step] for step in (10, 11, 17, 18)] == [[1.0], [1.0, 2.0], [1.0, 2.0], [2.0]]


def test_a_step_that_was_left_out_twice_is_delivered_the_third_time(output_dir: Path) -> None:
    """The first attempt reaches no server; the second is killed once its thread has passed over what it is to run again."""
    first = open_run(output_dir, NOWHERE)
    log(first, range(1, 15))
    first.finish("KILLED")
    identity = first.identity()
    second = open_run(output_dir, record=resumed_from(7, identity))
    second.finish("KILLED")
    assert max(step for _, step in points(output_dir)) == 7
    third = open_run(output_dir, record=resumed_from(7, identity))
    log(third, range(8, 21))
    third.finish("FINISHED")
    assert points(output_dir) == logged(output_dir)
    assert {step for _, step in logged(output_dir)} == set(range(1, 21))


@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_a_repeated_delivery_changes_nothing(output_dir: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after a delivery and before its acknowledgement was on disk."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = None if store == "sqlite" else (output_dir / "mlruns").as_uri()
    run = open_run(output_dir, uri)
    log(run, range(1, 6), odd=float("nan"), huge=float("inf"))
    run.finish("FINISHED")
    before = points(output_dir, uri)
    assert len(before) == 20 and all(len(values) == 1 for values in before.values())
    (output_dir / spool.DELIVERED_FILE).unlink()
    result = replay(output_dir)
    assert (result.delivered, result.refused, result.left) == (9, 0, 0)
    assert str(points(output_dir, uri)) == str(before)  # NaN equals itself here
    assert str(before["odd", 3]) == "[nan]" and before["huge", 3][0] > 1e308


def test_a_new_server_is_told_the_whole_run(output_dir: Path, empty_database: Path) -> None:
    first = open_run(output_dir)
    log(first, range(1, 6))
    first.finish("SCHEDULED")
    shutil.copy(empty_database, output_dir / "other.db")
    other = f"sqlite:///{output_dir / 'other.db'}"
    second = open_run(output_dir, other, resumed_from(5, first.identity()))
    log(second, range(6, 9))
    second.finish("FINISHED")
    assert points(output_dir, other) == logged(output_dir)
    assert only_run(output_dir, other)[1].info.run_id != only_run(output_dir)[1].info.run_id
    shutil.copy(empty_database, output_dir / "other.db")  # a server that lost everything, at the same address
    (output_dir / "other.db-wal").unlink(missing_ok=True)
    third = open_run(output_dir, other, resumed_from(8, second.identity()))
    log(third, range(9, 11))
    third.finish("FINISHED")
    assert points(output_dir, other) == logged(output_dir)


def test_what_is_refused_is_set_aside_and_holds_nothing_up(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(output_dir)
    log(run, range(1, 4))
    run.log(4, {"bad*name": 1.0, "loss": 0.25}, "0-mlm")
    log(run, range(5, 7), also_bad_="x")  # type: ignore[arg-type]
    run.finish("FINISHED")
    found = points(output_dir)
    assert sorted(step for name, step in found if name == "loss") == [1, 2, 3, 4, 5, 6]
    aside = [json.loads(line) for line in (output_dir / spool.REJECTED_FILE).read_text().splitlines()]
    assert [(line["record"]["step"], line["record"]["metrics"]) for line in aside if "bad*name" in line["record"]["metrics"]] == [
        (4, {"bad*name": 1.0})
    ]
    assert [line["reason"] for line in aside if line["record"]["step"] > 4] == ["it is not a number"] * 2
    assert len(aside) == 3
    assert capsys.readouterr().err.count("warning: ") == 1


def test_a_broken_artifact_store_and_a_damaged_line_hold_nothing_up(output_dir: Path) -> None:
    (output_dir / "mlflow_artifacts").write_text("no folder")
    run = open_run(output_dir)
    log(run, range(1, 4))
    with open(output_dir / spool.SPOOL_FILE, "ab") as file:
        file.write(b'{"kind": "metrics", "ste\xff\n')
    log(run, range(4, 6))
    run.finish("FINISHED")
    assert points(output_dir) == logged(output_dir)
    aside = [json.loads(line)["record"]["kind"] for line in (output_dir / spool.REJECTED_FILE).read_text().splitlines()]
    assert aside == ["artifact", "damaged"]


def test_a_deleted_run_is_left_alone(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = open_run(output_dir)
    log(first, range(1, 3))
    first.finish("SCHEDULED")
    client, found = only_run(output_dir)
    client.delete_run(found.info.run_id)
    second = open_run(output_dir, record=resumed_from(2, first.identity()))
    log(second, range(3, 6))
    second.finish("FINISHED")
    refused = [json.loads(line)["record"] for line in (output_dir / spool.REJECTED_FILE).read_text().splitlines()]
    assert sum(record["kind"] == "metrics" for record in refused) == 6
    assert capsys.readouterr().err.count("warning: ") == 1


def test_runs_in_one_folder(output_dir: Path) -> None:
    """Killed before the first checkpoint: `resume: auto` goes on in the same MLflow run, a new start is another."""
    for resume, uri in (("auto", NOWHERE), ("auto", NOWHERE), ("never", None)):
        run = open_run(output_dir, uri, resume=resume)
        log(run, range(1, 4))
        run.finish("KILLED" if uri else "FINISHED")
    client = MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")
    found = runs_named(client, "run")
    assert sorted(run.info.status for run in found) == ["FINISHED", "KILLED"]
    assert all(history(client, run) == logged(output_dir) for run in found)


def replay_command(output_dir: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/replay_metrics.py", str(output_dir)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_a_replay_says_what_is_wrong(output_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = replay_command(tmp_path)
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "mlflow_spool.jsonl: there is no such file" in missing.stderr
    open_run(output_dir, "http://alice:hunter2hunter2@127.0.0.1:9").finish("FINISHED")
    with pytest.raises(UserError, match="credentials are stored nowhere: set MLFLOW_TRACKING_USERNAME"):
        replay(output_dir)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "alice")
    result = replay(output_dir)
    assert (result.server, result.delivered, result.left) == (NOWHERE, 0, 3)
    assert "Connection refused" in result.error


def test_a_run_that_ended_without_a_word_was_killed(output_dir: Path) -> None:
    run = open_run(output_dir, NOWHERE)
    log(run, range(1, 3))
    run.finish("FINISHED")
    path = output_dir / spool.SPOOL_FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))  # as if SIGKILL had come before
    replay(output_dir, f"sqlite:///{output_dir / 'mlflow.db'}")
    _, found = only_run(output_dir)
    assert found.info.status == "KILLED"
    assert found.info.end_time == json.loads(lines[-2])["time"]
    assert points(output_dir) == logged(output_dir)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_the_end_of_a_run_waits_only_so_long(
    output_dir: Path, silent_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlflow_tracker, "SECONDS_TO_FINISH", 0.2)
    run = open_run(output_dir, silent_server)
    log(run, range(1, 6))
    begin = time.monotonic()
    run.finish("FINISHED")
    assert 0.2 <= time.monotonic() - begin < 5
    said = capsys.readouterr().err
    assert f"MLflow has not taken 9 record(s), which stay in {output_dir / spool.SPOOL_FILE}" in said
    assert f"deliver them with: python tools/replay_metrics.py {output_dir}\n" in said


def test_a_full_disk_does_not_stop_training(output_dir: Path) -> None:
    """No file can grow for a while, MLflow's database included: one warning for each of ours, and every reading arrives."""
    script = (
        "import resource, sys; from pathlib import Path; from tests.unit.test_mlflow_spool import *\n"
        "mlflow_tracker.FIRST_PAUSE = mlflow_tracker.LONGEST_PAUSE = 0.01\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))\n"
        "run = open_run(Path(sys.argv[1]))\n"
        "log(run, range(1, 21))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "log(run, range(21, 31))\n"
        "run.finish('FINISHED')\n"
    )
    command = [sys.executable, "-c", script, str(output_dir)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ended.returncode == 0, ended.stderr
    for name in ("metrics.jsonl", spool.SPOOL_FILE):
        assert ended.stderr.count(f"warning: {output_dir / name} cannot be written") == 1
    assert len(logged(output_dir)) == 2 * 30
    assert points(output_dir) == logged(output_dir)
