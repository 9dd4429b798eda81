"""The exported weights as safetensors files: planned from the table of names, written one tensor at a time."""

import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.hf.block_writing import write_blocks
from megatron_ext.hf.checkpoint_reader import CheckpointReader
from megatron_ext.hf.early_sync import EarlySync
from megatron_ext.hf.finite import all_finite
from megatron_ext.hf.one_ahead import one_ahead
from megatron_ext.hf.weight_map import Mapping

SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ALIGNMENT = 8
"""Bytes; the tensors begin at a multiple of it, as safetensors begins them."""
SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of a size such as `500MB` or `5GB` (decimal units).

    Raises:
        UserError: it is no such size.
    """
    match = re.fullmatch(r"(\d+)\s*([KMG]B)?", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise UserError(f"the maximal shard size is '{text}': allowed are sizes such as 500MB or 5GB")
    return int(match[1]) * SIZE_UNITS[match[2] or ""]


def check_tensors(reader: CheckpointReader, mappings: list[Mapping]) -> None:
    """Check that the table consumes every tensor of the checkpoint once, with the shape that the encoder's sizes ask for.

    Raises:
        UserError: naming the tensor that is missing, left over, or of another shape.
    """
    expected = {mapping.megatron_key: mapping.converter.megatron_shape for mapping in mappings}
    for kind, keys in (
        ("lacks", expected.keys() - reader.tensors.keys()),
        ("holds, beyond the encoder's tensors,", reader.tensors.keys() - expected.keys()),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"checkpoint {reader.directory} {kind} {min(keys)}{more}")
    for key, shape in expected.items():
        if reader.tensors[key].shape != shape:
            found, wanted = list(reader.tensors[key].shape), list(shape)
            raise UserError(f"checkpoint {reader.directory}: {key} has the shape {found}, run.json's encoder asks for {wanted}")


def write_weights(
    folder: Path,
    reader: CheckpointReader,
    mappings: list[Mapping],
    zeros: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    largest_file: int,
) -> tuple[str, ...]:
    """Write the weights as safetensors, with an index if they fill more than one file. Memory holds two tensors at a time.

    Returns:
        The names of the weight files.

    Raises:
        UserError: a weight is not finite, or cannot be read.
    """
    shards = plan_shards(mappings, dtype.itemsize, largest_file)
    names = _file_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        shapes = {hf: shape for mapping in shard for hf, shape in zip(mapping.hf_names, mapping.converter.hf_shapes, strict=True)}
        tensors = (part for mapping in shard for part in mapping.to_hf(_read(reader, mapping, dtype)).items())
        if name == names[-1]:
            shapes |= zeros
            tensors = itertools.chain(tensors, ((hf, torch.zeros(shape, dtype=dtype)) for hf, shape in zeros.items()))
        write_safetensors(folder / name, shapes, dtype, tensors)
    if len(shards) > 1:
        files = {hf: name for name, shard in zip(names, shards, strict=True) for mapping in shard for hf in mapping.hf_names}
        files |= dict.fromkeys(zeros, names[-1])
        parameters = sum(mapping.parameters for mapping in mappings) + sum(map(math.prod, zeros.values()))
        metadata = {"total_parameters": parameters, "total_size": parameters * dtype.itemsize}
        index = json.dumps({"metadata": metadata, "weight_map": files}, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
    return names


def write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write tensors of one dtype as they come; safetensors' own function wants all of them at once.

    The file has eight bytes with the length of the header, the header in JSON, and the tensors' bytes one after the other.

    Args:
        path: of a file that does not exist.
        shapes: of all tensors, by name, in the order in which they come.
        dtype: of all tensors.
        tensors: names and values.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    waiting = iter(shapes.items())
    with open(path, "xb") as file, EarlySync(file) as sync:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in one_ahead(tensors):
            assert (name, tuple(tensor.shape)) == next(waiting) and tensor.dtype == dtype, name
            write_blocks(file, memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
            sync.wrote(tensor.nbytes)
            del tensor  # before the next but one is made
        assert next(waiting, None) is None, path


def plan_shards(mappings: list[Mapping], itemsize: int, largest_file: int) -> list[list[Mapping]]:
    """Cut the table, in order, into files of at most `largest_file` bytes; what comes of one megatron tensor stays together."""
    shards: list[list[Mapping]] = [[]]
    size = 0
    for mapping in mappings:
        added = mapping.parameters * itemsize
        if shards[-1] and size + added > largest_file:
            shards.append([])
            size = 0
        shards[-1].append(mapping)
        size += added
    return shards


def _file_names(count: int) -> tuple[str, ...]:
    if count == 1:
        return ("model.safetensors",)
    return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def _read(reader: CheckpointReader, mapping: Mapping, dtype: torch.dtype) -> Tensor:
    tensor = reader.read(mapping.megatron_key).to(dtype)
    if not all_finite(tensor):
        raise UserError(f"checkpoint {reader.directory}: {mapping.megatron_key} holds NaN or infinity")
    return tensor
