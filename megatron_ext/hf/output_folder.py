"""A folder that appears under its name only when it is complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.errors import UserError


def check_destination(out_dir: Path) -> None:
    """Refuse a destination that holds something.

    Raises:
        UserError: it exists and is not an empty folder.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} exists and is not an empty folder: name another one, or remove it")


@contextlib.contextmanager
def published_when_complete(out_dir: Path) -> Iterator[Path]:
    """A folder beside `out_dir` that is renamed to it, once all is on the disk, at the end of the block; removed if that fails."""
    folder = out_dir.absolute().parent / f".{out_dir.name}.{os.getpid()}.tmp"
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in (*folder.rglob("*"), folder):
            _sync(path)
        folder.rename(out_dir)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _sync(path: Path) -> None:
    """Make a file's content, or what is in a folder, last through a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
