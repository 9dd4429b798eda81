"""A file that is written once, from its beginning to its end, and whose SHA-256 is known when it is closed."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

LARGE = 2**20
"""Bytes from which on a second thread is worth waking."""
BLOCK = 2**26
"""Bytes after which the system is told to begin to write them to the disk."""


class HashedFile:
    """Sums what it writes while it is being written: reading gigabytes back would take as long as copying them.

    The content is on the disk when the block ends without an error. The lines that torch and safetensors write need no more of a
    file than this: `write`, `flush` and `tell`.
    """

    def __init__(self, path: Path):
        """Create the file.

        Args:
            path: of a file that does not exist.
        """
        self.path = path
        self._file = open(path, "xb")
        self._digest = hashlib.sha256()
        self._size = self._begun = 0
        self._hasher = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hasher.shutdown()
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    @property
    def description(self) -> dict[str, int | str]:
        """Size and SHA-256 of what was written, as `run.json` keeps them."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def write(self, data: bytes | memoryview | np.ndarray) -> int:
        """Append bytes, uint8 if it is an array; they are not needed any more when it returns. Returns how many."""
        view = memoryview(data)
        for start in range(0, len(view), BLOCK):
            self._write(view[start : start + BLOCK])
        return len(view)

    def flush(self) -> None:
        """Nothing: the block's end flushes."""

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def _write(self, block: memoryview) -> None:
        if len(block) < LARGE:
            self._digest.update(block)
            self._file.write(block)
        else:
            summed = self._hasher.submit(self._digest.update, block)
            try:
                self._file.write(block)
            finally:
                summed.result()
        self._size += len(block)
        if self._size - self._begun >= BLOCK:
            self._begin_writing_back()

    def _begin_writing_back(self) -> None:
        """Let the disk work meanwhile, so that little is left for `fsync` to wait for."""
        self._file.flush()
        # Asked to forget pages that are not on the disk yet, Linux begins to write them, and keeps them.
        os.posix_fadvise(self._file.fileno(), self._begun, self._size - self._begun, os.POSIX_FADV_DONTNEED)
        self._begun = self._size
