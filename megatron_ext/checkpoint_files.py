"""A checkpoint directory as files: which are there, what `run.json` says, and whether every byte is as it was written.

Needs neither torch nor megatron, so that the trainer, the exporter and the doctor ask the same questions the same way.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError

FORMAT = 1
RUN_FILE = "run.json"


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` completed steps."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Completed steps of a checkpoint, from its name; -1 if it has another name."""
    match = re.fullmatch(r"step_(\d{8})", checkpoint.name)
    return int(match[1]) if match else -1


def complete_checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step_*") if step_of(path) >= 0 and (path / RUN_FILE).is_file())


def read_run_file(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's `run.json`.

    Raises:
        UserError: it is missing or broken.
    """
    path = checkpoint / RUN_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{checkpoint} is not a complete checkpoint: there is no {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{path} has format {found}: this version reads format {FORMAT}")
    return record


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of some files of a folder, as `run.json` keeps them: name -> {bytes, sha256}."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}


def find_damage(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Compare a checkpoint's files with the sizes and sums that `run.json` recorded. Reads every byte.

    Args:
        checkpoint: a published checkpoint.
        part: number of the share of the files to look at, when several processes divide the work.
        parts: number of shares.

    Returns:
        One line for each missing or changed file; empty if all is as it was written.
    """
    try:
        written = read_run_file(checkpoint)["files"]
    except UserError as error:
        return [str(error)]
    names = sorted(written, key=lambda name: -written[name]["bytes"])[part::parts]
    lines = [_damage_of(checkpoint / name, name, written[name]) for name in names]
    return [line for line in lines if line]


def _damage_of(path: Path, name: str, written: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != written["bytes"]:
            return f"{name} has {size} bytes, {written['bytes']} were written"
        found = sha256(path)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if found == written["sha256"] else f"{name} has SHA-256 {found[:12]}, {written['sha256'][:12]} was written"
