"""Runs a study's tree on this machine: so many segments at once, each a run of its own; what is done is not done again."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ext.errors import UserError, say, warn
from megatron_ext.study.segment_run import SegmentRun
from megatron_ext.study.status import newest_step

ROOT = Path(__file__).parents[2]
LOOK = 0.2
"""Seconds between two looks at what runs."""
PATIENCE = 120.0
"""Seconds that a segment has for saving when the study is stopped."""


@dataclass
class _Going:
    run: SegmentRun
    process: subprocess.Popen


@dataclass
class LocalRun:
    """The state of one call."""

    runs: list[SegmentRun]
    jobs: int
    ranks: int
    export: Callable[[SegmentRun], None]
    """Called when a segment is done, also when it was before."""
    going: list[_Going] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Name of a segment that failed, or whose parent did -> why."""

    def execute(self) -> dict[str, str]:
        """Train what is not trained yet. Returns the segments that were not, and why."""
        waiting = [run for run in self.runs if not run.is_done]
        done = {run.name for run in self.runs} - {run.name for run in waiting}
        for run in self.runs:
            if run.name in done:
                self.export(run)
        with self._stopping(), self._bar() as bar:
            while waiting or self.going:
                waiting = self._start(waiting, done)
                time.sleep(LOOK)
                for going in [each for each in self.going if each.process.poll() is not None]:
                    self.going.remove(going)
                    self._end(going, done)
                bar.n = sum(_steps(run, run.name in done) for run in self.runs)
                bar.set_postfix_str(", ".join(each.run.name for each in self.going)[-60:], refresh=True)
        return self.failed

    def _start(self, waiting: list[SegmentRun], done: set[str]) -> list[SegmentRun]:
        """Start what may start; what is left, less what never will."""
        left = []
        for run in waiting:
            parent = run.parent_name
            if parent in self.failed:
                self.failed[run.name] = f"its parent {parent} was not trained"
            elif len(self.going) < self.jobs and (parent is None or parent in done):
                run.write_config()
                self.going.append(_Going(run, self._launch(run)))
            else:
                left.append(run)
        return left

    def _launch(self, run: SegmentRun) -> subprocess.Popen:
        ranks = [*("-m", "torch.distributed.run", "--standalone", "--nproc-per-node"), str(self.ranks)] if self.ranks > 1 else []
        command = [sys.executable, *ranks, str(ROOT / "pretrain_encoder.py"), "--config", str(run.config_file)]
        threads = max(1, len(os.sched_getaffinity(0)) // (self.jobs * self.ranks))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        with open(run.log_file, "a") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )

    def _end(self, going: _Going, done: set[str]) -> None:
        run, code = going.run, going.process.returncode
        if code == 0 and run.is_done:
            done.add(run.name)
            self.export(run)
            return
        why = f"ended with code {code}: {last_line(run.log_file)}"
        self.failed[run.name] = why
        warn(f"segment {run.name} {why} ({run.log_file})")

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """A signal to the study is one to its segments, which save and end."""

        def stop(number: int, frame: Any) -> None:
            raise UserError(f"stopped by {signal.Signals(number).name}: the same command goes on from here")

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._stop_all()

    def _stop_all(self) -> None:
        for each in self.going:
            each.process.terminate()
        for each in self.going:
            try:
                each.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(each.process.pid, signal.SIGKILL)

    def _bar(self) -> Any:
        total = sum(run.segment.part.steps for run in self.runs)
        return tqdm(total=total, unit="step", desc="study", disable=None)


def _steps(run: SegmentRun, is_done: bool) -> int:
    return run.segment.part.steps if is_done else max(0, newest_step(run) - run.segment.start_step)


def last_line(log: Path) -> str:
    """Of what a run printed: where it says why it ended."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "it said nothing")


@contextmanager
def only_one(output_dir: Path) -> Iterator[None]:
    """Context in which no other process runs this study.

    Raises:
        UserError: one does.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--output-dir {output_dir}: another process runs this study") from None
        yield


def report_failures(failed: dict[str, str]) -> int:
    """Say what was not trained; the exit code."""
    for name, why in failed.items():
        say(f"not trained: {name}: {why}")
    return 1 if failed else 0
