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
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex

COMMON_FILE, BACKEND_FILE = "common.pt", "metadata.json"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written, which is made when its turn comes."""

    key: str
    """megatron's name."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def write_tensors(folder: Path, tensors: list[LazyTensor]) -> None:
    """Write tensors and the files that megatron wants beside them; memory holds one tensor at a time.

    Args:
        folder: an existing, empty directory.
        tensors: each is stored whole, whatever the layouts it will be loaded at.
    """
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    shapes = {tensor.key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        distributed_checkpoint.save(shapes, storage_writer=writer, planner=_Planner(tensors), no_dist=True)
    torch.save({}, folder / COMMON_FILE)
    (folder / BACKEND_FILE).write_text(json.dumps(BACKEND))


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
