"""A file of lines that a full or failing disk cannot stop, and `metrics.jsonl`, which is one."""

import errno
import json
import os
from collections import deque
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError, warn

METRICS_FILE = "metrics.jsonl"
LINES_KEPT = 50_000
"""Lines kept in memory while the disk takes none; beyond that the oldest are dropped and counted."""


class LineFile:
    """Appends whole lines, each with one system call, so that they outlive this process however it ends.

    No line waits for the disk (no fsync): a machine that loses power may lose the last seconds.
    """

    def __init__(self, path: Path, lines_kept: int = LINES_KEPT):
        """
        Args:
            path: the file; it and its folder are made with the first line.
            lines_kept: limit of the lines in memory.
        """
        self.path = path
        self.dropped = 0
        """Lines that were given up because too many were waiting."""
        self._lines_kept = lines_kept
        self._waiting: deque[bytes] = deque()
        self._descriptor: int | None = None
        self._end = 0
        self._warned = False

    @property
    def waiting(self) -> int:
        """Lines in memory that the disk has not taken."""
        return len(self._waiting)

    def append(self, line: str) -> None:
        """Write a line, and those before it that still wait; what the disk does not take waits for the next call."""
        self._waiting.append(line.encode() + b"\n")
        while len(self._waiting) > self._lines_kept:
            self._waiting.popleft()
            self.dropped += 1
        self._write_waiting()

    def close(self) -> None:
        """Try once more to write what waits, then close the file and say what is lost."""
        self._write_waiting()
        lost = self.dropped + self.waiting
        if lost:
            warn(f"{self.path} lacks {lost} lines that the disk did not take")
        self._close()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                if self._descriptor is None:
                    self._open()
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._close()  # the next call opens it again and cuts off what was half written
            if not self._warned:
                warn(f"{self.path} cannot be written ({error}); its lines are kept in memory until it can")
            self._warned = True

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._descriptor).st_size
        self._end = _end_of_whole_lines(self._descriptor, size)
        if self._end != size:
            os.ftruncate(self._descriptor, self._end)

    def _write(self, line: bytes) -> None:
        written = os.write(self._descriptor, line)
        if written != len(line):  # the disk filled up in the middle of it
            os.ftruncate(self._descriptor, self._end)
            raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes were taken")
        self._end += written

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None


def _end_of_whole_lines(descriptor: int, size: int) -> int:
    """Where the last whole line of a file ends: a process or machine that died may have left a part of one."""
    end = size
    while end > 0:
        start = max(0, end - 4096)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl` that stand, in the order of their steps.

    A run that was killed at step 17 and continued from 10 has written steps 11 to 17 twice. Its first line after that says
    `resumed_from: 10`; the lines of later steps before it are of an attempt that was given up, and are left out. A line may also
    come late: how long a save in the background took is known, and written, some steps after the one that it saved.

    Returns:
        Dictionaries with `step`, `phase`, `time` and metrics; a step's training and validation metrics are lines of their own.

    Raises:
        UserError: there is no such file, or a line in it is damaged.
    """
    path = output_dir / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; a run's output_dir is wanted")
    lines: list[dict[str, Any]] = []
    whole = path.read_text().rpartition("\n")[0]  # a last line without its end is of a process that died writing it
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
            start = int(line.pop("resumed_from", -1))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: line {number} is damaged: '{text[:60]}'") from None
        if start >= 0:
            lines = [earlier for earlier in lines if earlier["step"] <= start]
        lines.append(line)
    return sorted(lines, key=lambda line: line["step"])
