"""Tensors that are a part of a file as it lies on the disk: nothing is read before it is used, and nothing is copied."""

import io
import math
import mmap
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAPPED = {torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2} | {
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
"""Numbers that are what their bytes say."""
LOCAL_HEADER = 30
"""Bytes of an entry of a zip archive before its name; the lengths of the name and of what follows it are the last four of them."""


def map_tensor(path: Path, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A private view of a file, whose memory is given back with it.

    Args:
        path: of the file.
        start: of the tensor's first byte.
        dtype: of the numbers, in the order of bytes of this machine.
        shape: of the contiguous tensor.

    Raises:
        OSError, ValueError: the file cannot be mapped, or is too short.
    """
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    page = start - start % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), start - page + count * dtype.itemsize, access=mmap.ACCESS_COPY, offset=page)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start - page).view(shape)


def load_mapped(path: Path, start: int, length: int, dtype: torch.dtype | None) -> object:
    """What `torch.load` finds in an archive, tensors only; a plain tensor of the dtype is not read but mapped.

    Args:
        path: of the file that the archive lies in.
        start: of the archive in it.
        length: of the archive, in bytes.
        dtype: that is expected; None: nothing is mapped.

    Raises:
        Exception: of any kind, if the archive is damaged.
    """
    with io.BufferedReader(_Part(open(path, "rb", buffering=0), start, length)) as archive:
        place = _place_of_numbers(archive, length) if dtype in MAPPED else None
        if place is not None:
            archive.seek(0)
            with torch.serialization.skip_data():
                found = torch.load(archive, map_location="cpu", weights_only=True)
            if _is_plain(found, dtype, place.size):
                return map_tensor(path, start + place.first_byte, dtype, tuple(found.shape))
        archive.seek(0)
        return torch.load(archive, map_location="cpu", weights_only=True)


def _is_plain(found: object, dtype: torch.dtype, size: int) -> bool:
    """Whether a tensor is its storage of `size` bytes, number by number."""
    if type(found) is not Tensor or found.layout != torch.strided or found.is_quantized or found.is_neg() or found.is_conj():
        return False
    return (
        (found.dtype, found.storage_offset(), found.numel() * found.itemsize) == (dtype, 0, size)
        and found.is_contiguous()
        and found.untyped_storage().nbytes() == size
    )


@dataclass(frozen=True)
class _Place:
    """Where an entry's content lies in an archive."""

    first_byte: int
    size: int


def _place_of_numbers(archive: BinaryIO, length: int) -> _Place | None:
    """Of an archive's only storage; None if it has several, or stores it in its own way."""
    with zipfile.ZipFile(archive) as entries:
        found = {entry.filename.partition("/")[2]: entry for entry in entries.infolist()}
    storages = [entry for name, entry in found.items() if name.startswith("data/")]
    if "byteorder" not in found or len(storages) != 1:
        return None
    order, numbers = (_place_of(archive, length, entry) for entry in (found["byteorder"], *storages))
    if order is None or numbers is None:
        return None
    archive.seek(order.first_byte)  # not through `zipfile`, for what we write has no sums of entries
    return numbers if archive.read(order.size) == sys.byteorder.encode() else None


def _place_of(archive: BinaryIO, length: int, entry: zipfile.ZipInfo) -> _Place | None:
    """None if the entry is compressed, or its own header is not what the archive's index says."""
    archive.seek(entry.header_offset)
    header = archive.read(LOCAL_HEADER)
    if entry.compress_type != zipfile.ZIP_STORED or len(header) < LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        return None
    name, extra = struct.unpack("<HH", header[-4:])
    place = _Place(entry.header_offset + LOCAL_HEADER + name + extra, entry.file_size)
    is_inside = place.first_byte + place.size <= length
    return place if is_inside and archive.read(name) == entry.orig_filename.encode() else None


class _Part(io.RawIOBase):
    """A part of a file, to be read as if it were one."""

    def __init__(self, file: io.RawIOBase, start: int, length: int):
        self._file, self._start, self._length = file, start, length
        self._position = 0

    def close(self) -> None:
        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._position)])
        self._position += count
        return count
