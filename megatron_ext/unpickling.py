"""The only place that unpickles: a checkpoint's pickles are read without running what they ask for.

A `torch_dist` checkpoint holds three kinds of pickles: its index (`.metadata`), megatron's `common.pt`, and the objects among
the tensors in the `.distcp` files. torch and megatron would load the first and the last with plain `pickle`, which calls any
function that the file names. Here

- the index is unpickled into stand-ins, which keep what they are told and do nothing, and only under the names that an index
  needs; the real classes are then built from plain numbers and strings that were looked at;
- so are the arguments that Megatron-LM keeps beside the tensors (`load_inert`), of which `hf/stored_arguments.py` hands on numbers,
  texts and flags;
- everything else goes through `torch.load(weights_only=True)`;
- `only_plain_data` puts both in the place of torch's own functions while megatron loads, so that those cannot be reached.

The tensors themselves torch always loads with `weights_only=True`.
"""

import contextlib
import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ext.checkpoint_files import check_links, inside
from megatron_ext.errors import UserError, one_line
from megatron_ext.regular_file import read_small_file

INDEX_FILE = ".metadata"
COMMON_FILE = "common.pt"
BACKEND_FILE = "metadata.json"
BACKEND = "torch_dist"

LARGEST_INDEX = 2**30
"""Bytes of `.metadata`: 78,080 entries take 11 MB."""
LARGEST_COMMON = 2**30
LARGEST_BACKEND = 2**20
LARGEST_ARGUMENTS = 2**26

