"""Reads an `.idx` file without megatron's reader, which trusts what it says."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.errors import UserError

HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, number of sequences, number of document edges."""
VERSION = 1


class Damaged(Exception):
    """A file that cannot be read further; the message is one line."""


@dataclass(frozen=True)
class Index:
    """An `.idx` file, read without megatron's reader."""

    dtype: np.dtype
    lengths: np.ndarray
    """[sequences] int64 tokens in each."""
    pointers: np.ndarray
    """[sequences] int64 bytes before each."""
    edges: np.ndarray
    """[documents + 1] int64: the sequence that each document begins with, and the end."""


def read_index(path: Path) -> Index:
    """Read an index.

    Raises:
        Damaged: it is no index, or not as long as its header says.
        UserError: it cannot be read.
    """
    from megatron.core.datasets.indexed_dataset import DType

    from megatron_ext.data.index_file import INDEX_MAGIC

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if len(header) < HEADER.size or not header.startswith(INDEX_MAGIC):
        raise Damaged(f"{path.name} is not a Megatron index")
    _, version, code, sequences, edges = HEADER.unpack(header)
    if version != VERSION:
        raise Damaged(f"{path.name} has version {version}: {VERSION} is known")
    try:
        dtype = np.dtype(DType.dtype_from_code(code))
    except ValueError:
        raise Damaged(f"{path.name} has the dtype code {code}, which is none of Megatron's") from None
    needed = HEADER.size + 12 * sequences + 8 * edges
    if size not in (needed, needed + sequences):  # multimodal sets have a byte more for each sequence
        raise Damaged(f"{path.name} has {size} bytes: {sequences} sequences and {edges} document edges need {needed}")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    at = HEADER.size
    lengths = content[at : (at := at + 4 * sequences)].view("<i4")
    pointers = content[at : (at := at + 8 * sequences)].view("<i8")
    return Index(dtype, lengths.astype(np.int64), pointers, content[at : at + 8 * edges].view("<i8"))
