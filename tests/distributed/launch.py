"""Runs an ordinary function on N real processes joined by gloo, and brings its results back."""

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT = 240.0


def run_on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on every rank of a gloo group.

    Args:
        function: a module-level function; it finds torch.distributed initialized and megatron patched.
        world_size: number of processes.
        arguments: pickled to each.

    Returns:
        What it returned, by rank.

    Raises:
        RuntimeError: with the traceback of the rank that failed first, or if the ranks did not end in time.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_worker, args=(function, rank, world_size, folder, arguments)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        errors = sorted((path.read_text() for path in Path(folder).glob("error-*")), key=_is_consequence)
        if errors:
            raise RuntimeError(errors[0])
        if late:
            raise RuntimeError(f"ranks {late} of {world_size} did not end within {TIMEOUT:.0f} s")
        import torch

        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _is_consequence(error: str) -> bool:
    """A rank that failed because another one was gone says so; the other one knows why."""
    return "Connection closed by peer" in error or "Connection reset by peer" in error


def _worker(function: Callable[..., Any], rank: int, world_size: int, folder: str, arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    try:
        from megatron_ext.runtime.cpu import patch_megatron

        patch_megatron()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
        store = torch.distributed.FileStore(str(Path(folder) / "store"), world_size)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        torch.save(function(*arguments), Path(folder) / f"result-{rank}")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
