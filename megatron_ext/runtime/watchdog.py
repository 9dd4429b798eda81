"""Ends a run in which a rank hangs, and says which one.

Each rank has a thread that reports, through a store of their own, how often its main thread has marked progress and where in the
code that thread is. When a rank has seen no progress of its own for the time-out, it looks at all reports twice: a rank that
reports no more has been stopped or has lost its machine; one whose main thread is not inside a collective is the one that all
others wait for.

The store is kept by rank 0. When that is stopped, calls to it never return, whatever time-out the store was given: they are made
with a limit of our own.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch

from megatron_ext.errors import say
from megatron_ext.runtime.patience import Patience

STORE_TIMEOUT = timedelta(seconds=10)
SECONDS_AT_END = 10.0
"""What `Watchdog.at_end` may take, and how long a rank waits for the one that tells."""
TOLD = "told"
"""Key in the store: the culprit has been named."""
COMMUNICATION = ("torch/distributed/", "tensor_parallel/mappings.py", "p2p_communication.py", "param_and_grad_buffer.py")
"""Parts of the paths of code, torch's and megatron's, in which a rank waits for others: its innermost frame is there."""


@dataclass(frozen=True)
class Report:
    """What a rank says of itself."""

    beat: int
    """Grows with every report."""
    marks: int
    """How often its main thread has marked progress."""
    activity: str
    """What it said it was doing."""
    place: str
    """File, line and function that its main thread is in."""
    waits: bool
    """It is inside a collective."""


class Watchdog:
    """Context that watches over the thread that entered it. All ranks enter it together."""

    def __init__(self, timeout: float, exit_code: int):
        """
        Args:
            timeout: seconds without progress after which the run counts as hanging.
            exit_code: what this process then ends with.
        """
        self._timeout, self._exit_code = timeout, exit_code
        self.at_end: Callable[[], None] = lambda: None
        """Called before the process ends, for instance to tell the trackers; it may take a few seconds."""
        self._interval = min(timeout / 4, 5.0)
        self._rank, self._ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._store = _make_store(self._rank)
        self._patience = Patience(min(timeout, STORE_TIMEOUT.total_seconds()))
        self._thread_id = threading.get_ident()
        self._activity, self._marks, self._last = "starting", 0, time.monotonic()
        self._beat = 0
        self._rank_0_answers = True
        self._stopped = threading.Event()

    def mark(self, activity: str) -> None:
        """The main thread has got on; it now does this."""
        self._activity = activity
        self._marks += 1
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        # It may be waiting for the store, or about to end the process; both take no longer than this.
        self._thread.join(5 * self._patience.seconds + 5 * self._interval + 2 * SECONDS_AT_END)

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            self._report_quietly()
            if time.monotonic() - self._last > self._timeout:
                marks = self._marks
                word, speaker = self._find_culprit()
                if self._marks == marks and not self._stopped.is_set():
                    self._end(word, speaker)

    def _end(self, word: str, speaker: int) -> None:
        """The speaker tells; all stay until it has, and the others have read its reports: the first exit ends everything."""
        ending = threading.Thread(target=self.at_end, daemon=True)
        ending.start()
        if self._rank == speaker:
            say(f"error: no progress for {self._timeout:.0f} s (training.timeout_minutes): {word}")
            self._tell(lambda: self._store.set(TOLD, ""))
        self._go_on_reporting(4 * self._interval)
        self._tell(self._wait_until_told)
        ending.join(SECONDS_AT_END)
        os._exit(self._exit_code)  # the main thread is inside a collective and cannot be interrupted

    def _tell(self, function: Callable[[], None]) -> None:
        """Exchange words about the end through the store, if rank 0 still keeps it: every rank speaks for itself otherwise."""
        if self._rank_0_answers:
            with contextlib.suppress(RuntimeError, OSError):
                self._patience.call(function)

    def _wait_until_told(self) -> None:
        end = time.monotonic() + SECONDS_AT_END
        while not self._store.check([TOLD]) and time.monotonic() < end:
            time.sleep(self._interval)

    def _go_on_reporting(self, seconds: float) -> bool:
        """Wait, but let the others see that this rank answers; whether the run went on."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._stopped.wait(min(left, self._interval / 2)):
            if self._rank_0_answers:
                self._report_quietly()
        return self._stopped.is_set()

    def _report_quietly(self) -> None:
        with contextlib.suppress(RuntimeError, OSError):  # rank 0 does not answer: `_find_culprit` says so when it matters
            self._report()

    def _report(self) -> None:
        self._beat += 1
        frame = sys._current_frames().get(self._thread_id)
        stack = traceback.extract_stack(frame)
        place = next((entry for entry in reversed(stack) if "megatron_ext" in entry.filename), stack[-1])
        waits = any(part in stack[-1].filename for part in COMMUNICATION)
        report = {
            "beat": self._beat,
            "marks": self._marks,
            "activity": self._activity,
            "place": f"{os.path.basename(stack[-1].filename)}:{stack[-1].lineno} ({stack[-1].name}), called by "
            f"{os.path.basename(place.filename)}:{place.lineno} ({place.name})",
            "waits": waits,
        }
        self._patience.call(lambda: self._store.set(str(self._rank), json.dumps(report)))

    def _find_culprit(self) -> tuple[str, int]:
        """Read all reports twice; which ranks hold the others up, and the first rank that can tell."""
        try:
            first = self._patience.call(self._read)
            if self._go_on_reporting(2 * self._interval):
                return "", self._rank
            second = self._patience.call(self._read)
        except (RuntimeError, OSError):
            self._rank_0_answers = False
            return "rank 0 does not answer: its process was stopped, or its machine is gone", self._rank
        answering = [rank for rank, report in second.items() if report is not None and report != first[rank]]
        return describe(first, second), min(answering, default=self._rank)

    def _read(self) -> dict[int, Report | None]:
        keys = [str(rank) for rank in range(self._ranks)]
        present = [key for key in keys if self._store.check([key])]
        values = self._store.multi_get(present)
        found = {int(key): Report(**json.loads(value)) for key, value in zip(present, values, strict=True)}
        return {rank: found.get(rank) for rank in range(self._ranks)}


