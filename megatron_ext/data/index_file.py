"""Megatron's `.bin/.idx` pair as it lies on disk: token ids one after the other, and where each document begins.

Written here rather than by megatron-core's builder, which gives the same bytes: importing that takes as long as tokenizing tens of
megabytes. A document is one sequence of the index.
"""

import hashlib
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, number of sequences, number of documents and one."""

TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Megatron's dtype codes that can hold token ids."""

SHORT_VOCABULARY = 65_500
"""Ids of smaller vocabularies take two bytes, as megatron has it."""

BLOCK_BYTES = 2**22
"""Copied at a time."""


def token_dtype(vocab_size: int) -> np.dtype:
    """What the ids of a vocabulary are stored as."""
    return np.dtype(np.uint16 if vocab_size < SHORT_VOCABULARY else np.int32)


@contextmanager
def writing_documents(prefix: str, vocab_size: int, eos_id: int | None) -> Iterator[Callable[[list[np.ndarray]], int]]:
    """Context that gives a function to write documents with, each of ids [n]; it returns their tokens. At the end comes the index.

    Args:
        prefix: path without the endings.
        vocab_size: of the tokenizer.
        eos_id: put at the end of each document; None for nothing.
    """
    dtype, lengths = token_dtype(vocab_size), array("i")
    end = np.array([] if eos_id is None else [eos_id], dtype)
    with open(f"{prefix}.bin", "wb", buffering=BLOCK_BYTES) as file:

        def write(documents: list[np.ndarray]) -> int:
            if not documents:
                return 0
            tokens = np.concatenate([part for ids in documents for part in (ids, end)], dtype=dtype, casting="unsafe")
            file.write(tokens)
            lengths.extend([len(ids) + len(end) for ids in documents])
            return len(tokens)

        yield write
    write_index(f"{prefix}.idx", np.array(lengths, dtype=np.int32), dtype)


def write_index(path: str | Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write the index of documents of these lengths that lie one after the other.

    Args:
        path: of the `.idx` file.
        lengths: [documents] int32 tokens in each.
        dtype: of a token.
    """
    (code,) = (code for code, kind in TOKEN_TYPES.items() if kind == dtype)
    ends = np.cumsum(lengths, dtype=np.int64)
    with open(path, "wb") as file:
        file.write(INDEX_HEADER.pack(INDEX_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        for part in (lengths, (ends - lengths) * dtype.itemsize, np.arange(len(lengths) + 1)):
            part.tofile(file)


def join(prefixes: Iterable[str], joined: str, vocab_size: int) -> dict[str, str]:
    """Join pairs of `writing_documents`; SHA-256 of the whole by ending.

    Args:
        prefixes: of the parts, in order.
        joined: prefix of the whole.
        vocab_size: of the tokenizer.
    """
    lengths, digest = [], hashlib.sha256()
    with open(f"{joined}.bin", "wb") as whole:
        for prefix in prefixes:
            lengths.append(_lengths(f"{prefix}.idx"))
            with open(f"{prefix}.bin", "rb") as part:
                while block := part.read(BLOCK_BYTES):
                    digest.update(block)
                    whole.write(block)
    write_index(f"{joined}.idx", np.concatenate(lengths), token_dtype(vocab_size))
    with open(f"{joined}.idx", "rb") as file:
        return {".bin": digest.hexdigest(), ".idx": hashlib.file_digest(file, "sha256").hexdigest()}


def _lengths(path: str) -> np.ndarray:
    """[documents] int32 tokens in each, of an index of our own."""
    with open(path, "rb") as file:
        _, _, _, documents, _ = INDEX_HEADER.unpack(file.read(INDEX_HEADER.size))
        return np.fromfile(file, np.int32, documents)
