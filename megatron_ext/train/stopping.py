"""Signals that ask the run to stop, and what its exit codes mean."""

import signal
import sys
from types import FrameType
from typing import Any

EXIT_HANG = 3
"""A rank did not answer within `training.timeout_minutes`; the checkpoint before it is sound."""
EXIT_STOPPED = 75
"""A signal asked the run to stop: the step was finished and saved, and `--resume auto` continues it (EX_TEMPFAIL)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Context in which the first signal asks for a stop after the current step, and a second one stops at once."""

    def __init__(self) -> None:
        self.signal_name = ""
        """The signal that came; empty if none."""
        self._before: dict[int, Any] = {}

    @property
    def came(self) -> bool:
        """A signal has come to this rank."""
        return bool(self.signal_name)

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came and number != signal.SIGUSR1:  # schedulers may send USR1 more than once
            sys.exit(128 + number)
        self.signal_name = signal.Signals(number).name
