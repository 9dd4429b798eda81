"""Writes a checkpoint's tensors in megatron's `torch_dist` format, one at a time, without megatron and without a process group."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config

from megatron_ext.hf.hashed_file import HashedFile
from megatron_ext.hf.one_ahead import one_ahead

TENSOR_FILE, COMMON_FILE, BACKEND_FILE = "__0_0.distcp", "common.pt", "metadata.json"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written, which is made when its turn comes."""

    key: str
    """megatron's name."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def write_tensors(folder: Path, tensors: list[LazyTensor]) -> dict[str, dict[str, int | str]]:
    """Write tensors and the files that megatron wants beside them; memory holds two tensors at a time.

    Args:
        folder: an existing, empty directory.
        tensors: each is stored whole, whatever the layouts it will be loaded at.

    Returns:
        Size and sum of the file with the tensors, by its name, as `run.json` keeps them.

    Raises:
        UserError: what a tensor's `load` raised.
    """
    writer = _Writer(folder)
    shapes = {tensor.key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            distributed_checkpoint.save(shapes, storage_writer=writer, planner=_Planner(tensors), no_dist=True)
        except CheckpointException as error:
            # Not an `Exception`; it carries, per rank, whatever went wrong: the disk's errors, and those of `LazyTensor.load`.
            raise next(iter(error.failures.values()))[0] from None
    with open(folder / COMMON_FILE, "xb") as file:  # given a path, torch would raise an error of its own for a full disk
        torch.save({}, file)
    (folder / BACKEND_FILE).write_text(json.dumps(BACKEND))
    return writer.written


class _Planner(DefaultSavePlanner):
    """Plans by shape alone, and makes each tensor when it is written."""

    def __init__(self, tensors: list[LazyTensor]):
        super().__init__(flatten_state_dict=False)
        self._tensors = {tensor.key: tensor for tensor in tensors}

    def lookup_object(self, index: MetadataIndex) -> Any:
        tensor = self._tensors[index.fqn]
        value = tensor.load()
        assert value.shape == tensor.shape and value.dtype == tensor.dtype, tensor.key
        return value


class _Writer(FileSystemWriter):
    """Forgets a tensor when it is written; torch's own writer keeps them all until the file is closed."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._folder = folder
        self.written: dict[str, dict[str, int | str]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with HashedFile(self._folder / TENSOR_FILE) as file:
            for item, data in one_ahead((item, planner.resolve_data(item)) for item in plan.items):
                start = file.tell()
                # Sums of the archive's entries, which nothing reads, would cost a pass over the tensor.
                with config.patch("save.compute_crc32", False):
                    torch.save(data, file)
                del data  # before the next but one is made
                stored = _StorageInfo(TENSOR_FILE, start, file.tell() - start)
                results.append(WriteResult(item.index, stored.length, stored))
        self.written[TENSOR_FILE] = file.description
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done
