"""Runs an ordinary function on N real processes joined by gloo or NCCL, and brings its results back."""

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import forkserver, reduction
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 240.0
PRELOADED = [
    "megatron_ext.runtime.without_compiler",
    *("megatron.core.dist_checkpointing", "megatron.core.optimizer", "megatron.core.pipeline_parallel"),
]
"""Imported once for all ranks that see no GPU: it takes longer than most of what runs on them."""


def run_on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, on_gpus: bool = False) -> list[Any]:
    """Call `function(*arguments)` on every rank of a process group.

    Args:
        function: a module-level function; it finds torch.distributed initialized and megatron patched.
        world_size: number of processes.
        arguments: pickled to each.
        on_gpus: NCCL with a GPU for each rank; otherwise gloo, and the ranks see no GPU.

    Returns:
        What it returned, by rank.

    Raises:
        RuntimeError: with the traceback of the rank that failed first, or if the ranks did not end in time.
    """
    # A process that may use a GPU must not be forked from one that has looked for it.
    context = multiprocessing.get_context("spawn" if on_gpus else "forkserver")
    if not on_gpus:
        _start_server()
    surroundings = _Surroundings(on_gpus)
    with tempfile.TemporaryDirectory() as folder:
        processes, results = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            arguments_of_rank = (surroundings, function, rank, world_size, folder, arguments, sender, on_gpus)
            process = context.Process(target=_worker, args=arguments_of_rank)
            process.start()
            sender.close()  # the process has its own: when it ends, the receiver sees the end
            processes.append(process)
            results.append(receiver)
        try:
            found = _receive(results)
            for process in processes:
                process.join(TIMEOUT)
            late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        finally:
            for process in processes:
                process.kill()
        errors = sorted((path.read_text() for path in Path(folder).glob("error-*")), key=_is_consequence)
        if errors:
            raise RuntimeError(errors[0])
        if late or len(found) < world_size:
            raise RuntimeError(f"ranks {late or sorted(set(range(world_size)) - set(found))} did not end within {TIMEOUT:.0f} s")
        return [found[rank] for rank in range(world_size)]


def _start_server() -> None:
    """The process that ranks without a GPU are forked from, if it does not run yet. It sees no GPU either: what it imports looks
    for one, and what was found then is not looked for again."""
    forkserver.set_forkserver_preload(PRELOADED)
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        os.environ.update({} if seen is None else {"CUDA_VISIBLE_DEVICES": seen})


def _receive(results: list[Connection]) -> dict[int, Any]:
    """What each rank sends, by rank; a rank that ends without sending is left out."""
    found: dict[int, Any] = {}
    waiting = {result: rank for rank, result in enumerate(results)}
    while waiting and (ready := wait(list(waiting), TIMEOUT)):
        for result in ready:
            rank = waiting.pop(result)
            with contextlib.suppress(EOFError):
                found[rank] = pickle.loads(result.recv_bytes())  # from our own process, over a pipe that nobody else has
    return found


class _Surroundings:
    """This process's environment, standard output and standard error, taken on by the process that it is sent to.

    A process that is forked by the server of `multiprocessing` has those that the server was started with.
    """

    def __init__(self, with_gpus: bool):
        self._environment = {**os.environ, **({} if with_gpus else {"CUDA_VISIBLE_DEVICES": ""})}

    def __reduce__(self) -> tuple[Any, ...]:
        return _take_on, (self._environment, reduction.DupFd(1), reduction.DupFd(2))


def _take_on(environment: dict[str, str], output: Any, errors: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for here, stream in ((1, output), (2, errors)):
        os.dup2(stream.detach(), here)


def _is_consequence(error: str) -> bool:
    """A rank that failed because another one was gone says so; the other one knows why."""
    return "Connection closed by peer" in error or "Connection reset by peer" in error


def _worker(
    surroundings: None,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    arguments: tuple[Any, ...],
    sender: Connection,
    on_gpus: bool,
) -> None:
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    try:
        from megatron_ext.runtime.cpu import patch_megatron

        patch_megatron()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
        if on_gpus:
            torch.cuda.set_device(rank)
        store = torch.distributed.FileStore(str(Path(folder) / "store"), world_size)
        torch.distributed.init_process_group("nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=world_size)
        # As plain bytes: a Connection's own pickler would send tensors as handles that end with this process.
        sender.send_bytes(pickle.dumps(function(*arguments)))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
