"""Reads a training checkpoint without megatron and without a process group: run.json, and one tensor at a time."""

import dataclasses
import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_ext.errors import UserError
from megatron_ext.model.presets import EncoderConfig

SUPPORTED_FORMAT = 1
REQUIRED_KEYS = ("encoder", "vocab_size", "padded_vocab_size", "causal", "tokenizer", "config", "step")
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

    The tensor files are read with `torch.distributed.checkpoint` alone. Its metadata file is a pickle: read only
    checkpoints that you trust.
    """

    def __init__(self, directory: Path):
        """Read run.json and the list of tensors.

        Raises:
            UserError: the directory is no complete checkpoint, or of another format than this version reads.
        """
        self.directory = directory
        self.record = _read_record(directory)
        self._reader = _CachedReader(directory)
        self.tensors = self._model_tensors()

    def read(self, key: str) -> Tensor:
        """Load one whole tensor onto the CPU, in its stored dtype.

        Raises:
            UserError: the files that hold it are missing or damaged.
        """
        info = self.tensors[key]
        state = {key: torch.empty(info.shape, dtype=info.dtype)}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                distributed_checkpoint.load(state, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            # Not an `Exception`; it carries, per rank, whatever the reader met: missing files, short reads, damaged archives.
            cause = next(iter(error.failures.values()))[0]
            raise UserError(f"checkpoint {self.directory}: tensor {key} cannot be read ({_one_line(cause)})") from error
        return state[key]

    def _model_tensors(self) -> dict[str, TensorInfo]:
        """The model's tensors: all but the optimizer's, and without objects such as megatron's extra states."""
        try:
            entries = self._reader.metadata.state_dict_metadata
        except Exception as error:
            # Unpickling a damaged file can raise anything.
            raise UserError(f"checkpoint {self.directory}: .metadata cannot be read ({_one_line(error)})") from error
        return {
            key: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(OPTIMIZER_PREFIX)
        }


class _CachedReader(FileSystemReader):
    """Reads the metadata once, and not for every tensor: it lists each shard of the optimizer too."""

    @cached_property
    def metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


def _read_record(directory: Path) -> RunRecord:
    path = directory / "run.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"checkpoint {directory}: there is no run.json; name a complete .../checkpoints/step_* folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {directory}: run.json cannot be read ({_one_line(error)})") from None
    if not isinstance(tree, dict) or tree.get("format", SUPPORTED_FORMAT) != SUPPORTED_FORMAT:
        raise UserError(f"{path}: its format is not {SUPPORTED_FORMAT}, the one that this version reads")
    missing = [key for key in REQUIRED_KEYS if key not in tree]
    if missing:
        raise UserError(f"{path}: it lacks {', '.join(missing)}")
    return RunRecord(
        encoder=_encoder(path, tree["encoder"]),
        vocab_size=tree["vocab_size"],
        padded_vocab_size=tree["padded_vocab_size"],
        causal=tree["causal"],
        step=tree["step"],
        tokenizer=directory / tree["tokenizer"]["path"],
        tokenizer_fingerprint=tree["tokenizer"]["fingerprint"],
        tree=tree,
    )


def _encoder(path: Path, fields: dict[str, Any]) -> EncoderConfig:
    unknown = fields.keys() - {field.name for field in dataclasses.fields(EncoderConfig)}
    if unknown:
        raise UserError(f"{path}: encoder has the unknown field {', '.join(sorted(unknown))}; a newer version wrote it")
    try:
        return EncoderConfig(**fields)
    except TypeError as error:
        raise UserError(f"{path}: encoder is incomplete ({_one_line(error)})") from None


def _one_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
