"""Turns a directory with all its shards into a published checkpoint: tokenizer, sums, `run.json`, and one rename. Rank 0's work."""

import json
import os
import shutil
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint_files import (
    FORMAT,
    RUN_FILE,
    TOKENIZER_FILES,
    TOKENIZER_FOLDER,
    describe_files,
    read_run_file,
    seal,
)
from megatron_ext.secrets import redact
from megatron_ext.train.preflight import RunSetup
from megatron_ext.unpickling import read_metadata

SUMS = ".sums-{rank}.json"
"""File in which each rank's writer leaves the sums of its shards."""

DAMAGED = "damaged-"
"""What the name of a checkpoint that was found damaged begins with."""


def publish(aside: Path, final: Path, setup: RunSetup, record: dict[str, Any]) -> None:
    """Complete a directory of shards and give it its name; whatever has that name already is kept under another.

    Args:
        aside: the directory.
        final: the checkpoint's path.
        setup: the run.
        record: what `run.json` says of the run's progress.

    Raises:
        OSError, RuntimeError, UserError: it cannot be completed, and was not published.
    """
    _copy_tokenizer(setup.tokenizer.source, aside / TOKENIZER_FOLDER)
    _write_run_file(aside, setup, record)
    read_run_file(aside)
    read_metadata(aside)  # every byte that the index names is there
    _sync_all(aside)
    if final.exists():
        set_aside(final)
    aside.rename(final)
    _sync(final.parent)


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a SentencePiece file, or a folder's tokenizer files: a model folder holds weights too, which do not belong here."""
    target.mkdir()
    names = TOKENIZER_FILES if source.is_dir() else (source.name,)
    folder = source if source.is_dir() else source.parent
    for path in {path for name in names for path in folder.glob(name)}:
        if path.is_file():
            shutil.copy(path, target)


def _write_run_file(aside: Path, setup: RunSetup, record: dict[str, Any]) -> None:
    source = setup.tokenizer.source
    full = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **record,
        "encoder": vars(setup.encoder),
        "vocab_size": setup.vocab_size,
        "padded_vocab_size": setup.padded_vocab_size,
        "tokenizer": {
            "path": TOKENIZER_FOLDER if source.is_dir() else f"{TOKENIZER_FOLDER}/{source.name}",
            "fingerprint": setup.tokenizer.fingerprint,
        },
        "data": setup.data_record,
        "parallel": vars(setup.layout),
        "backend": setup.backend.name,
        "precision": setup.config.precision.label,
        "config": setup.config.as_dict(),
        "versions": {name: metadata.version(name) for name in ("torch", "megatron-core")},
        "files": _collect_sums(aside),
    }
    (aside / RUN_FILE).write_text(json.dumps(seal(redact(full)), indent=1))


def _collect_sums(aside: Path) -> dict[str, dict[str, Any]]:
    """Sums of all files: the shards' from the processes that wrote them, the few others' taken here."""
    sums: dict[str, dict[str, Any]] = {}
    for path in aside.glob(SUMS.format(rank="*")):
        sums.update(json.loads(path.read_text()))
        path.unlink()
    names = [str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file()]
    missing = [name for name in names if name.endswith(".distcp") and name not in sums]
    if missing:
        raise RuntimeError(f"the writers left no sums of {', '.join(sorted(missing))}")
    sums.update(describe_files(aside, [name for name in names if name not in sums]))
    return dict(sorted(sums.items()))


def _sync_all(aside: Path) -> None:
    """Bring all but the shards, which their writers bring there, to the disk."""
    for path in aside.rglob("*"):
        if path.suffix != ".distcp":
            _sync(path)
    _sync(aside)


def _sync(path: Path) -> None:
    """Make a file's content, or what is in a folder, last through a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_checkpoint(checkpoint: Path) -> None:
    """Take a published checkpoint away; it is whole under its name until it is gone."""
    aside = checkpoint.with_name(f".removing-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that no run takes it for whole; returns its new path."""
    target = checkpoint.with_name(DAMAGED + checkpoint.name)
    number = 1
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}-{number}")
    checkpoint.rename(target)
    return target
