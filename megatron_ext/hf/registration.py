"""An export as an artifact of the MLflow run that trained it: what was written, where, and what its verification measured.

A few small files go to MLflow, not the weights; these are told apart by their sums.
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


def register_export(report: "ExportReport", checkpoint: Path, name: str, tracking_uri: TrackingUri) -> str:
    """Log an export to the run that trained its checkpoint.

    Args:
        report: of the export.
        checkpoint: what was exported; `is_tracked`.
        name: the artifact's folder is `exports/<name>`; registering the same name again replaces it.
        tracking_uri: where a run keeps its store.

    Returns:
        Where it lies: run and artifact path.

    Raises:
        RegistrationError: the store is not there, does not answer, or does not know the run.
    """
    record = read_run_file(checkpoint)
    run_id, folder = record["mlflow_run_id"], artifact_folder(name)
    try:
        client = _client(_store(record, checkpoint, tracking_uri))
        _check_artifacts(client.get_run(run_id).info.artifact_uri)
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


def _store(record: dict[str, Any], checkpoint: Path, tracking_uri: TrackingUri) -> str:
    """Address of the run's tracking store; an embedded one lies in the run's folder, wherever that was moved to."""
    configured = record["config"]["tracking"].get("uri")
    if configured and is_redacted(configured):
        configured = without_user_info(configured)  # MLflow takes credentials from its environment variables
        if is_redacted(configured):
            raise RegistrationError(f"the run's tracking.uri was {configured}, and its secret is stored nowhere")
    run_folders = [checkpoint.absolute().parent.parent, Path(record["config"].get("output_dir") or ".")]
    stores = [tracking_uri(configured, folder) for folder in run_folders]
    found = [store for store in stores if not store.startswith(SQLITE) or Path(store.removeprefix(SQLITE)).is_file()]
    if not found:  # MLflow would make an empty one
        raise RegistrationError(f"there is no {stores[0].removeprefix(SQLITE)}")
    return found[0]


def _check_artifacts(uri: str) -> None:
    """A run folder that was moved leaves MLflow with the old address of its artifacts: do not write there."""
    parsed = urlparse(uri)
    if parsed.scheme not in ("", "file"):
        return
    # .../mlflow_artifacts/<run id>/artifacts
    root = Path(unquote(parsed.path)).parent.parent
    if not root.parent.is_dir():
        raise RegistrationError(f"the run's artifacts belong in {root}, whose folder is gone")


def _client(uri: str) -> "MlflowClient":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # nobody should wait minutes for a server that is gone
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)
