"""Reads files that are held in memory whole: regular ones only, and none larger than such a file ever is.

A path from outside may be a pipe, whose reader waits for ever, a device, which has no end, or a file of any size.
"""

import os
import stat
from pathlib import Path

from megatron_ext.errors import UserError

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def read_small_file(path: Path, limit: int) -> bytes:
    """The whole content of a regular file.

    Args:
        path: the file; links are followed.
        limit: the most bytes that it may have.

    Raises:
        UserError: it is something else than a regular file, or larger.
        OSError: it is missing or cannot be read.
    """
    _check(path, os.stat(path), limit)  # a device is not even opened
    # Whatever took its place since: without O_NONBLOCK the opening of a pipe would wait for a writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        _check(path, os.fstat(file.fileno()), limit)
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path} grew while it was read: at most {limit:,} bytes are read")
    return content


def _check(path: Path, status: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise UserError(f"{path} is {kind}: a regular file of at most {limit:,} bytes is wanted")
    if status.st_size > limit:
        raise UserError(f"{path} is a file of {status.st_size:,} bytes: at most {limit:,} are read")
