"""Contenders in processes of their own that take turns: A B A B ..., so that what else the machine does falls on all alike."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

THREADS = "2"


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one contender was as another, pair by pair."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, seconds: Sequence[float], peer_seconds: Sequence[float]) -> "Ratio":
        """From the durations of the same work, in the order in which they were taken."""
        ratios = [peer / own for own, peer in zip(seconds, peer_seconds, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))


class Contender:
    """A process that does a step of its work whenever it is told to."""

    def __init__(self, module: str, *arguments: str, threads: int | None = None, ranks: int = 1):
        """Start it; it prepares itself until `ready`.

        Args:
            module: to be run with `python -m`; its process calls `take_turns`.
            arguments: of its command line.
            threads: of each of its processes; None are those of `environment`.
            ranks: processes, joined by torchrun if they are several; the first of them calls `take_turns`.
        """
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - lives as long as the process
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        self._process = subprocess.Popen(
            [sys.executable, *torchrun, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment() | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
            text=True,
        )

    def ready(self) -> dict[str, Any]:
        """Wait until it is; what it says of itself."""
        return self._answer()

    def step(self) -> dict[str, Any]:
        """Let it do a step; what it says of it."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Let it go."""
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait(60)
            self._errors.seek(0)
            words = " ".join(map(str, self._process.args))
            raise RuntimeError(f"{words} ended with code {code}:\n{self._errors.read()[-2000:]}")
        return json.loads(line)


def environment() -> dict[str, str]:
    """Of a process that is measured: this one's, and two threads unless it says otherwise."""
    return {"OMP_NUM_THREADS": THREADS, **os.environ}


def take_turns(about: dict[str, Any], step: Any) -> None:
    """The contender's side: say what it is, then do a step for every line of standard input.

    Args:
        about: printed first.
        step: called for each; returns what is printed.
    """
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)