def describe(first: dict[int, Report | None], second: dict[int, Report | None]) -> str:
    """Name the ranks that hold the others up.

    Args:
        first: by rank, what each said.
        second: the same, some seconds later.
    """
    silent = [rank for rank, report in second.items() if report is None or report == first[rank]]
    if silent:
        return f"{_ranks(silent)} no longer answer{'s' if len(silent) == 1 else ''}: stopped, or the machine is gone"
    reports = {rank: report for rank, report in second.items() if report is not None}
    busy = [rank for rank, report in reports.items() if not report.waits]
    if 0 < len(busy) < len(reports):
        culprit = reports[busy[0]]
        return f"{_ranks(busy)} hold{'s' if len(busy) == 1 else ''} the others up while {culprit.activity}, at {culprit.place}"
    fewest = min(report.marks for report in reports.values())
    behind = [rank for rank, report in reports.items() if report.marks == fewest]
    culprit = reports[behind[0]]
    return f"{_ranks(behind)} got least far, while {culprit.activity}, at {culprit.place}"


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'' if len(ranks) == 1 else 's'} {shown}"


def _make_store(rank: int) -> Any:
    """A key-value store on rank 0, apart from that of the process groups."""
    host = os.environ.get("MASTER_ADDR", "localhost")
    address: list[Any] = [None]
    store = None
    if rank == 0:
        store = torch.distributed.TCPStore(host, 0, None, is_master=True, timeout=STORE_TIMEOUT, wait_for_workers=False)
        address = [store.port]
    torch.distributed.broadcast_object_list(address)
    if store is None:
        store = torch.distributed.TCPStore(host, address[0], None, timeout=STORE_TIMEOUT, wait_for_workers=False)
    return store
