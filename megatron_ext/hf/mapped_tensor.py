"""Tensors that are a part of a file as it lies on the disk: nothing is read before it is used, and nothing is copied."""

import io
import math
import mmap
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

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


def load_mapped(path: Path, start: int, length: int) -> object:
    """What `torch.load` finds in an archive, tensors only; a plain tensor is not read but mapped.

    Args:
        path: of the file that the archive lies in.
        start: of the archive in it.
        length: of the archive, in bytes.

    Raises:
        Exception: of any kind, if the archive is damaged.
    """
    with open(path, "rb", buffering=0) as file, io.BufferedReader(_Part(file, start, length)) as archive:
        return _load(path, start, archive)


def _load(path: Path, start: int, archive: BinaryIO) -> object:
    place = _place_of_numbers(archive)
    archive.seek(0)
    if place is not None:
        with torch.serialization.skip_data():
            found = torch.load(archive, map_location="cpu", weights_only=True)
        size = found.numel() * found.itemsize if isinstance(found, Tensor) else None
        if size == place[1] and found.is_contiguous() and type(found) is Tensor and found.device.type == "cpu":
            return map_tensor(path, start + place[0], found.dtype, tuple(found.shape))
        archive.seek(0)
    return torch.load(archive, map_location="cpu", weights_only=True)


def _place_of_numbers(archive: BinaryIO) -> tuple[int, int] | None:
    """First byte in the archive and number of bytes of its only storage; None if it has several, or stores it in its own way."""
    with zipfile.ZipFile(archive) as entries:
        found = {entry.filename.partition("/")[2]: entry for entry in entries.infolist()}
    storages = [entry for name, entry in found.items() if name.startswith("data/")]
    if "byteorder" not in found or len(storages) != 1 or storages[0].compress_type != zipfile.ZIP_STORED:
        return None
    archive.seek(_first_byte(archive, found["byteorder"]))  # not through `zipfile`, for what we write has no sums of entries
    if archive.read(found["byteorder"].file_size) != sys.byteorder.encode():
        return None
    return _first_byte(archive, storages[0]), storages[0].file_size


def _first_byte(archive: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Of an entry's content."""
    archive.seek(entry.header_offset + LOCAL_HEADER - 4)
    name, extra = struct.unpack("<HH", archive.read(4))
    return entry.header_offset + LOCAL_HEADER + name + extra


class _Part(io.RawIOBase):
    """A part of a file, to be read as if it were one."""

    def __init__(self, file: io.RawIOBase, start: int, length: int):
        self._file, self._start, self._length = file, start, length
        self._position = 0

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
