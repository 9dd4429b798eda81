"""Runs a study's tree on this machine: so many segments at once, each a run of its own; what is done is not done again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ext.errors import UserError, say, warn
from megatron_ext.study.segment_run import SegmentRun
from megatron_ext.study.status import made_steps

ROOT = Path(__file__).parents[2]
LOOK = 0.2
"""Seconds between two looks at what runs."""
PATIENCE = 600
"""Seconds that a segment has for saving when the study is stopped."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class _Going:
    run: SegmentRun
    process: subprocess.Popen
    slot: int
    """Which of the jobs' places it has."""
    log_start: int
    """Bytes that earlier attempts have printed."""


@dataclass
class LocalRun:
    """The state of one call."""

    runs: list[SegmentRun]
    jobs: int
    ranks: int
    export: Callable[[SegmentRun], Any]
    """Called when a segment is done, also when it was before."""
    going: list[_Going] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Name of a segment that failed, or whose parent did, or whose export did -> why."""
    stopped: int = 0
    """The signal that came."""

    def execute(self) -> dict[str, str]:
        """Train what is not trained yet. Returns the segments that were not, and why.

        Raises:
            UserError: there are fewer GPUs than processes, or a signal came.
        """
        devices = self._devices()
        waiting = [run for run in self.runs if not run.is_done]
        done = {run.name for run in self.runs} - {run.name for run in waiting}
        for run in self.runs:
            if run.name in done:
                self._export(run)
        made = {run.name: made_steps(run) for run in self.runs}
        with self._stopping(), self._bar() as bar:
            while (waiting or self.going) and not self.stopped:
                waiting = self._start(waiting, done, devices)
                time.sleep(LOOK)
                made |= {each.run.name: made_steps(each.run) for each in self.going}
                for going in [each for each in self.going if each.process.poll() is not None]:
                    self.going.remove(going)
                    self._end(going, done)
                    made[going.run.name] = made_steps(going.run)
                bar.n = sum(made.values())
                bar.set_postfix_str(", ".join(each.run.name for each in self.going)[-60:], refresh=True)
        if self.stopped:
            raise UserError(f"stopped by {signal.Signals(self.stopped).name}: the same command goes on from here")
        return self.failed

    def _devices(self) -> list[str]:
        """The GPUs that the jobs share out; none on a machine without."""
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        found = given.split(",") if given else []
        if given is None:
            found = [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]
        if found and self.jobs * self.ranks > len(found):
            raise UserError(f"--jobs {self.jobs} x --ranks {self.ranks} are more processes than there are GPUs ({len(found)})")
        return found

    def _start(self, waiting: list[SegmentRun], done: set[str], devices: list[str]) -> list[SegmentRun]:
        """Start what may start; what is left, less what never will."""
        left = []
        for run in waiting:
            parent = run.parent_name
            if parent is not None and parent in self.failed and parent not in done:
                self.failed[run.name] = f"its parent {parent} was not trained"
            elif len(self.going) < self.jobs and (parent is None or parent in done):
                run.write_config()
                slot = min(set(range(self.jobs)) - {each.slot for each in self.going})
                log_start = run.log_file.stat().st_size if run.log_file.exists() else 0
                self.going.append(_Going(run, self._launch(run, slot, devices), slot, log_start))
            else:
                left.append(run)
        return left

    def _launch(self, run: SegmentRun, slot: int, devices: list[str]) -> subprocess.Popen:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--shutdown-timeout", str(PATIENCE), "--nproc-per-node"]
        ranks = [*torchrun, str(self.ranks)] if self.ranks > 1 else []
        command = [sys.executable, *ranks, str(ROOT / "pretrain_encoder.py"), "--config", str(run.config_file)]
        environment = dict(os.environ)
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[slot * self.ranks : (slot + 1) * self.ranks])
        with open(run.log_file, "a") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
        # A run takes all cores that it may use, and threads of two runs that wait for each other on the same cores hardly get on.
        with contextlib.suppress(OSError):  # it has ended already, or the cores have changed: then it is slow
            os.sched_setaffinity(process.pid, cores_of(slot, self.jobs, os.sched_getaffinity(0)))
        return process

    def _end(self, going: _Going, done: set[str]) -> None:
        run, code = going.run, going.process.returncode
        if code == 0 and run.is_done:
            done.add(run.name)
            self._export(run)
            return
        why = f"ended with code {code}: {last_line(run.log_file, going.log_start)}"
        self.failed[run.name] = why
        warn(f"segment {run.name} {why} ({run.log_file})")

    def _export(self, run: SegmentRun) -> None:
        """A failure is told at the end; what begins at this segment is trained all the same."""
        try:
            self.export(run)
        except UserError as error:
            self.failed[run.name] = str(error)
            warn(f"segment {run.name}: {error}")

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """A signal to the study is one to its segments, which save and end. It is noted, so that it finds no half-started one."""

        def note(number: int, frame: Any) -> None:
            self.stopped = number

        before = {number: signal.signal(number, note) for number in STOPS}
        try:
            yield
        finally:
            self._stop_all()
            for number, handler in before.items():
                signal.signal(number, handler)

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


def cores_of(slot: int, jobs: int, cores: set[int]) -> set[int]:
    """The cores of one of so many jobs: no two jobs share one, unless there are more jobs than cores."""
    ordered = sorted(cores)
    return set(ordered[slot::jobs]) or {ordered[slot % len(ordered)]}


def last_line(log: Path, start: int) -> str:
    """Of what a run printed from this byte on: where it says why it ended."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "it said nothing")


def report_failures(failed: dict[str, str]) -> int:
    """Say what was not trained or not exported; the exit code."""
    for name, why in failed.items():
        say(f"not finished: {name}: {why}")
    return 1 if failed else 0
