"""Reads a training checkpoint without megatron and without a process group: run.json, and one tensor at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_ext.checkpoint_files import FP8_HISTORY, inside, read_run_file
from megatron_ext.errors import UserError, one_line
from megatron_ext.hf.mapped_tensor import load_mapped
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

    The tensor files are read as `torch.load` does, tensors only, by an index that was looked through.
    """

    def __init__(self, directory: Path, mapped: bool = True):
        """Read run.json and the list of tensors.

        Args:
            directory: of the checkpoint.
            mapped: tensors are views of the file where that is possible: quick, but a disk that errs ends the process.

        Raises:
            UserError: the directory is no complete checkpoint, or one that holds code or what this version does not read.
        """
        self.directory, self._mapped = directory, mapped
        self.record = _read_record(directory)
        self._metadata = refuse_foreign_code(directory)
        others = self._tensors(of_optimizer=False)
        self.tensors = {key: info for key, info in others.items() if not key.endswith(FP8_HISTORY)}
        self.fp8_histories = {key: info for key, info in others.items() if key.endswith(FP8_HISTORY)}
        self.optimizer_tensors = self._tensors(of_optimizer=True)

    def read(self, key: str) -> Tensor:
        """One whole tensor on the CPU, in its stored dtype; a view of the file if one part of it holds all.

        Raises:
            UserError: the files that hold it are missing or damaged.
        """
        info = (self.tensors | self.optimizer_tensors | self.fp8_histories)[key]
        chunks = self._metadata.state_dict_metadata[key].chunks
        if chunks[0].sizes == info.shape:
            return self._read_chunk(key, info, chunks[0])
        whole = torch.empty(info.shape, dtype=info.dtype)
        for chunk in chunks:
            place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            if whole[place].shape != chunk.sizes:
                raise UserError(f"checkpoint {self.directory}: tensor {key} cannot be read (a part of it lies outside its shape)")
            whole[place] = self._read_chunk(key, info, chunk)
        return whole

    def _read_chunk(self, key: str, info: TensorInfo, chunk: ChunkStorageMetadata) -> Tensor:
        """A part of a tensor, as a training rank wrote it; torch's own loader would copy it once more."""
        stored = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        path = self.directory / stored.relative_path
        try:
            part = load_mapped(path, stored.offset, stored.length, info.dtype if self._mapped else None)
        except Exception as error:  # a damaged archive raises anything
            raise UserError(f"checkpoint {self.directory}: tensor {key} cannot be read ({one_line(error)})") from error
        if not isinstance(part, Tensor) or part.shape != chunk.sizes or part.dtype != info.dtype:
            raise UserError(
                f"checkpoint {self.directory}: tensor {key} cannot be read ({stored.relative_path} holds something else)"
            )
        return part

    def _tensors(self, of_optimizer: bool) -> dict[str, TensorInfo]:
        """The optimizer's tensors, or all others. Without objects such as megatron's extra states."""
        return {
            key: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(OPTIMIZER_PREFIX) == of_optimizer
        }


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
