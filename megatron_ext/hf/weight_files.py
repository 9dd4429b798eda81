"""The exported weights as safetensors files: planned from the table of names, written one file at a time."""

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.hf.checkpoint_reader import CheckpointReader
from megatron_ext.hf.weight_map import Mapping

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
    """Write the weights as safetensors, with an index if they fill more than one file. Memory holds one file at a time.

    Returns:
        The names of the weight files.

    Raises:
        UserError: a weight is not finite, or cannot be read.
    """
    shards = plan_shards(mappings, dtype.itemsize, largest_file)
    names = _file_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        tensors: dict[str, Tensor] = {}
        for mapping in shard:
            tensors |= {hf: tensor.contiguous() for hf, tensor in mapping.to_hf(_read(reader, mapping, dtype)).items()}
        if name == names[-1]:
            tensors |= {hf: torch.zeros(shape, dtype=dtype) for hf, shape in zeros.items()}
        _save(tensors, folder / name)
    if len(shards) > 1:
        files = {hf: name for name, shard in zip(names, shards, strict=True) for mapping in shard for hf in mapping.hf_names}
        files |= dict.fromkeys(zeros, names[-1])
        parameters = sum(mapping.parameters for mapping in mappings) + sum(map(math.prod, zeros.values()))
        metadata = {"total_parameters": parameters, "total_size": parameters * dtype.itemsize}
        index = json.dumps({"metadata": metadata, "weight_map": files}, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
    return names


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    # safetensors makes files that only their owner can read; a model folder is there to be handed on.
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


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
    if not torch.isfinite(tensor).all():
        raise UserError(f"checkpoint {reader.directory}: {mapping.megatron_key} holds NaN or infinity")
    return tensor
