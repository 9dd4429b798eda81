"""An export as an artifact of the MLflow run that trained it: what was written, where, and what its verification measured.

A few small files go to MLflow, not the weights; these are told apart by their sums. A checkpoint may come from anywhere: unless
it lies in the run's folder that it names, no server that it names is called without being asked to, and credentials stay here.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from megatron_ext.checkpoint_files import describe_files, read_run_file
from megatron_ext.secrets import is_redacted, redact, without_user_info

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from megatron_ext.hf.export import ExportReport

TrackingUri = Callable[[str | None, Path], str]
"""(configured server or None, the run's folder) -> address of the tracking store."""

COPIED = ("config.json", "README.md")
EXPORT_FILE = "export.json"
SQLITE = "sqlite:///"


class RegistrationError(Exception):
    """The export cannot be registered; it is none the worse for it. The message says why, in one line."""


def is_tracked(checkpoint: Path) -> bool:
    """Whether the checkpoint says which MLflow run wrote it."""
    record = read_run_file(checkpoint)
    return record["mlflow_run_id"] is not None and isinstance(record["config"].get("tracking"), dict)


def register_export(
    report: "ExportReport", checkpoint: Path, name: str, tracking_uri: TrackingUri, *, any_server: bool = False
) -> str:
    """Log an export to the run that trained its checkpoint.

    Args:
        report: of the export.
        checkpoint: what was exported; `is_tracked`.
        name: the artifact's folder is `exports/<name>`; registering the same name again replaces it.
        tracking_uri: where a run keeps its store.
        any_server: call the server that a checkpoint names even if it lies outside the output_dir that it names.

    Returns:
        Where it lies: run and artifact path.

    Raises:
        RegistrationError: the store is not there, does not answer, or does not know the run.
    """
    record = read_run_file(checkpoint)
    run_id, folder = record["mlflow_run_id"], artifact_folder(name)
    try:
        uri, run_folder = _store(record, checkpoint, tracking_uri, any_server)
        client = _client(uri)
        artifacts = client.get_run(run_id).info.artifact_uri
        if run_folder and not _is_inside(artifacts, run_folder):
            raise RegistrationError(f"its artifacts belong in {artifacts}, outside {run_folder}, which has been moved")
        with tempfile.TemporaryDirectory() as aside:
            for file in COPIED:
                (Path(aside) / file).write_bytes((report.folder / file).read_bytes())
            (Path(aside) / EXPORT_FILE).write_text(json.dumps(redact(describe_export(report, record, checkpoint)), indent=1))
            client.log_artifacts(run_id, aside, folder)
        client.set_tag(run_id, folder.replace("/", "."), f"{report.architecture}, {_dtype(report)}, step {record['step']}")
    except RegistrationError:
        raise
    except Exception as error:  # whatever MLflow and its stores raise
        raise RegistrationError(f"{type(error).__name__}: {' '.join(redact(str(error)).split())[:300]}") from error
    return f"run {run_id}, {folder}"


def artifact_folder(name: str) -> str:
    """`exports/<name>`, with what MLflow or a file system would not take put aside."""
    return f"exports/{re.sub(r'[^A-Za-z0-9_.-]+', '_', name).strip('.') or '_'}"


def describe_export(report: "ExportReport", record: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """What `export.json` holds: path, class, dtype, sums of all files, figures of the verification."""
    files = sorted(path.name for path in report.folder.iterdir() if path.is_file())
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "path": str(report.folder.absolute()),
        "checkpoint": str(checkpoint.absolute()),
        "step": record["step"],
        "phase": record["phase"],
        "architecture": report.architecture,
        "dtype": _dtype(report),
        "parameters": report.parameters,
        "files": describe_files(report.folder, files),
        "verification": [asdict(verification) for verification in report.verifications],
    }


def _dtype(report: "ExportReport") -> str:
    return str(report.dtype).removeprefix("torch.")


def _store(record: dict[str, Any], checkpoint: Path, tracking_uri: TrackingUri, any_server: bool) -> tuple[str, Path | None]:
    """Address of the run's tracking store, and the run's folder if the store is the file in it."""
    configured = record["config"]["tracking"].get("uri")
    run_folder, named = checkpoint.resolve().parent.parent, Path(record["config"].get("output_dir") or "").resolve()
    if not configured:
        database = Path(tracking_uri(None, run_folder).removeprefix(SQLITE))
        if not database.is_file():  # MLflow would make an empty one
            raise RegistrationError(f"there is no {database}")
        return tracking_uri(None, run_folder), run_folder
    address = without_user_info(configured) if is_redacted(configured) else configured  # its environment variables know the rest
    if is_redacted(address):
        raise RegistrationError(f"the run's tracking.uri was {configured}, and its secret is stored nowhere")
    if run_folder != named and not any_server:
        raise RegistrationError(
            f"the checkpoint is not in {named}, the run's folder: --register calls {redact(address)} nevertheless"
        )
    return tracking_uri(address, run_folder), None


def _is_inside(artifact_uri: str, folder: Path) -> bool:
    parsed = urlparse(artifact_uri)
    return parsed.scheme in ("", "file") and Path(unquote(parsed.path)).resolve().is_relative_to(folder)


def _client(uri: str) -> "MlflowClient":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # nobody should wait minutes for a server that is gone
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)
