"""megatron's checkpoint writer: two guarded patches, needed on any device, and an eye on its processes."""

import contextlib
import io
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Iterator
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch

from megatron_ext.runtime import megatron_versions
from megatron_ext.runtime.results_manager import end_with_parent

COMMON_FILE = "common.pt"
SECONDS_BETWEEN_LOOKS = 0.02
KILLED = 128
"""A writer that ends because a process that it had started was killed has this exit code and the number of the signal."""


def patch_checkpoint_writer() -> None:
    """Apply both; calling it again changes nothing."""
    patch_common_state()
    patch_results_queue()


def patch_common_state() -> None:
    """megatron before 0.19 writes `common.pt` on rank 0 in the middle of a collective save.

    If the disk is full there, rank 0 leaves the others waiting for ever. Written this way the failure shows as a missing file
    (`common_state_is_missing`) that all ranks learn of.
    """
    place = megatron_versions.common_writer()
    if place is not None:
        setattr(*place, staticmethod(_save_common))


def _save_common(state: Any, folder: str | Path) -> None:
    if torch.distributed.get_rank() == 0:
        content = io.BytesIO()
        torch.save(state, content)
        path = Path(folder) / COMMON_FILE
        try:
            path.write_bytes(content.getvalue())
        except OSError:
            path.unlink(missing_ok=True)


def common_state_is_missing(folder: Path) -> bool:
    """Whether this version of megatron should have written `common.pt` and could not."""
    return megatron_versions.common_writer() is not None and not (folder / COMMON_FILE).is_file()


class _Results:
    """The queue that megatron's writers report to: bytes to the manager process, so that it need not import torch for them.

    That would take seconds of the first save, and some hundred megabytes for each rank.
    """

    def __init__(self, manager: SyncManager):
        self._manager, self._queue = manager, manager.Queue()  # the queue goes when its manager does

    def __getstate__(self) -> dict[str, Any]:
        return {"_manager": None, "_queue": self._queue}  # as a writer that is not forked gets it

    def put(self, item: Any) -> None:
        self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())  # from our own writer, through a process of our own


def patch_results_queue() -> None:
    """megatron's writers report to a manager process, which would outlive a trainer that is killed: ours ends with it."""
    writer, name = megatron_versions.results_queue()

    def results_queue(mp_mode: str = "spawn") -> Any:
        if writer._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
            manager.start(end_with_parent)
            writer._results_queue = _Results(manager)
        return writer._results_queue

    setattr(writer, name, results_queue)


@contextlib.contextmanager
def ending_with_its_processes() -> Iterator[None]:
    """Context in a writer's process, which ends as soon as a process that it has started ends badly.

    megatron's writer shares its files out to processes, and would wait for ever for the word of one that was killed.
    """
    done = threading.Event()
    threading.Thread(target=_watch_processes, args=(done,), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch_processes(done: threading.Event) -> None:
    import psutil  # here and below: the doctor reports a machine that lacks it

    while not done.is_set():
        try:
            _, status = os.wait()  # multiprocessing does not mind that its processes are waited for here
        except ChildProcessError:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            continue
        code = os.waitstatus_to_exitcode(status)
        if code:
            _kill_processes(psutil.Process())  # nothing may be written any more once this process has ended
            os._exit(code if code > 0 else KILLED - code)  # the main thread waits and cannot be interrupted


def _kill_processes(parent: Any) -> None:
    import psutil

    for process in parent.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_with_its_processes(pid: int) -> None:
    """Kill a writer and the processes that it has started, which would go on writing without it."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        writer = psutil.Process(pid)
        _kill_processes(writer)
        writer.kill()