CHECKPOINT = "torch.distributed.checkpoint"
INDEX_GLOBALS = {
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "torch.Size",
    "torch.serialization._get_layout",
    f"{CHECKPOINT}.filesystem._StorageInfo",
    f"{CHECKPOINT}.filesystem._StoragePrefix",
    *(
        f"{CHECKPOINT}.metadata.{name}"
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(f"torch.distributed._shard.sharded_tensor.metadata.{name}" for name in ("MEM_FORMAT_ENCODING", "TensorProperties")),  # old
    # The plans that megatron keeps in the index: read past, and dropped.
    *(f"{CHECKPOINT}.planner.{name}" for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
}
"""Names that an index may hold, found in those that torch 2.13 writes with megatron-core 0.16.1 and 0.19.2, and in older ones."""

DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
"""`torch.float32` -> torch.float32."""


class _StandIn:
    """An object of the index: arguments and state as the file gives them."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ForeignGlobalError(pickle.UnpicklingError):
    """The index names something that it never needs."""


class _IndexUnpickler(pickle.Unpickler):
    """Gives stand-ins for the names of `INDEX_GLOBALS`, the data types themselves, and nothing else. Imports nothing."""

    def __init__(self, file: Any):
        super().__init__(file)
        self._stand_ins: dict[str, type[_StandIn]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Called for every global in the file."""
        full = f"{module}.{name}"
        if full in DTYPES:
            return DTYPES[full]
        if full not in INDEX_GLOBALS:
            raise _ForeignGlobalError(full)
        if full not in self._stand_ins:
            # Classes of this one unpickler: a file that sets attributes of a class spoils nothing that outlives it.
            self._stand_ins[full] = type(full, (_StandIn,), {})
        return self._stand_ins[full]


class _Inert(_StandIn):
    """Stands for an object of any class: keeps its state, and drops what it is asked to hold as a container."""

    def _drop(self, *values: Any) -> None:
        pass

    __setitem__ = append = extend = add = _drop


class _InertUnpickler(pickle.Unpickler):
    """Gives a stand-in for every name, and for every tensor's storage. Imports nothing, calls nothing of the file's choice."""

    def find_class(self, module: str, name: str) -> Any:
        """Called for every global in the file."""
        return type(f"{module}.{name}", (_Inert,), {})

    def persistent_load(self, place: Any) -> Any:
        """Called for every tensor's storage."""
        return _Inert(place)


def load_inert(content: bytes) -> Any:
    """What `torch.save` wrote, with stand-ins for all objects and tensors; nothing of it is run.

    Raises:
        Exception: of any class, if it is damaged; a `ValueError` if it unpacks to more than is read.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name))
        with archive.open(name) as file:
            pickled = file.read(LARGEST_ARGUMENTS + 1)
    if len(pickled) > LARGEST_ARGUMENTS:
        raise ValueError(f"it holds more than {LARGEST_ARGUMENTS:,} bytes besides tensors")
    return _InertUnpickler(io.BytesIO(pickled)).load()


def read_index(checkpoint: Path) -> Metadata:
    """The index of a checkpoint of which nothing but tensors is read: what else it holds is neither looked at nor loaded.

    Raises:
        UserError: it is missing or damaged, of another format, names code, or names files or bytes outside the checkpoint.
    """
    check_links(checkpoint)
    _check_backend(checkpoint)
    return read_metadata(checkpoint)


def read_metadata(checkpoint: Path) -> Metadata:
    """The checkpoint's index, without the saving ranks' plans.

    Args:
        checkpoint: a checkpoint directory.

    Raises:
        UserError: it is missing or damaged, names code, or names files or bytes outside the checkpoint.
    """
    path = inside(checkpoint, INDEX_FILE, f"checkpoint {checkpoint}")
    try:
        index = _IndexUnpickler(io.BytesIO(read_small_file(path, LARGEST_INDEX))).load()
    except UserError:
        raise
    except _ForeignGlobalError as error:
        raise _foreign(checkpoint, INDEX_FILE, str(error)) from None
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"checkpoint {checkpoint}: {INDEX_FILE} cannot be read ({one_line(error)})") from None
    try:
        return _Index(checkpoint).build(index)
    except _MalformedError as error:
        raise UserError(f"checkpoint {checkpoint}: {INDEX_FILE} cannot be read (it {error})") from None


class _MalformedError(Exception):
    """The index does not hold what an index holds."""


class _Index:
    """Builds torch's `Metadata` from stand-ins."""

    def __init__(self, checkpoint: Path):
        self._checkpoint = checkpoint
        self._sizes: dict[str, int] = {}

    def build(self, index: Any) -> Metadata:
        """Look at every part, and build what torch expects."""
        fields = _fields(index, "Metadata")
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for place, info in _items(fields, "storage_data"):
            key = self._place(place)
            if key in storage:
                raise _MalformedError(f"holds {key.fqn} twice")
            storage[key] = self._storage(info)
        entries = {_text(name): self._entry(name, entry, storage) for name, entry in _items(fields, "state_dict_metadata")}
        version = fields.get("version")
        return Metadata(
            state_dict_metadata=entries,
            storage_data=storage,
            storage_meta=StorageMeta(),
            version=version if isinstance(version, str) else None,
        )

    def _place(self, place: Any) -> MetadataIndex:
        fields = _fields(place, "MetadataIndex")
        offset = fields.get("offset")
        number = fields.get("index")
        return MetadataIndex(
            _text(fields.get("fqn")),
            None if offset is None else _size(offset),
            None if number is None else _count(number),
        )

    def _storage(self, info: Any) -> _StorageInfo:
        """Where an entry lies: inside a file of the checkpoint, as it is."""
        fields = _fields(info, "_StorageInfo")
        name, offset, length = _text(fields.get("relative_path")), _count(fields.get("offset")), _count(fields.get("length"))
        if fields.get("transform_descriptors"):
            raise _MalformedError(f"asks to transform {name}")
        if offset + length > self._bytes_of(name):
            raise _MalformedError(f"names the bytes {offset} to {offset + length} of {name}, which has {self._bytes_of(name)}")
        return _StorageInfo(name, offset, length)

    def _bytes_of(self, name: str) -> int:
        if name not in self._sizes:
            path = inside(self._checkpoint, name, f"checkpoint {self._checkpoint}: {INDEX_FILE}")
            if not path.is_file():
                raise _MalformedError(f"names {name}, which is missing")
            self._sizes[name] = path.stat().st_size
        return self._sizes[name]

    def _entry(
        self, name: str, entry: Any, storage: dict[MetadataIndex, _StorageInfo]
    ) -> TensorStorageMetadata | BytesStorageMetadata:
        if kind_name(entry) == f"{CHECKPOINT}.metadata.BytesStorageMetadata":
            if MetadataIndex(name) not in storage:
                raise _MalformedError(f"does not say where {name} is")
            return BytesStorageMetadata()
        fields = _fields(entry, "TensorStorageMetadata")
        dtype = _dtype(fields.get("properties"))
        chunks = [_chunk(chunk) for chunk in _list(fields.get("chunks"))]
        for chunk in chunks:
            info = storage.get(MetadataIndex(name, chunk.offsets))
            # A tensor is no larger than its file, so that a few bytes cannot ask for terabytes of memory.
            if info is None or info.length < math.prod(chunk.sizes) * dtype.itemsize:
                raise _MalformedError(f"does not say where the {list(chunk.sizes)} values of {name} are")
        size = _size(fields.get("size"))
        if math.prod(size) > sum(math.prod(chunk.sizes) for chunk in chunks):
            raise _MalformedError(f"lacks a part of {name}")
        return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def kind_name(value: Any) -> str:
    """Name of a value's class, that of a stand-in's class included."""
    return type(value).__name__


def _fields(value: Any, name: str) -> dict[Any, Any]:
    """State of a stand-in for torch's class of this name."""
    state = value.state if isinstance(value, _StandIn) and kind_name(value).endswith(f".{name}") else None
    if not isinstance(state, dict):
        raise _MalformedError(f"holds {kind_name(value)} where {name} is expected")
    return state


def _items(fields: dict[Any, Any], name: str) -> Iterable[tuple[Any, Any]]:
    if not isinstance(fields.get(name), dict):
        raise _MalformedError(f"has no {name}")
    return fields[name].items()


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _MalformedError("has no list of chunks for a tensor")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _MalformedError(f"holds {kind_name(value)} where a name is expected")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise _MalformedError(f"holds {kind_name(value)} where a number of bytes or a position is expected")
    return value


def _size(value: Any) -> torch.Size:
    arguments = value.arguments if isinstance(value, _StandIn) and kind_name(value) == "torch.Size" else ()
    if len(arguments) != 1 or not isinstance(arguments[0], tuple | list):
        raise _MalformedError(f"holds {kind_name(value)} where a shape is expected")
    return torch.Size([_count(number) for number in arguments[0]])


def _chunk(value: Any) -> ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata")
    return ChunkStorageMetadata(_size(fields.get("offsets")), _size(fields.get("sizes")))


def _dtype(properties: Any) -> torch.dtype:
    """The data type: the first of the values that torch writes of a tensor's properties. The others are constant."""
    state = properties.state if isinstance(properties, _StandIn) else None
    if not isinstance(state, tuple) or not state or not isinstance(state[0], torch.dtype):
        raise _MalformedError("holds no data type for a tensor")
    return state[0]


def refuse_foreign_code(checkpoint: Path) -> Metadata:
    """Look through all that is unpickled when a checkpoint is loaded, running nothing and reading no tensor.

    Args:
        checkpoint: a checkpoint directory.

    Returns:
        Its index.

    Raises:
        UserError: something in it is code, is damaged, or leads out of the directory.
    """
    check_links(checkpoint)
    _check_backend(checkpoint)
    metadata = read_metadata(checkpoint)
    if os.path.lexists(checkpoint / COMMON_FILE):  # whatever it is, megatron would open it
        read_common(checkpoint)
    objects = [
        (metadata.storage_data[MetadataIndex(name)], name)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, BytesStorageMetadata)
    ]
    for file_name, group in itertools.groupby(sorted(objects, key=_position), key=lambda item: item[0].relative_path):
        with open(checkpoint / file_name, "rb") as file:
            for info, name in group:
                file.seek(info.offset)
                _load_plain(torch.load, io.BytesIO(file.read(info.length)), checkpoint, f"{name} in {file_name}")
    return metadata


def read_common(checkpoint: Path) -> dict[Any, Any]:
    """What megatron stores beside the tensors: the optimizer's parameter groups, as plain data.

    Raises:
        UserError: it is missing, damaged, or holds code.
    """
    try:
        content = read_small_file(checkpoint / COMMON_FILE, LARGEST_COMMON)
    except OSError as error:
        raise UserError(f"checkpoint {checkpoint}: {COMMON_FILE} cannot be read ({error.strerror})") from None
    common = _load_plain(torch.load, io.BytesIO(content), checkpoint, COMMON_FILE)
    if not isinstance(common, dict):
        raise UserError(f"checkpoint {checkpoint}: {COMMON_FILE} holds {kind_name(common)} where a dictionary is expected")
    return common


def _position(item: tuple[_StorageInfo, str]) -> tuple[str, int]:
    return item[0].relative_path, item[0].offset


def _check_backend(checkpoint: Path) -> None:
    """megatron picks its reader by this file."""
    path = checkpoint / BACKEND_FILE
    try:
        tree = json.loads(read_small_file(path, LARGEST_BACKEND)) if path.exists() else {"sharded_backend": BACKEND}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint {checkpoint}: {BACKEND_FILE} cannot be read ({one_line(error)})") from None
    found = tree.get("sharded_backend") if isinstance(tree, dict) else tree
    if found != BACKEND:
        raise UserError(f"checkpoint {checkpoint}: {BACKEND_FILE} names the format {found!r:.40}; this version reads {BACKEND}")


@contextlib.contextmanager
def only_plain_data(checkpoint: Path) -> Iterator[None]:
    """While this lasts, torch reads indexes through `read_metadata`, and every `torch.load` is one of weights only.

    For megatron's `dist_checkpointing.load`, whose reader and planner cannot be chosen: 0.16.1 and 0.19.x name them in their own
    code. Both come down to these two functions of torch, which are put back afterwards. Can go when torch's `FileSystemReader`
    and `DefaultLoadPlanner` unpickle plain data only.

    Args:
        checkpoint: the directory that is being loaded, for error messages.
    """

    def read(reader: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(reader.path))

    originals = FileSystemReader.read_metadata, torch.load

    @functools.wraps(torch.load)
    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        return _load_plain(originals[1], file, checkpoint, "an object")

    FileSystemReader.read_metadata, torch.load = read, load  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FileSystemReader.read_metadata, torch.load = originals  # type: ignore[method-assign, assignment]


def _load_plain(load: Callable[..., Any], file: Any, checkpoint: Path, what: str) -> Any:
    """`torch.load` of tensors, numbers, strings and containers; its errors as one line."""
    try:
        value = load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"unrecognized function (.+)", str(error))
        if found:
            raise _foreign(checkpoint, what, found[1]) from None
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().splitlines() or [type(error).__name__]
        raise UserError(f"checkpoint {checkpoint}: {what} is not plain data ({reason[0]:.200})") from None
    except Exception as error:  # a damaged archive raises anything
        raise UserError(f"checkpoint {checkpoint}: {what} cannot be read ({one_line(error)})") from None
    if not isinstance(value, torch.Tensor) and any(_may_be_pickled(leaf) for leaf in _leaves(value)):
        # Transformer Engine keeps the state of FP8 modules as a pickle in a tensor of bytes, and would unpickle it.
        raise UserError(f"checkpoint {checkpoint}: {what} holds bytes that could be code: FP8 state is not supported")
    return value


def _may_be_pickled(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype in (torch.uint8, torch.int8) and value.numel() > 0
    return isinstance(value, bytes | bytearray) and len(value) > 0


def _leaves(tree: Any) -> Iterator[Any]:
    """What is in nested containers, each container once: a pickle can hold itself."""
    seen: set[int] = set()
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list | tuple | set):
            if id(value) not in seen:
                seen.add(id(value))
                waiting.extend(value.values() if isinstance(value, dict) else value)
        else:
            yield value


def _foreign(checkpoint: Path, where: str, name: str) -> UserError:
    return UserError(f"checkpoint {checkpoint}: {where} holds the global {name}, which a checkpoint never needs: it was not loaded")
