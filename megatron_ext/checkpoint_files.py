"""A checkpoint directory as files: which are there, what `run.json` says, and whether every byte is as it was written.

Needs neither torch nor megatron, so that the trainer, the exporter and the doctor ask the same questions the same way. A
checkpoint may come from anywhere: what `run.json` says is looked at (`megatron_ext.run_record`) before anything uses it, and no
path in a checkpoint may lead out of it.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from blake3 import blake3

from megatron_ext.errors import UnreadableError, UserError
from megatron_ext.regular_file import read_small_file
from megatron_ext.run_record import parse_run_record

FORMAT = 1
RUN_FILE = "run.json"
FP8_HISTORY = "emulated_amax_history"
"""End of the name of a layer's FP8 history, the one tensor of a model that is no parameter: see `model.fp8_emulation`."""
LARGEST_RUN_FILE = 2**26
SUMMED_AT_ONCE = 2**24
"""Bytes; `hashlib.file_digest` takes 256 KiB, and waits each time until other threads let it have the interpreter."""
TOKENIZER_FOLDER = "tokenizer"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "config.json"),
    *("chat_template*", GENERATION_FILE),
)
"""Patterns of what is kept of a tokenizer's folder; an imported model's prompts and stop ids go with it."""
SUM, EARLIER_SUM = "blake3", "sha256"
"""What a file's sum is called in `run.json`. BLAKE3, for SHA-256 takes longer over a gigabyte than copying it; checkpoints that
were made before have the other one."""
SUMS = {SUM: blake3, EARLIER_SUM: hashlib.sha256}
RECORD_SUM = "record_sha256"
"""Key of `run.json` with the sum of all the others."""


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` completed steps."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Completed steps of a checkpoint, from its name; -1 if it has another name."""
    match = re.fullmatch(r"step_(\d{8})", checkpoint.name)
    return int(match[1]) if match else -1


def published_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. One without a `run.json` was whole when it got its name, and is damaged."""
    return sorted(path for path in folder.glob("step_*") if step_of(path) >= 0 and path.is_dir())


def complete_checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints that say what they are, oldest first."""
    return [path for path in published_checkpoints(folder) if (path / RUN_FILE).is_file()]


def read_run_file(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's `run.json`, with every key that anything reads there and of its type.

    Raises:
        UserError: it is missing or broken, lacks something, or names a file outside the checkpoint.
    """
    path = checkpoint / RUN_FILE
    try:
        text = read_small_file(path, LARGEST_RUN_FILE).decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"checkpoint {checkpoint}: there is no run.json; name a complete .../checkpoints/step_* folder") from None
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    record = parse_run_record(text, str(path), FORMAT)
    for name in (record["tokenizer"]["path"], *record["files"]):
        inside(checkpoint, name, str(path))
    return record


def inside(checkpoint: Path, name: str, source: str) -> Path:
    """Path of a file or folder of a checkpoint, which need not exist.

    Args:
        checkpoint: the checkpoint directory.
        name: relative path, as the checkpoint gives it.
        source: what gives it, for the error message.

    Raises:
        UserError: it leads out of the checkpoint.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or not name.isprintable():
        raise UserError(f"{source} names the path {name!r:.200}: only paths inside the checkpoint are allowed")
    path = checkpoint / name
    try:
        leads_out = not path.resolve().is_relative_to(checkpoint.resolve())
    except (OSError, RuntimeError):  # links in a circle
        leads_out = True
    if leads_out:
        raise UserError(f"{source} names {name}, a link that leads out of the checkpoint: it was not followed")
    return path


def check_links(checkpoint: Path) -> None:
    """Refuse a checkpoint that holds links to elsewhere.

    Raises:
        UserError: naming the first.
    """
    for folder, folders, files in os.walk(checkpoint):
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink():
                inside(checkpoint, str(path.relative_to(checkpoint)), f"checkpoint {checkpoint}")


def file_sum(path: Path, kind: str = SUM) -> str:
    """Sum of a file's contents, in hexadecimal digits.

    Args:
        path: of the file.
        kind: a key of `SUMS`.
    """
    digest, buffer = SUMS[kind](), bytearray(SUMMED_AT_ONCE)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and sum of some files of a folder, as `run.json` keeps them: name -> {bytes, blake3}."""
    return {name: {"bytes": (folder / name).stat().st_size, SUM: file_sum(folder / name)} for name in names}


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """What `run.json` is to hold, with the sum of it."""
    return {**record, RECORD_SUM: _record_sum(json.loads(json.dumps(record)))}


def _record_sum(record: dict[str, Any]) -> str:
    """Over the values, however they are laid out; checkpoints that were made before there was a sum have none."""
    values = {name: value for name, value in record.items() if name != RECORD_SUM}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def find_damage(checkpoint: Path, part: int = 0, parts: int = 1, only: Collection[str] | None = None) -> dict[str, str]:
    """Compare a checkpoint's files with the sizes and sums that `run.json` recorded. Reads every byte.

    Args:
        checkpoint: a published checkpoint.
        part: number of the share of the files to look at, when several processes divide the work.
        parts: number of shares.
        only: the files to look at, besides `run.json`; None are all.

    Returns:
        One line for each missing or changed file, by its name; empty if all is as it was written.

    Raises:
        UnreadableError: nothing can be said, because a newer version wrote it, or the disk errs.
    """
    try:
        record = read_run_file(checkpoint)
    except UnreadableError:
        raise
    except UserError as error:
        return {RUN_FILE: str(error)}
    written = record["files"]
    names = sorted(written, key=lambda name: -written[name]["bytes"])[part::parts]
    lines = {name: _damage_of(checkpoint / name, name, written[name]) for name in names if only is None or name in only}
    lines[RUN_FILE] = _damage_of_record(checkpoint, record)
    return {name: line for name, line in lines.items() if line}


def _damage_of_record(checkpoint: Path, record: dict[str, Any]) -> str | None:
    if record.get(RECORD_SUM, _record_sum(record)) != _record_sum(record):
        return f"{RUN_FILE} is not as it was written"
    if step_of(checkpoint) not in (-1, record["step"]):
        return f"{RUN_FILE} is that of step {record['step']}"
    return None


def _damage_of(path: Path, name: str, written: dict[str, Any]) -> str | None:
    try:
        if not path.is_file() and path.exists():
            return f"{name} is not a file"
        size = path.stat().st_size
        if size != written["bytes"]:
            return f"{name} has {size} bytes, {written['bytes']} were written"
        kind = EARLIER_SUM if EARLIER_SUM in written else SUM
        found = file_sum(path, kind)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read ({error.strerror})") from None
    return None if found == written[kind] else f"{name} has the {kind} sum {found[:12]}, {written[kind][:12]} was written"
