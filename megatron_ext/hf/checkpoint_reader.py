"""Reads a training checkpoint without megatron and without a process group: run.json, and one tensor at a time."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_ext.checkpoint_files import inside, read_run_file
from megatron_ext.errors import UserError, one_line
from megatron_ext.model.presets import EncoderConfig
from megatron_ext.unpickling import refuse_foreign_code

OPTIMIZER_PREFIX = "optimizer."


@dataclass(frozen=True)
class RunRecord:
    """What run.json says of the training behind a checkpoint."""

    encoder: EncoderConfig
    vocab_size: int
    """Ids that belong to tokens."""
    padded_vocab_size: int
    """Rows of the embedding."""
    causal: bool
    """Attention of the last completed step."""
    step: int
    """Completed optimizer steps."""
    origin: str | None
    """Family of the Hugging Face model that the training began with, if it did."""
    tokenizer: Path
    """The tokenizer stored with the checkpoint."""
    tokenizer_fingerprint: str
    """SHA-256 of the tokenizer that the data was made with."""
    tree: dict[str, Any]
    """The whole of run.json."""


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor, unsharded."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointReader:
    """A checkpoint directory `step_00001000/` in megatron's torch_dist format plus run.json.

    The tensor files are read with `torch.distributed.checkpoint` alone, tensors only, by an index that was looked through.
    """

    def __init__(self, directory: Path):
        """Read run.json and the list of tensors.

        Raises:
            UserError: the directory is no complete checkpoint, or one that holds code or what this version does not read.
        """
        self.directory = directory
        self.record = _read_record(directory)
        self._metadata = refuse_foreign_code(directory)
        self.tensors = self._tensors(of_optimizer=False)
        self.optimizer_tensors = self._tensors(of_optimizer=True)

    def read(self, key: str) -> Tensor:
        """Load one whole tensor onto the CPU, in its stored dtype.

        Raises:
            UserError: the files that hold it are missing or damaged.
        """
        info = (self.tensors | self.optimizer_tensors)[key]
        state = {key: torch.empty(info.shape, dtype=info.dtype)}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                reader = _IndexedReader(self.directory, self._metadata)
                distributed_checkpoint.load(state, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            # Not an `Exception`; it carries, per rank, whatever the reader met: missing files, short reads, damaged archives.
            cause = next(iter(error.failures.values()))[0]
            raise UserError(f"checkpoint {self.directory}: tensor {key} cannot be read ({one_line(cause)})") from error
        return state[key]

    def _tensors(self, of_optimizer: bool) -> dict[str, TensorInfo]:
        """The optimizer's tensors, or all others: the model's. Without objects such as megatron's extra states."""
        return {
            key: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(OPTIMIZER_PREFIX) == of_optimizer
        }


class _IndexedReader(FileSystemReader):
    """Reads by an index that is there already, instead of unpickling the file for every tensor."""

    def __init__(self, directory: Path, metadata: Metadata):
        super().__init__(directory)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def _read_record(directory: Path) -> RunRecord:
    tree = read_run_file(directory)
    return RunRecord(
        encoder=EncoderConfig(**tree["encoder"]),
        vocab_size=tree["vocab_size"],
        padded_vocab_size=tree["padded_vocab_size"],
        causal=tree["causal"],
        step=tree["step"],
        origin=(tree.get("imported") or {}).get("family"),
        tokenizer=inside(directory, tree["tokenizer"]["path"], str(directory)),
        tokenizer_fingerprint=tree["tokenizer"]["fingerprint"],
        tree=tree,
    )
