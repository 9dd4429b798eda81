"""What Megatron-LM says in a checkpoint of the training behind it, read without running any of it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_ext.checkpoint_files import inside
from megatron_ext.errors import UserError, one_line
from megatron_ext.regular_file import read_small_file
from megatron_ext.unpickling import COMMON_FILE, LARGEST_COMMON, kind_name, load_inert

COMMON_OBJECT = "common_state/shard_0_1"
"""What megatron 0.19 calls among the shards what earlier ones keep in `common.pt`."""
PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class NotPlain:
    """Stands for a stored value that is no number, text or flag."""

    kind: str
    """What it was, such as `tuple`."""


@dataclass(frozen=True)
class StoredArguments:
    """What Megatron-LM says of the training."""

    values: dict[str, Any] | None
    """Its command line: None, whole numbers, numbers, texts and flags; `NotPlain` for anything else. None: there is none."""
    iteration: int | None


def read_arguments(checkpoint: Path, index: Metadata) -> StoredArguments:
    """The command-line arguments in a checkpoint of Megatron-LM, whatever objects lie around them; nothing of it is run.

    Args:
        checkpoint: a checkpoint directory; it may hold no arguments, as megatron-core alone keeps none.
        index: its index.

    Raises:
        UserError: what holds them is damaged.
    """
    content, where = _common_state(checkpoint, index)
    if content is None:
        return StoredArguments(None, None)
    try:
        common = load_inert(content)
    except Exception as error:  # a damaged archive or pickle raises anything
        raise UserError(f"checkpoint {checkpoint}: {where} cannot be read ({one_line(error)})") from None
    if isinstance(common, list) and len(common) == 1:  # as an object among the shards is stored
        common = common[0]
    if not isinstance(common, dict):
        raise UserError(f"checkpoint {checkpoint}: {where} holds {kind_name(common)} where a dictionary is expected")
    iteration = common.get("iteration")
    values = getattr(common.get("args"), "state", None)
    return StoredArguments(
        _plain(values) if isinstance(values, dict) else None,
        iteration if type(iteration) is int and 0 <= iteration < 2**53 else None,
    )


def _plain(values: dict[Any, Any]) -> dict[str, Any]:
    names = [name for name in values if isinstance(name, str)]
    return {name: values[name] if type(values[name]) in PLAIN else NotPlain(kind_name(values[name])) for name in names}


def _common_state(checkpoint: Path, index: Metadata) -> tuple[bytes | None, str]:
    """What megatron keeps beside the tensors, still pickled, and its place."""
    path = inside(checkpoint, COMMON_FILE, f"checkpoint {checkpoint}")
    if os.path.lexists(path):
        return read_small_file(path, LARGEST_COMMON), COMMON_FILE
    info = index.storage_data.get(MetadataIndex(COMMON_OBJECT))
    if info is None:
        return None, COMMON_OBJECT
    if info.length > LARGEST_COMMON:
        raise UserError(f"checkpoint {checkpoint}: {COMMON_OBJECT} has {info.length:,} bytes: at most {LARGEST_COMMON:,} are read")
    with open(checkpoint / info.relative_path, "rb") as file:
        file.seek(info.offset)
        return file.read(info.length), COMMON_OBJECT
