"""Brings a file that is being written to the disk meanwhile, so that nothing is left to wait for at its end."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO

PIECE = 2**27
"""Bytes after which the disk is asked for another time."""


class EarlySync:
    """Flushes a file to the disk in a thread, as it grows. An error of the disk is raised at the end of the `with` block."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._waiting = 0
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._running: Future[None] | None = None

    def __enter__(self) -> "EarlySync":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown()
        if kind is None and self._running is not None:
            self._running.result()

    def wrote(self, count: int) -> None:
        """So many bytes were given to the system; begin to flush them if they are many and the disk has had the last ones.

        Raises:
            OSError: the disk did not take the last ones.
        """
        self._waiting += count
        if self._waiting < PIECE or (self._running is not None and not self._running.done()):
            return
        if self._running is not None:
            self._running.result()
        self._waiting = 0
        self._running = self._pool.submit(os.fdatasync, self._file.fileno())
