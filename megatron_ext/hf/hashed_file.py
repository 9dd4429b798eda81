"""A file that is written once, from its beginning to its end, and whose sum is known when it is closed."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from blake3 import blake3

from megatron_ext.checkpoint_files import SUM
from megatron_ext.hf.block_writing import write_blocks
from megatron_ext.hf.early_sync import EarlySync

LARGE = 2**20
"""Bytes from which on a second thread is worth waking."""
BLOCK = 2**26
"""Bytes that are summed while they are written."""


class HashedFile:
    """Sums what it writes while it writes it: reading gigabytes back would take as long as copying them."""

    def __init__(self, path: Path):
        """Create the file.

        Args:
            path: of a file that does not exist.
        """
        self._file = open(path, "xb")  # noqa: SIM115 - closed by `__exit__`
        self._digest = blake3()
        self._size = 0
        self._hasher = ThreadPoolExecutor(max_workers=1)
        self._sync = EarlySync(self._file)
        self._refusal: OSError | None = None

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hasher.shutdown()
        try:
            with self._file:
                self._sync.__exit__(kind, error, trace)
        finally:
            if self._refusal is not None:  # torch hides it behind an error of its own
                raise self._refusal from None

    @property
    def description(self) -> dict[str, int | str]:
        """Size and sum of what was written, as `run.json` keeps them."""
        return {"bytes": self._size, SUM: self._digest.hexdigest()}

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; they are not needed any more when it returns. Returns how many."""
        view = memoryview(data)
        try:
            for start in range(0, len(view), BLOCK):
                self._write(view[start : start + BLOCK])
        except OSError as error:
            self._refusal = error
            raise
        return len(view)

    def flush(self) -> None:
        """Bring what is held back to the system."""
        self._file.flush()

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
                write_blocks(self._file, block)
            finally:
                summed.result()
        self._size += len(block)
        self._sync.wrote(len(block))
