"""Writes checkpoints in the background and publishes them, whatever goes wrong on the way.

All ranks plan together (megatron's `torch_dist` strategy), each forks a process that writes its shards and their sums from the
memory as it was at the fork, and training goes on. When all processes have ended, rank 0 writes the index and `run.json` and
publishes the directory by one rename. A save that fails on any rank - a full disk, a writer that was killed - fails on all of
them alike, and leaves nothing behind but the checkpoints that were there.
"""

import errno
import functools
import json
import os
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_ext.checkpoint_files import checkpoint_name, describe_files
from megatron_ext.errors import UserError
from megatron_ext.runtime.megatron_versions import asynchronous_arguments
from megatron_ext.runtime.writer import (
    KILLED,
    common_state_is_missing,
    ending_with_its_processes,
    kill_with_its_processes,
)
from megatron_ext.train.agreement import Agreement
from megatron_ext.train.checkpoint import sharded_state
from megatron_ext.train.preflight import RunSetup
from megatron_ext.train.publication import SUMS, publish

SECONDS_BETWEEN_LOOKS = 0.02


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron's strategy, which also shows the writer: its results are gathered here, where every failure is agreed on."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *rest: Any) -> AsyncRequest:
        self.writer, self.index = writer, planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned, *rest)


@dataclass
class _Save:
    """A save under way."""

    final: Path
    aside: Path
    record: dict[str, Any]
    strategy: _Strategy
    caller: TemporalAsyncCaller
    started: float
    stalled: float


@dataclass(frozen=True)
class Outcome:
    """How a save ended; the same on all ranks."""

    step: int
    phase: str
    problem: str | None
    """What went wrong; None if the checkpoint was published."""
    seconds: float
    """From its beginning to its publication."""
    stalled: float
    """Seconds that training waited for it on this rank."""


class CheckpointSaver:
    """Saves one checkpoint at a time. All ranks make the same calls in the same order."""

    def __init__(
        self, folder: Path, setup: RunSetup, chunks: Sequence[torch.nn.Module], optimizer: Any, agreement: Agreement
    ) -> None:
        """
        Args:
            folder: the run's checkpoint folder.
            setup: the run.
            chunks: this rank's model chunks, without their wrappers.
            optimizer: megatron's optimizer.
            agreement: of all ranks.
        """
        self._folder, self._setup = folder, setup
        self._chunks, self._optimizer = chunks, optimizer
        self._agreement = agreement
        self._save: _Save | None = None

    @property
    def is_writing(self) -> bool:
        """This rank's writer is still at work."""
        return self._save is not None and not _has_ended(self._save.caller)

    @property
    def is_open(self) -> bool:
        """A save was started and not finished; the same on all ranks."""
        return self._save is not None

    def start(self, record: dict[str, Any]) -> Outcome | None:
        """Begin to save; the one before must be finished.

        Args:
            record: what `run.json` says of the run's progress; must hold `step` and `phase`.

        Returns:
            None, or how it failed already.
        """
        assert self._save is None, "one save at a time"
        started = time.perf_counter()
        final = self._folder / checkpoint_name(record["step"])
        aside, problem = self._make_room(final)
        if problem is None:
            strategy = _Strategy("torch_dist", 1)
            request = dist_checkpointing.save(
                sharded_state(self._chunks, self._optimizer, is_loading=False),
                str(aside),
                strategy,
                async_sharded_save=True,
                **asynchronous_arguments(),
            )
            caller = TemporalAsyncCaller()
            problem = self._first_problem(lambda: _check_common_state(aside), lambda: _launch(caller, request, aside))
            self._save = _Save(final, aside, record, strategy, caller, started, time.perf_counter() - started)
        return self._fail(problem, record, started) if problem else None

    def finish(self, timeout: float, mark: Callable[[str], None]) -> Outcome:
        """Wait for the writers of all ranks and publish.

        Args:
            timeout: seconds after which a writer is killed.
            mark: called with what is being done again and again while the writers are at work.
        """
        save, waited = self._save, time.perf_counter()
        assert save is not None, "nothing is being saved"
        activity = f"waiting for the writers of the checkpoint after step {save.record['step']}"
        self._wait_for_all(timeout, lambda: mark(activity))
        problem = self._first_problem(lambda: _take_end(save.caller, timeout))
        results: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(results, save.strategy.writer.retrieve_write_results())
        failed = [result for result in results if not isinstance(result, list)]
        if problem is None and failed:
            problem = str(failed[0][0])
        if problem is None:
            problem = self._first_problem(lambda: self._publish(save, results) if _is_first() else None)
        if problem is not None:
            return self._fail(problem, save.record, save.started)
        self._save = None
        now = time.perf_counter()
        return Outcome(save.record["step"], save.record["phase"], None, now - save.started, save.stalled + now - waited)

    def abandon(self) -> None:
        """Kill this rank's writer: the run ends with an error. Rank 0 may leave a directory that the next run removes."""
        if self._save is not None:
            _kill(self._save.caller)
            self._save = None

    def _wait_for_all(self, timeout: float, mark: Callable[[], None]) -> None:
        """Until all writers have ended or time is up.

        The ranks look together: one that waited alone for a slow writer would hold the others up, and be taken for one that hangs.
        """
        end = time.monotonic() + timeout
        while True:
            is_writing, is_late = self._agreement.any(self.is_writing, time.monotonic() > end)
            if is_late or not is_writing:
                return
            mark()
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _make_room(self, final: Path) -> tuple[Path, str | None]:
        """A fresh directory for this attempt: a writer that outlived its run can never write into it."""
        names = [uuid.uuid4().hex[:8]]
        torch.distributed.broadcast_object_list(names)
        aside = self._folder / f".writing-{final.name}-{names[0]}"
        return aside, self._first_problem(lambda: aside.mkdir(parents=True) if _is_first() else None)

    def _first_problem(self, *actions: Callable[[], object]) -> str | None:
        """Do something on each rank; what went wrong first on any of them, the same answer everywhere."""
        message = None
        try:
            for action in actions:
                action()
        except (OSError, RuntimeError, TimeoutError, UserError) as error:
            message = f"{error}"
        return next(iter(self._agreement.messages(message)), None)

    def _fail(self, problem: str, record: dict[str, Any], started: float) -> Outcome:
        if self._save is not None:
            _kill(self._save.caller)
            self._save.strategy.writer.retrieve_write_results()  # nothing may be left in the queue for the next save
            torch.distributed.barrier()
            if _is_first():
                shutil.rmtree(self._save.aside, ignore_errors=True)
            self._save = None
        seconds = time.perf_counter() - started
        return Outcome(record["step"], record["phase"], problem, seconds, seconds)

    def _publish(self, save: _Save, results: list[Any]) -> None:
        save.strategy.writer.finish(save.strategy.index, results)
        save_config(CheckpointingConfig(save.strategy.backend, save.strategy.version), str(save.aside))
        publish(save.aside, save.final, self._setup, save.record)


