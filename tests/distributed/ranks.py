"""Starts the ranks of a run one by one, without torchrun, which would wait half a minute before it kills a stopped one."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120.0

ENTRY_POINT = """
import os, signal, sys, time
from megatron_ext.errors import run_command
import pretrain_encoder

RANK = int(os.environ["RANK"])

{change}

if __name__ == "__main__":
    run_command(pretrain_encoder.main)
"""
"""The real one, after something in it was made to go wrong."""


class Rank:
    """One process of a run."""

    def __init__(self, process: subprocess.Popen, log: Path):
        self.process, self._log = process, log

    @property
    def text(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(SECONDS)

    def wait_until(self, condition: Callable[[], Any], what: str) -> Any:
        """Look until the condition holds while the process is alive; returns what it returned."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            has_ended = self.process.poll() is not None
            if found := condition():
                return found
            assert not has_ended, f"the process ended before {what}:\n{self.text[-3000:]}"
            time.sleep(0.01)
        raise AssertionError(f"{what} did not happen in {SECONDS:.0f} s:\n{self.text[-3000:]}")


def write_entry_point(folder: Path, change: str = "") -> Path:
    """A script that is the real entry point but for some lines of Python that are run first."""
    script = folder / "changed_entry_point.py"
    script.write_text(ENTRY_POINT.format(change=change))
    return script


@contextlib.contextmanager
def ranks(tree: dict[str, Any], folder: Path, count: int, change: str = "", error_file: str | None = None) -> Iterator[list[Rank]]:
    """The processes of a run; whichever is left at the end is killed.

    Args:
        tree: the run's configuration.
        folder: for the logs, one a rank.
        count: how many.
        change: lines of Python that are run first in each.
        error_file: where standard error goes to instead of the log.
    """
    script, config = write_entry_point(folder, change), folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started: list[Rank] = []
    try:
        for rank in range(count):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}
            environment |= {name: str(value) for name, value in places.items()}
            log = folder / f"rank{rank}.log"
            with open(log, "a") as file, open(error_file or log, "a") as errors:
                process = subprocess.Popen(
                    [sys.executable, str(script), "--config", str(config)],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=errors,
                )
            started.append(Rank(process, log))
        yield started
    finally:
        for rank in started:
            rank.process.kill()
            rank.process.wait(SECONDS)
