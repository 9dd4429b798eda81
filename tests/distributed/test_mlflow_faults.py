"""A real MLflow server that is absent, dies, is slow or answers with errors: training does not notice, and nothing is lost."""

import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient

from megatron_ext.config import DataConfig, DataSource, PhaseConfig, RunConfig, TrackingConfig
from megatron_ext.train import mlflow_tracker
from megatron_ext.train.line_file import read_metrics
from megatron_ext.train.tracking import Trackers, build_trackers
from tests.conftest import Corpus
from tests.distributed.test_training import EDGE, config_tree
from tests.mlflow_server import MlflowServer, history, logged, runs_named, spoiling_proxy

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
LAST, LATEST_KILL = 30, 25
SECONDS_FOR_A_PROCESS = 240
SECONDS_OF_A_CALL = 0.02
"""Of the median call. The longest one may meet another thread that holds Python's lock while it imports MLflow."""
SECONDS_OF_THE_LONGEST_CALL = 1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """Not started; a test that wants it there asks for `server.running()`."""
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_tracker, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(mlflow_tracker, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(mlflow_tracker, "SECONDS_TO_COLLECT", 0.01)


def config_at(output_dir: Path, uri: str) -> RunConfig:
    return RunConfig(
        output_dir=str(output_dir),
        data=DataConfig(tokenizer="t", train=[DataSource(prefix="p")]),
        phases=[PhaseConfig(objective="mlm", steps=STEPS)],
        tracking=TrackingConfig(uri=uri),
    )


def log_steps(trackers: Trackers, first: int, last: int) -> list[float]:
    """Log made-up steps; returns the seconds of each call."""
    seconds = []
    for step in range(first, last + 1):
        before = time.perf_counter()
        trackers.log(step, {f"metric_{number}": step + number / 7 for number in range(15)}, "0-mlm")
        seconds.append(time.perf_counter() - before)
    return seconds


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def check_nothing_lost(output_dir: Path, uri: str, status: str) -> None:
    """MLflow has each reading of metrics.jsonl once, and nothing else."""
    client = MlflowClient(uri)
    (run,) = runs_named(client, output_dir.name)
    found = history(client, run)
    assert found == logged(output_dir)
    assert len(found) >= 15 * STEPS
    assert run.info.status == status


def check_calls(seconds: list[float]) -> None:
    assert statistics.median(seconds) < SECONDS_OF_A_CALL
    assert max(seconds) < SECONDS_OF_THE_LONGEST_CALL


@pytest.mark.usefixtures("short_pauses")
def test_a_server_that_is_absent_at_the_start(server: MlflowServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.kill()
    output_dir = tmp_path / "absent"
    trackers = build_trackers(config_at(output_dir, server.uri), STEPS, None, is_first_rank=True)
    seconds = log_steps(trackers, 1, STEPS - 1)
    warnings = ""

    def has_warned() -> bool:
        nonlocal warnings
        warnings += capsys.readouterr().err
        return "warning: MLflow" in warnings

    wait_until(has_warned)
    server.running()
    seconds += log_steps(trackers, STEPS, STEPS)
    trackers.finish("FINISHED")
    assert (warnings + capsys.readouterr().err).count("warning: MLflow") == 1
    check_nothing_lost(output_dir, server.uri, "FINISHED")
    check_calls(seconds)


@pytest.mark.usefixtures("short_pauses")
def test_a_slow_server(server: MlflowServer, tmp_path: Path) -> None:
    server.running()
    output_dir = tmp_path / "slow"
    with spoiling_proxy(server) as proxy:
        trackers = build_trackers(config_at(output_dir, f"http://{proxy.address}"), STEPS, None, is_first_rank=True)
        seconds = log_steps(trackers, 1, 1)
        wait_until(lambda: proxy.requests)
        proxy.delay = 1.5
        wait_until(lambda: proxy.requests >= 3)  # one of them waits now
        seconds += log_steps(trackers, 2, STEPS - 1)
        proxy.delay = 0.1
        seconds += log_steps(trackers, STEPS, STEPS)
        trackers.finish("FINISHED")
    check_nothing_lost(output_dir, server.uri, "FINISHED")
    check_calls(seconds)


@pytest.mark.usefixtures("short_pauses")
def test_a_server_that_answers_with_errors(server: MlflowServer, tmp_path: Path) -> None:
    server.running()
    output_dir = tmp_path / "errors"
    refusal = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "not this"}).encode()
    with spoiling_proxy(server) as proxy:
        # The first refusal meets the parameters, the second one a batch of metrics: taken apart, both go through.
        proxy.errors = [(500, b"{}"), (503, b"busy"), (400, refusal), (500, b"oops"), (429, b"")]
        trackers = build_trackers(config_at(output_dir, f"http://{proxy.address}"), STEPS, None, is_first_rank=True)
        seconds = log_steps(trackers, 1, STEPS // 2)
        wait_until(lambda: not proxy.errors)
        proxy.errors = [(500, b""), (400, refusal), (502, b"<html>")]
        seconds += log_steps(trackers, STEPS // 2 + 1, STEPS)
        wait_until(lambda: not proxy.errors)
        trackers.finish("FAILED")
    check_nothing_lost(output_dir, server.uri, "FAILED")
    check_calls(seconds)
    assert not (output_dir / "mlflow_spool.rejected.jsonl").exists()


def python(*arguments: str, **environment: str) -> subprocess.Popen:
    """A command of this repository in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env={**inherited, **environment}, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def pretrain(tree: dict[str, Any], **environment: str) -> subprocess.Popen:
    """The real entry point."""
    path = Path(tree["output_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    # Threads that wait by spinning slow each other down on a machine that has more to do than cores.
    return python("pretrain_encoder.py", "--config", str(path), OMP_WAIT_POLICY="passive", **environment)


def long_tree(corpus: Corpus, output_dir: Path, tracking: dict[str, Any]) -> dict[str, Any]:
    """LAST steps, most of them after MLflow is imported."""
    tree = config_tree(corpus, output_dir, {}, tracking=tracking, checkpoint={"interval": 0})
    tree["phases"][1]["steps"] = LAST - EDGE
    tree["validation"]["interval"] = LAST
    return tree


def seconds_per_step(output_dir: Path) -> float:
    """Of the quickest step: the others also measure what else this machine does. No step gets around what tracking costs."""
    return min(line["seconds_per_step"] for line in read_metrics(output_dir) if "seconds_per_step" in line)


PASSWORD, TOKEN, HUB_TOKEN = "s3cr3t-hunter2", "mlflow-t0ken-4711", "hf_abcdefTOPSECRET"


@dataclass(frozen=True)
class DyingServer:
    """A run whose server died in its middle, what was said, and what a replay delivered afterwards."""

    folder: Path
    output_dir: Path
    untracked: Path
    said: str
    replayed: subprocess.CompletedProcess
    authorizations: set[str | None]


@pytest.fixture(scope="module")
def dying_server(corpus: Corpus, server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> DyingServer:
    """pretrain_encoder.py with credentials in its address and environment; its server is killed as soon as it has taken something.

    On a quick machine the steps may be over before MLflow is imported: after step LATEST_KILL it is killed in any case.
    """
    folder = tmp_path_factory.mktemp("dying")
    secrets = {"MLFLOW_TRACKING_TOKEN": TOKEN, "HF_TOKEN": HUB_TOKEN}
    server.running()
    with spoiling_proxy(server) as proxy:
        tracking = {"mlflow": True, "uri": f"http://alice:{PASSWORD}@{proxy.address}"}
        process = pretrain(long_tree(corpus, folder / "run", tracking), **secrets)
        said = []
        for line in process.stderr:
            said.append(line)
            if (folder / "run/mlflow_spool.ack.json").is_file() or line.startswith(f"step {LATEST_KILL}/"):
                server.kill()
        ended = finished(process)
        said = "".join([*said, ended.stdout])
        assert ended.returncode == 0, said
        server.launch()
        untracked = pretrain(long_tree(corpus, folder / "untracked", {"mlflow": False}))
        assert finished(untracked).returncode == 0
        server.running()
        replayed = finished(python("tools/replay_metrics.py", str(folder / "run"), **secrets))
        return DyingServer(folder, folder / "run", folder / "untracked", said, replayed, proxy.authorizations)


def finished(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, errors = process.communicate(timeout=SECONDS_FOR_A_PROCESS)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def test_a_server_that_dies_in_mid_run(dying_server: DyingServer, server: MlflowServer) -> None:
    assert f"deliver them with: python tools/replay_metrics.py {dying_server.output_dir}" in dying_server.said
    assert dying_server.replayed.returncode == 0, dying_server.replayed.stderr
    client = MlflowClient(server.running().uri)
    (run,) = runs_named(client, "run")
    assert history(client, run) == logged(dying_server.output_dir)
    assert {step for _, step in logged(dying_server.output_dir)} == set(range(1, LAST + 1))
    assert run.info.status == "FINISHED"
    assert seconds_per_step(dying_server.output_dir) < 3 * seconds_per_step(dying_server.untracked)


def test_no_secret_is_written_anywhere(dying_server: DyingServer, server: MlflowServer) -> None:
    """Neither by the run nor by its replay: not in files, not on the terminal, not in MLflow, not in an exported model."""
    from megatron_ext.hf.export import export_checkpoint

    export_checkpoint(dying_server.output_dir / f"checkpoints/step_{LAST:08d}", dying_server.folder / "exported")
    said = (dying_server.said, dying_server.replayed.stdout, dying_server.replayed.stderr)
    files = [
        path for folder in (dying_server.output_dir, dying_server.folder / "exported", server.folder) for path in files_in(folder)
    ]
    names = {path.name for path in files}
    assert names >= {"run.json", "metrics.jsonl", "mlflow_spool.jsonl", "server.db", "config.yaml", "README.md"}
    for secret in (PASSWORD, TOKEN, HUB_TOKEN, "alice"):
        assert [text for text in said if secret in text] == []
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
    # They were needed, and used: requests prefers those of the address.
    assert f"Basic {base64.b64encode(f'alice:{PASSWORD}'.encode()).decode()}" in dying_server.authorizations
    assert "warning: tracking.uri http://***@127.0.0.1" in dying_server.said
    assert "MLFLOW_TRACKING_USERNAME" in dying_server.said


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
