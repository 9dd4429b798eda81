"""Proof that a model folder holds a checkpoint's weights: names, shapes, number of parameters, and the norm of every row.

Read from the files on both sides, one tensor at a time, and without the converters: which row of a megatron tensor belongs to
which Hugging Face tensor is worked out here anew, so that a mistake there does not hide itself.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.hf.checkpoint_reader import CheckpointReader
from megatron_ext.hf.families import Family
from megatron_ext.hf.verification_error import VerificationError
from megatron_ext.hf.weight_map import Mapping, build_mappings
from megatron_ext.hf.weight_source import WeightSource
from megatron_ext.model.presets import EncoderConfig

NORM_LIMIT = 1e-9
"""Largest relative change of a row's norm: the order of summation in float64 only."""

ROWS_AT_ONCE = 8192
VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class WeightReport:
    """What the comparison of the weights measured."""

    tensors: int
    """Hugging Face tensors."""
    parameters: int
    """Numbers in them; a tied embedding counts once."""
    norm: float
    """Euclidean norm of all weights as one vector."""
    max_norm_change: float
    """Largest relative difference of a row's norm."""


def check_layout(folder: Path, reader: CheckpointReader, family: Family, dtype: torch.dtype) -> None:
    """Hold the headers of an exported folder against the checkpoint: names, dtype, vocabulary rows, number of parameters.

    Raises:
        VerificationError: naming the first that is wrong.
    """
    source, record = WeightSource(folder), reader.record
    names = {name for mapping in _mappings(reader) for name in mapping.hf_names} | family.zero_tensors(record.encoder).keys()
    if wrong := names ^ source.shapes.keys():
        raise VerificationError(f"verification failed: {min(wrong)} is {'missing' if min(wrong) in names else 'one too many'}")
    for name, found in source.dtypes.items():
        if found != SAFETENSORS_NAMES[dtype]:
            raise VerificationError(f"verification failed: {name} is stored as {found}, not {SAFETENSORS_NAMES[dtype]}")
    for mapping in _mappings(reader):
        rows = source.shapes[mapping.hf_names[0]][0]
        if mapping.megatron_key in VOCABULARY_KEYS and rows != record.vocab_size:
            raise VerificationError(
                f"verification failed: {mapping.hf_names[0]} has {rows} rows for the vocabulary of {record.vocab_size}"
            )
    padding = (record.padded_vocab_size - record.vocab_size) * record.encoder.hidden_size
    wanted = sum(math.prod(info.shape) - padding * (key in VOCABULARY_KEYS) for key, info in reader.tensors.items())
    wanted += sum(map(math.prod, family.zero_tensors(record.encoder).values()))
    if (found := sum(map(math.prod, source.shapes.values()))) != wanted:
        raise VerificationError(f"verification failed: the files hold {found:,} parameters, the checkpoint {wanted:,}")


def compare_weights(
    folder: Path, reader: CheckpointReader, family: Family, *, dtype: torch.dtype | None = None, made_row: int | None = None
) -> WeightReport:
    """Compare the norms of all rows, and the first and the last row of the vocabulary number by number.

    Args:
        folder: Hugging Face model.
        reader: the checkpoint.
        family: of the folder.
        dtype: that the checkpoint's weights were rounded to; None compares them as they are.
        made_row: the vocabulary row that an import made for the mask token, which the folder holds otherwise or not at all.

    Raises:
        VerificationError: a row differs, or a number is not finite.
    """
    source = WeightSource(folder)
    total, largest = 0.0, 0.0
    for mapping in _mappings(reader):
        weights = reader.read(mapping.megatron_key)
        weights = weights if dtype is None else weights.to(dtype)
        squares = _row_squares(weights)
        for name in mapping.hf_names:
            exported = source.read(name)
            theirs = _row_squares(exported)
            rows = _rows_of(mapping.megatron_key, name, reader.record.encoder, len(squares))
            ours = squares[rows]
            if mapping.megatron_key in VOCABULARY_KEYS:
                ours = ours[: len(theirs)]
                if made_row is not None and made_row < len(theirs):
                    ours[made_row] = theirs[made_row]
                _check_edges(name, exported, weights, made_row)
            largest = max(largest, _largest_change(name, mapping.megatron_key, theirs, ours))
            total += theirs.sum().item()
    for name in family.zero_tensors(reader.record.encoder):
        if source.read(name).count_nonzero():
            raise VerificationError(f"verification failed: {name} is not zero, and the checkpoint has no such tensor")
    parameters = sum(math.prod(shape) for shape in source.shapes.values())
    return WeightReport(len(source.shapes), parameters, math.sqrt(total), largest)


def _mappings(reader: CheckpointReader) -> list[Mapping]:
    record = reader.record
    return build_mappings(record.encoder, record.vocab_size, record.padded_vocab_size)


def _row_squares(tensor: Tensor) -> Tensor:
    """[rows] sums of squares in float64; of a vector the squares themselves."""
    parts = tensor.split(ROWS_AT_ONCE)
    return torch.cat([part.double().square().reshape(len(part), -1).sum(dim=1) for part in parts])


def _rows_of(key: str, name: str, encoder: EncoderConfig, count: int) -> Tensor:
    """Bool [count]: which rows of a megatron tensor make up a Hugging Face tensor, in their order."""
    row = torch.arange(count)
    if ".linear_qkv." in key and "layer_norm" not in key:
        # Per key/value head: its query heads, the key, the value.
        queries = encoder.num_attention_heads // encoder.num_query_groups
        place = (row // encoder.head_dim) % (queries + 2)
        kind = name.split(".")[-2]
        return {"q_proj": place < queries, "k_proj": place == queries, "v_proj": place == queries + 1}[kind]
    if key.endswith("linear_fc1.weight"):
        return (row >= encoder.ffn_hidden_size) == ("up_proj" in name)
    return row >= 0


def _largest_change(name: str, key: str, theirs: Tensor, ours: Tensor) -> float:
    """Largest relative difference of the rows' norms, [rows] sums of squares on either side."""
    if theirs.shape != ours.shape:
        raise VerificationError(f"verification failed: {name} has {len(theirs)} rows, the checkpoint's {key} {len(ours)} for it")
    for squares, place in ((theirs, name), (ours, f"the checkpoint's {key}")):
        if not squares.isfinite().all():
            raise VerificationError(f"verification failed: {place} holds NaN or infinity")
    theirs, ours = theirs.sqrt(), ours.sqrt()
    changes = (theirs - ours).abs() / ours.clamp_min(torch.finfo(torch.float64).tiny)
    row = int(changes.argmax())
    if changes[row] > NORM_LIMIT:
        raise VerificationError(
            f"verification failed: row {row} of {name} has the norm {theirs[row].item():.6g}, in the checkpoint's {key} it is "
            f"{ours[row].item():.6g}"
        )
    return changes[row].item()


def _check_edges(name: str, exported: Tensor, weights: Tensor, made_row: int | None) -> None:
    for row in {0, len(exported) - 1} - {made_row}:
        if not torch.equal(exported[row].to(weights.dtype), weights[row]):
            raise VerificationError(f"verification failed: row {row} of {name} is not the checkpoint's")
