"""Registration: what MLflow's own client reads back of an export, and that a store that is away costs a warning only."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from megatron_ext.checkpoint_files import describe_files, seal
from megatron_ext.hf.export import ExportReport, export_checkpoint
from megatron_ext.hf.registration import RegistrationError, artifact_folder, is_tracked, register_export
from megatron_ext.train.mlflow_delivery import tracking_uri
from tests.unit.test_hf_hub_layout import one_thread, template, write_step  # noqa: F401

ROOT = Path(__file__).parents[2]


def set_record(checkpoint: Path, **changes: Any) -> None:
    record = json.loads((checkpoint / "run.json").read_text())
    config = {**record["config"], **changes.pop("config", {})}
    record = {key: value for key, value in {**record, **changes, "config": config}.items() if key != "record_sha256"}
    (checkpoint / "run.json").write_text(json.dumps(seal(record)))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take it seconds to lay out."""
    folder = tmp_path_factory.mktemp("database")
    MlflowClient(tracking_uri=tracking_uri(None, folder)).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def tracked(template: Path, database: Path, tmp_path: Path) -> tuple[Path, MlflowClient, str]:  # noqa: F811
    """A run's folder with its embedded database, a checkpoint in it, a client, and the run's id."""
    run = tmp_path / "run"
    checkpoint = write_step(run, template, 40)
    shutil.copy(database, run / "mlflow.db")
    client = MlflowClient(tracking_uri=tracking_uri(None, run))
    experiment = client.create_experiment("megatron_ext", artifact_location=(run / "mlflow_artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    set_record(
        checkpoint,
        mlflow_run_id=run_id,
        config={"tracking": {"mlflow": True, "uri": None}, "output_dir": str(tmp_path / "elsewhere")},
    )
    return checkpoint, client, run_id


def convert(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str, str]:
    """Run the tool: its exit code, and what it printed."""
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "tools/convert_checkpoint.py"), run_name="__main__")
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def test_an_export_is_found_in_its_run(
    tracked: tuple[Path, MlflowClient, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, client, run_id = tracked
    code, out, err = convert(capsys, monkeypatch, checkpoint, tmp_path / "model", "--report", tmp_path / "report.json")
    assert (code, err) == (0, "") and f"registered in MLflow: run {run_id}, exports/model" in out
    names = sorted(item.path for item in client.list_artifacts(run_id, "exports/model"))
    assert names == [f"exports/model/{name}" for name in ("README.md", "config.json", "export.json")]
    (tmp_path / "back").mkdir()
    folder = Path(client.download_artifacts(run_id, "exports/model", str(tmp_path / "back")))
    for name in ("README.md", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    export = json.loads((folder / "export.json").read_text())
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert export["files"] == describe_files(tmp_path / "model", files) and "model.safetensors" in files
    assert (export["architecture"], export["dtype"], export["step"]) == ("EuroBertForMaskedLM", "float32", 40)
    assert export["path"] == str(tmp_path / "model") and export["checkpoint"] == str(checkpoint)
    assert export["verification"] == [json.loads((tmp_path / "report.json").read_text())]
    assert export["verification"][0]["max_abs_diff"] < 1e-4
    assert client.get_run(run_id).data.tags["exports.model"] == "EuroBertForMaskedLM, float32, step 40"


def test_all_revisions_are_found_once(
    tracked: tuple[Path, MlflowClient, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, client, run_id = tracked
    for _ in range(2):
        code, out, _ = convert(capsys, monkeypatch, checkpoint.parent, tmp_path / "hub", "--hub", "--no-verify")
        assert code == 0
    assert "there already" in out and "registered" not in out
    assert [item.path for item in client.list_artifacts(run_id, "exports")] == ["exports/hub.step-40"]


def test_without_registration_or_a_run_nothing_is_told(
    tracked: tuple[Path, MlflowClient, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, client, run_id = tracked
    convert(capsys, monkeypatch, checkpoint, tmp_path / "model", "--no-verify", "--no-register")
    set_record(checkpoint, mlflow_run_id=None)
    assert not is_tracked(checkpoint)
    code, out, err = convert(capsys, monkeypatch, checkpoint, tmp_path / "model-2", "--no-verify", "--register")
    assert (code, err) == (0, "") and "registered" not in out
    assert client.list_artifacts(run_id) == []


def test_a_store_that_is_away_is_a_warning(
    tracked: tuple[Path, MlflowClient, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _, _ = tracked
    database = tmp_path / "run/mlflow.db"
    database.rename(tmp_path / "kept.db")
    code, out, err = convert(capsys, monkeypatch, checkpoint, tmp_path / "model", "--no-verify")
    assert code == 0 and err.startswith("warning: the export is complete, but was not registered in MLflow (there is no")
    assert err.count("\n") == 1 and not database.exists() and (tmp_path / "model/config.json").is_file()


@pytest.fixture
def exported(tracked: tuple[Path, MlflowClient, str], tmp_path: Path) -> ExportReport:
    return export_checkpoint(tracked[0], tmp_path / "model")


def test_a_run_that_was_deleted_is_named(tracked: tuple[Path, MlflowClient, str], exported: ExportReport) -> None:
    set_record(tracked[0], mlflow_run_id="0" * 32)
    with pytest.raises(RegistrationError, match="not found"):
        register_export(exported, tracked[0], "model", tracking_uri)


def test_a_moved_run_gets_nothing_written_at_its_old_place(
    tracked: tuple[Path, MlflowClient, str], exported: ExportReport, tmp_path: Path
) -> None:
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    with pytest.raises(RegistrationError, match=r"its artifacts belong in .*run/mlflow_artifacts.*, outside .*moved"):
        register_export(exported, tmp_path / "moved/checkpoints/step_00000040", "model", tracking_uri)


def test_a_foreign_checkpoint_names_no_server_to_call(
    tracked: tuple[Path, MlflowClient, str], exported: ExportReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, client, run_id = tracked
    server = f"sqlite:///{tmp_path / 'run/mlflow.db'}"
    set_record(checkpoint, config={"tracking": {"mlflow": True, "uri": server}, "output_dir": str(tmp_path / "elsewhere")})
    with pytest.raises(RegistrationError, match="not in .*elsewhere, the run's folder: --register calls"):
        register_export(exported, checkpoint, "model", tracking_uri)
    register_export(exported, checkpoint, "asked", tracking_uri, any_server=True)
    set_record(checkpoint, config={"output_dir": str(tmp_path / "run")})
    register_export(exported, checkpoint, "own", tracking_uri)
    assert sorted(item.path for item in client.list_artifacts(run_id, "exports")) == ["exports/asked", "exports/own"]


def test_a_stored_address_without_its_secret_is_called_without(
    tracked: tuple[Path, MlflowClient, str], exported: ExportReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr("megatron_ext.hf.registration._client", lambda uri: called.append(uri) or 1 / 0)
    set_record(tracked[0], config={"tracking": {"mlflow": True, "uri": "https://***@mlflow.example.org/x"}})
    with pytest.raises(RegistrationError, match="ZeroDivisionError"):
        register_export(exported, tracked[0], "model", tracking_uri, any_server=True)
    assert called == ["https://mlflow.example.org/x"]
    set_record(tracked[0], config={"tracking": {"mlflow": True, "uri": "https://mlflow.example.org/?token=***"}})
    with pytest.raises(RegistrationError, match="stored nowhere"):
        register_export(exported, tracked[0], "model", tracking_uri, any_server=True)
    assert len(called) == 1


@pytest.mark.parametrize(("name", "folder"), [("model", "model"), ("../x y", "_x_y"), ("..", "_"), ("größe", "gr_e")])
def test_names_of_artifacts(name: str, folder: str) -> None:
    assert artifact_folder(name) == f"exports/{folder}"