def _is_first() -> bool:
    return torch.distributed.get_rank() == 0


def _launch(caller: TemporalAsyncCaller, request: AsyncRequest, aside: Path) -> None:
    if request.async_fn is not None:
        write = functools.partial(_write_and_sum, request.async_fn, aside)
        caller.schedule_async_call(request._replace(async_fn=write, finalize_fns=[]))


def _check_common_state(aside: Path) -> None:
    if _is_first() and common_state_is_missing(aside):
        free = shutil.disk_usage(aside).free
        raise OSError(f"common.pt could not be written ({free / 2**20:.1f} MiB are free)")


def _write_and_sum(write: Callable[..., None], aside: Path, rank: int, *arguments: Any, **options: Any) -> None:
    """In the forked process: write this rank's shards, then their sizes and sums."""
    with ending_with_its_processes():
        write(rank, *arguments, **options)
    names = sorted(path.name for path in aside.glob(f"__{rank}_*"))
    try:
        (aside / SUMS.format(rank=rank)).write_text(json.dumps(describe_files(aside, names)))
    except OSError as error:
        sys.exit(error.errno or 1)  # the reason: `_take_end` puts it into words


def _has_ended(caller: TemporalAsyncCaller) -> bool:
    return caller.process is None or not caller.process.is_alive()


def _kill(caller: TemporalAsyncCaller) -> None:
    if not _has_ended(caller):  # asked first: one that could not be forked has no number
        kill_with_its_processes(caller.process.pid)
        caller.close()


def _take_end(caller: TemporalAsyncCaller, timeout: float) -> None:
    process, rank = caller.process, torch.distributed.get_rank()
    if process is not None:
        if process.is_alive():
            _kill(caller)
            raise TimeoutError(f"the writer of rank {rank} took longer than {timeout:.0f} s")
        if process.exitcode != 0:
            raise RuntimeError(f"the writer of rank {rank} ended: {_describe_end(process.exitcode)}")
        caller.close()


def _describe_end(exit_code: int) -> str:
    """In words, if a signal ended it or one of its processes, or an errno of `_write_and_sum`; 1 is that of any other exception."""
    if exit_code < 0:
        return f"killed by {_signal_name(-exit_code)}"
    if exit_code > KILLED:
        return f"one of its processes was killed by {_signal_name(exit_code - KILLED)}"
    return os.strerror(exit_code) if exit_code > 1 and exit_code in errno.errorcode else f"exit code {exit_code}"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
