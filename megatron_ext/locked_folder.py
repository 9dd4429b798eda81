"""One process at a time works in the folder of a study or a grid."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.errors import UserError


@contextmanager
def only_one(folder: Path, what: str) -> Iterator[None]:
    """Context in which no other process works there; the kernel takes the lock back however this one ends.

    Args:
        folder: made if it is not there.
        what: is done there, for the message.

    Raises:
        UserError: another process does it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be used ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--output-dir {folder}: another process runs this {what}") from None
        yield
