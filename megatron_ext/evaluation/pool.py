"""Worker processes that outlive their tasks' failures: one that ends takes its task with it, and another one takes its place."""

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any


@dataclass
class _Worker:
    process: Any
    connection: Connection
    number: int
    task: Any = None


@dataclass(frozen=True)
class Done:
    """A task that ended."""

    task: Any
    result: Any = None
    error: str | None = None
    """Why there is no result."""


def run_all(function: Callable[[Any], Any], tasks: Sequence[Any], workers: int) -> Iterator[Done]:
    """Call `function` with every task, on so many processes at once; what is done comes as it is done.

    Args:
        function: a module-level function.
        tasks: pickled to the workers, in their order.
        workers: processes. On a machine with GPUs each sees one of them, in turn; otherwise they share the cores.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    waiting = list(reversed(tasks))
    crew: list[_Worker] = []

    def hire(number: int) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(function, theirs, threads, number), daemon=True)
        process.start()
        theirs.close()
        crew.append(_Worker(process, ours, number))

    try:
        for number in range(min(workers, len(tasks))):
            hire(number)
        while waiting or any(worker.task is not None for worker in crew):
            for worker in crew:
                if worker.task is not None or not waiting:
                    continue
                worker.task = waiting.pop()
                with contextlib.suppress(OSError):  # it ended before it had anything to do: `_hear` says so
                    worker.connection.send(worker.task)
            for ready in wait([worker.connection for worker in crew if worker.task is not None]):
                worker = next(worker for worker in crew if worker.connection is ready)
                done = _hear(worker)
                if not worker.process.is_alive():
                    crew.remove(worker)
                    hire(worker.number)
                yield done
    finally:
        for worker in crew:
            worker.process.kill()


def _hear(worker: _Worker) -> Done:
    """What a worker says of its task, or that it ended."""
    task, worker.task = worker.task, None
    try:
        result, error = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        return Done(task, error=f"its process ended with code {worker.process.exitcode} (-9: killed, perhaps for want of memory)")
    return Done(task, result, error)


def _work(function: Callable[[Any], Any], connection: Connection, threads: int, number: int) -> None:
    """A worker's life."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    import torch

    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = function(task), None
        except Exception as error:  # one run of thousands; the others are worth having
            text = f"{type(error).__name__}: {error}" if str(error) else traceback.format_exc(limit=1)
            answer = None, text.splitlines()[0][:500]
        connection.send(answer)
