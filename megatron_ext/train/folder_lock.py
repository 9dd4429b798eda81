"""One process at a time works in an output folder: a training run, by its rank 0, or a replay of the run's metrics."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_ext.errors import UserError, warn

LOCK_FILE = ".in_use"

SECONDS_TO_WAIT = 5.0
"""How long a run waits for one before it in the same folder that is just ending."""

SECONDS_TO_OPEN = 1.0
"""How long a folder may vanish between being made and being written to."""


class FolderLock:
    """A lock that the kernel takes back when this process ends, however it ends. Processes that it forks do not hold it."""

    def __init__(self, output_dir: Path, seconds: float = 0.0):
        """
        Args:
            output_dir: the folder; made if it is missing.
            seconds: how long to wait for another process to let go.

        Raises:
            UserError: another process holds it, or nothing can be written there.
        """
        self._folder = output_dir
        self._path = output_dir / LOCK_FILE
        self._descriptor: int | None = None
        deadline = time.monotonic() + seconds
        while not self._take():
            if time.monotonic() > deadline:
                raise UserError(f"output_dir {output_dir} is in use by {self._holder()}; let it end first")
            time.sleep(0.1)

    def release(self) -> None:
        """Let other processes have the folder; one that is still empty goes too."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            self._path.unlink()
            self._folder.rmdir()
        os.close(self._descriptor)
        self._descriptor = None

    def _take(self) -> bool:
        descriptor = self._open()
        try:
            # Of this process alone (POSIX); the lock of `flock` would be shared with every process forked from here.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return False
        except OSError as error:  # some network file systems have no locks
            warn(f"{self._path} cannot be locked ({error.strerror}): see to it that only one process uses {self._folder}")
        if not self._is_there(descriptor):  # its holder has just removed it
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return True

    def _open(self) -> int:
        deadline = time.monotonic() + SECONDS_TO_OPEN
        while True:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                # A holder that lets go may remove the empty folder between the two calls.
                if error.errno != errno.ENOENT or time.monotonic() > deadline:
                    raise UserError(f"output_dir {self._folder} cannot be written ({error.strerror})") from None

    def _is_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            return self._path.read_text()[:200] or "another process"
        return "another process"


@contextlib.contextmanager
def held_by_this_run(output_dir: Path) -> Iterator[None]:
    """Rank 0 holds the folder as long as the context lasts; all ranks enter it together.

    Raises:
        UserError: on all ranks, if another process holds it.
    """
    lock, problem = None, [""]
    if torch.distributed.get_rank() == 0:
        try:
            lock = FolderLock(output_dir, SECONDS_TO_WAIT)
        except UserError as error:
            problem = [str(error)]
    torch.distributed.broadcast_object_list(problem)
    if problem[0]:
        raise UserError(problem[0])
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
