"""A training checkpoint as a native Hugging Face model folder: converted tensor by tensor, verified, then published.

The folder is written beside its destination under a temporary name and renamed as the last act, so that what lies at the
destination is complete and, unless that was declined, verified.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_ext.checkpoint_files import GENERATION_FILE, find_damage
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.hf.checkpoint_reader import CheckpointReader
from megatron_ext.hf.families import Family, choose_family
from megatron_ext.hf.model_card import model_card
from megatron_ext.hf.output_folder import check_destination, published_when_complete
from megatron_ext.hf.verify import (
    ReferenceLogits,
    Rounding,
    VerificationReport,
    difference,
    rounded_logits,
    verification_rows,
    verify_export,
)
from megatron_ext.hf.weight_files import check_tensors, parse_size, write_weights
from megatron_ext.hf.weight_map import Mapping, build_mappings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EMBEDDING_KEY = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    folder: Path
    architecture: str
    dtype: torch.dtype
    parameters: int
    """A tied embedding counts once."""
    weight_files: tuple[str, ...]
    verifications: tuple[VerificationReport, ...]
    """Empty without reference logits; two if the weights were rounded: before and after."""
    rounding: Rounding | None
    """What rounding the weights did to the logits, if they were rounded and verified."""


def export_checkpoint(
    checkpoint: Path,
    out_dir: Path,
    *,
    family: str = "auto",
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    reference_logits: ReferenceLogits | None = None,
) -> ExportReport:
    """Export a checkpoint to a Hugging Face folder.

    Args:
        checkpoint: a `step_*` directory.
        out_dir: destination; must not exist, or be empty.
        family: a name in `FAMILIES`, or `auto`: one that has the model's shape and the attention of its last step, that which it
            was imported from first.
        dtype: float32, bfloat16 or float16; None keeps the dtype of the training.
        max_shard_size: limit of one weight file, such as `500MB` or `5GB`. A single weight is never cut.
        reference_logits: the training code's forward pass, to verify against; None leaves verification out.

    Raises:
        UserError: the checkpoint, the destination or the options do not allow it.
        VerificationError: the exported model is not the trained one; nothing is left at `out_dir`.
    """
    largest_file = parse_size(max_shard_size)
    check_destination(out_dir)
    reader = CheckpointReader(checkpoint)
    record = reader.record
    target = choose_family(family, record.encoder, record.causal, record.origin)
    mappings = build_mappings(record.encoder, record.vocab_size, record.padded_vocab_size)
    check_tensors(reader, mappings)
    if reference_logits is not None:
        _check_damage(checkpoint)
    job = _Job(reader, target, mappings, _recorded_tokenizer(reader, target), largest_file)
    dtype = dtype or reader.tensors[EMBEDDING_KEY].dtype
    parameters = sum(mapping.parameters for mapping in mappings)
    check_range(reader, dtype)
    with published_when_complete(out_dir) as folder:
        if reference_logits is None:
            files, verifications, rounding = job.write(folder, dtype), (), None
        else:
            files, verifications, rounding = job.write_and_verify(folder, dtype, reference_logits)
        card = model_card(record, target, _name(dtype), parameters, verifications, rounding)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return ExportReport(out_dir, target.architecture, dtype, parameters, files, verifications, rounding)


def _check_damage(checkpoint: Path) -> None:
    """A flipped bit reaches both sides of every other comparison: only the sums tell."""
    damage = find_damage(checkpoint)
    if damage:
        raise UserError(f"checkpoint {checkpoint} is damaged: {'; '.join(damage.values())}")


@dataclass(frozen=True)
class _Job:
    """One checkpoint on its way to one family."""

    reader: CheckpointReader
    family: Family
    mappings: list[Mapping]
    tokenizer: Tokenizer
    largest_file: int
    """Bytes."""

    def write(self, folder: Path, dtype: torch.dtype) -> tuple[str, ...]:
        """Write tokenizer, configuration and weights over what is there. Returns the names of the weight files."""
        shutil.rmtree(folder)
        folder.mkdir()
        self._write_tokenizer(folder)
        config = hf_config(self.reader, self.family, self.tokenizer, dtype)
        config.save_pretrained(folder)
        if self.family.causal:
            self._write_generation_config(folder)
        zeros = self.family.zero_tensors(self.reader.record.encoder)
        return write_weights(folder, self.reader, self.mappings, zeros, dtype, self.largest_file)

    def write_and_verify(
        self, folder: Path, dtype: torch.dtype, reference_logits: ReferenceLogits
    ) -> tuple[tuple[str, ...], tuple[VerificationReport, ...], Rounding | None]:
        """Write and compare. Weights that are to be rounded are compared first as they were trained, then as they are written."""
        record = self.reader.record
        rows = verification_rows(self.tokenizer, record.encoder.max_position_embeddings, masked=not record.causal)
        reference = reference_logits(self.reader.directory, rows)
        if not self._rounds(dtype):
            files, report = self._write_and_compare(folder, dtype, rows, reference)
            return files, (report,), None
        _, exact = self._write_and_compare(folder, torch.float32, rows, reference)
        rounded = rounded_logits(folder, self.family, rows, record.causal, dtype)
        files, report = self._write_and_compare(folder, dtype, rows, rounded)
        return files, (exact, report), difference(rounded, reference)

    def _write_and_compare(
        self, folder: Path, dtype: torch.dtype, rows: list[list[int]], reference: list[Tensor]
    ) -> tuple[tuple[str, ...], VerificationReport]:
        files = self.write(folder, dtype)
        report = verify_export(
            folder,
            family=self.family,
            reader=self.reader,
            tokenizer=self.tokenizer,
            dtype=dtype,
            token_rows=rows,
            reference=reference,
        )
        return files, report

    def _rounds(self, dtype: torch.dtype) -> bool:
        """Whether a stored tensor is more precise than `dtype`."""
        return any(torch.promote_types(info.dtype, dtype) != dtype for info in self.reader.tensors.values())

    def _write_tokenizer(self, folder: Path) -> None:
        fast = self.tokenizer.to_fast()
        fast.model_max_length = self.reader.record.encoder.max_position_embeddings
        fast.model_input_names = ["input_ids", "attention_mask"]  # neither family has token types
        fast.save_pretrained(folder)

    def _write_generation_config(self, folder: Path) -> None:
        """That of the model that was imported, if it had one, with its sampling and all its stop ids."""
        from transformers import GenerationConfig

        tokenizer = self.tokenizer
        if (tokenizer.source / GENERATION_FILE).is_file():
            shutil.copy(tokenizer.source / GENERATION_FILE, folder)
            return
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        GenerationConfig(**ids).save_pretrained(folder)


def check_range(reader: CheckpointReader, dtype: torch.dtype) -> None:
    """Refuse to round a checkpoint to a dtype in which one of its weights would become infinite.

    Raises:
        UserError: naming the tensor and its largest weight.
    """
    largest_of_dtype = torch.finfo(dtype).max
    for key, info in reader.tensors.items():
        if torch.finfo(info.dtype).max <= largest_of_dtype:
            continue
        weights = reader.read(key)
        overflows = weights.isfinite() & weights.to(dtype).isinf()
        if overflows.any():
            others = [_name(other) for other in (torch.bfloat16, torch.float32) if torch.finfo(other).max > largest_of_dtype]
            raise UserError(
                f"the dtype is {_name(dtype)}, whose largest number is {largest_of_dtype:.6g}, but checkpoint {reader.directory} "
                f"has {weights[overflows].abs().max().item():.6g} in {key}: export it as {' or '.join(others)}"
            )


def hf_config(reader: CheckpointReader, family: Family, tokenizer: Tokenizer, dtype: torch.dtype) -> "PreTrainedConfig":
    """The transformers configuration with the checkpoint's sizes.

    Raises:
        UserError: sizes that the Hugging Face classes refuse.
    """
    encoder = reader.record.encoder
    if encoder.hidden_size % encoder.num_attention_heads:
        raise UserError(
            f"checkpoint {reader.directory}: hidden_size {encoder.hidden_size} is not a multiple of num_attention_heads "
            f"{encoder.num_attention_heads}; {family.architecture} allows no other"
        )
    ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if family.architecture.endswith("ForMaskedLM"):
        ids["mask_token_id"] = tokenizer.mask_id
    return family.config(encoder, reader.record.vocab_size, _name(dtype), ids)


def _recorded_tokenizer(reader: CheckpointReader, family: Family) -> Tokenizer:
    """The tokenizer in the checkpoint, which must be the one that the data was made with."""
    record = reader.record
    tokenizer = load_tokenizer(record.tokenizer)
    if tokenizer.fingerprint != record.tokenizer_fingerprint:
        raise UserError(
            f"tokenizer {record.tokenizer}: its fingerprint {tokenizer.fingerprint[:12]} is not the one that the data was made "
            f"with, {record.tokenizer_fingerprint[:12]}"
        )
    if tokenizer.vocab_size > record.vocab_size:
        raise UserError(f"tokenizer {record.tokenizer} has {tokenizer.vocab_size} ids, the model {record.vocab_size}")
    if tokenizer.mask_id is None and family.architecture.endswith("ForMaskedLM"):
        raise UserError(f"tokenizer {record.tokenizer} has no mask token: {family.architecture} needs one")
    family.check_tokenizer(tokenizer)
    return tokenizer


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
