"""A folder that appears under its name only when it is complete."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.errors import UserError, one_line


def check_destination(out_dir: Path) -> None:
    """Refuse a destination that holds something.

    Raises:
        UserError: it exists and is not an empty folder, or is a place that cannot be replaced.
    """
    try:
        is_taken = out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir()))
    except OSError as error:
        raise UserError(f"{out_dir} cannot be looked at ({one_line(error)})") from None
    if is_taken:
        raise UserError(f"{out_dir} exists and is not an empty folder: name another one, or remove it")
    if out_dir.resolve().is_mount():  # nothing can be renamed to it
        raise UserError(f"{out_dir} is where a file system is mounted: name a folder in it")


@contextlib.contextmanager
def published_when_complete(out_dir: Path) -> Iterator[Path]:
    """A folder beside `out_dir` that is renamed to it, once all is on the disk, at the end of the block; removed if that fails.

    Raises:
        UserError: the disk takes no more, or nothing may be written there.
    """
    try:
        target = out_dir.resolve()  # the place that a link points to
        folder = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.tmp")
        folder.mkdir(parents=True)
        try:
            yield folder
            for path in (*folder.rglob("*"), folder):
                _sync(path)
            folder.rename(target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"{out_dir} cannot be written ({one_line(error)})") from error


def _sync(path: Path) -> None:
    """Make a file's content, or what is in a folder, last through a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
