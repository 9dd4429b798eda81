"""What MLflow is told: one run per training run, whatever interrupts it, with its true status. Read back by MLflow's client."""

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient

from megatron_ext.runtime.launch import run_on_ranks
from megatron_ext.train.stopping import EXIT_STOPPED
from tests.conftest import Corpus
from tests.distributed.faults import Job
from tests.distributed.test_training import EDGE, TOTAL, config_tree, run_training


def runs(folder: Path) -> tuple[MlflowClient, list[Any]]:
    """A client on a run folder's embedded database, and the runs in it."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("megatron_ext")
    return client, client.search_runs([experiment.experiment_id])


@pytest.fixture(scope="module")
def stopped_and_continued(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run stopped at step 5 and continued to its end, and its MLflow status in between."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    tracked = {"mlflow": True}
    run_on_ranks(run_training, 1, [config_tree(corpus, folder, {}, training={"stop_at_step": 5}, tracking=tracked)])
    status = runs(folder)[1][0].info.status
    run_on_ranks(run_training, 2, [config_tree(corpus, folder, {"tensor": 2}, resume="auto", tracking=tracked)])
    return folder, status


def test_one_run_through_a_stop_with_its_true_status(stopped_and_continued: tuple[Path, str]) -> None:
    folder, status_between = stopped_and_continued
    _, found = runs(folder)
    assert [run.info.status for run in found] == ["FINISHED"]
    assert status_between == "SCHEDULED"


def test_metrics_parameters_phase_and_configuration_are_there(stopped_and_continued: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = stopped_and_continued
    client, (run,) = runs(folder)
    for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "mfu", "memory_gib", "total/predicted_tokens"):
        steps = sorted({metric.step for metric in client.get_metric_history(run.info.run_id, name)})
        assert steps == list(range(1, TOTAL + 1)), name
    phases = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "phase_index")}
    assert phases == {step: float(step > EDGE) for step in range(1, TOTAL + 1)}
    assert {metric.step for metric in client.get_metric_history(run.info.run_id, "validation_mlm_loss")} == {EDGE, 5, TOTAL}
    assert run.data.tags["phase"] == "1-mlm"
    assert run.data.params["optimizer.learning_rate"] == "0.001"
    stored = yaml.safe_load(Path(client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))).read_text())
    assert stored["phases"][1]["objective"] == "mlm"


def test_a_killed_run_says_so(corpus: Corpus, tmp_path: Path) -> None:
    tree = config_tree(corpus, tmp_path / "run", {}, tracking={"mlflow": True})
    tree["phases"] = [{"objective": "clm", "steps": 100_000}]
    with Job(tree, tmp_path) as job:
        job.wait_until((tmp_path / "run/mlflow_spool.ack.json").is_file, "MLflow had taken something")
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == EXIT_STOPPED, job.text
    assert [run.info.status for run in runs(tmp_path / "run")[1]] == ["KILLED"]
