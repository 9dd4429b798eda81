"""A training checkpoint as a native Hugging Face model folder: converted tensor by tensor, verified, then published.

The folder is written beside its destination under a temporary name and renamed as the last act, so that what lies at the
destination is complete and, unless that was declined, verified.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.hf.checkpoint_reader import CheckpointReader
from megatron_ext.hf.model_card import model_card
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
from megatron_ext.hf.weight_map import FAMILIES, Family, Mapping

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
        family: `eurobert`, `llama`, or `auto`: as the attention of the last step was.
        dtype: float32 or bfloat16; None keeps the dtype of the training.
        max_shard_size: limit of one weight file, such as `500MB` or `5GB`. A single weight is never cut.
        reference_logits: the training code's forward pass, to verify against; None leaves verification out.

    Raises:
        UserError: the checkpoint, the destination or the options do not allow it.
        VerificationError: the exported model is not the trained one; nothing is left at `out_dir`.
    """
    largest_file = parse_size(max_shard_size)
    _check_destination(out_dir)
    reader = CheckpointReader(checkpoint)
    record = reader.record
    target = choose_family(family, record.causal)
    mappings = target.mappings(record.encoder, record.vocab_size, record.padded_vocab_size)
    check_tensors(reader, mappings)
    job = _Job(reader, target, mappings, _recorded_tokenizer(reader, target), largest_file)
    dtype = dtype or reader.tensors[EMBEDDING_KEY].dtype
    parameters = sum(mapping.parameters for mapping in mappings)
    with _published_when_complete(out_dir) as folder:
        if reference_logits is None:
            files, verifications, rounding = job.write(folder, dtype), (), None
        else:
            files, verifications, rounding = job.write_and_verify(folder, dtype, reference_logits)
        card = model_card(record, target, _name(dtype), parameters, verifications, rounding)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return ExportReport(out_dir, target.architecture, dtype, parameters, files, verifications, rounding)


def choose_family(name: str, causal: bool) -> Family:
    """The family to export to.

    Args:
        name: `auto`, or a name in `FAMILIES`.
        causal: attention of the checkpoint's last step.

    Raises:
        UserError: unknown family, or one that cannot run this checkpoint.
    """
    if name == "auto":
        name = "llama" if causal else "eurobert"
    if name not in FAMILIES:
        raise UserError(f"the family is '{name}': allowed are auto, {', '.join(FAMILIES)}")
    if FAMILIES[name].causal and not causal:
        raise UserError(
            f"the family is {name}, but the checkpoint's last step was bidirectional: a causal model would hide from each "
            "position what it was trained to see; use eurobert"
        )
    return FAMILIES[name]


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
        return write_weights(folder, self.reader, self.mappings, dtype, self.largest_file)

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
            tokenizer=self.tokenizer,
            token_rows=rows,
            reference=reference,
            trained_causal=self.reader.record.causal,
            weights=_name(dtype),
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
        from transformers import GenerationConfig

        tokenizer = self.tokenizer
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        GenerationConfig(**ids).save_pretrained(folder)


def hf_config(reader: CheckpointReader, family: Family, tokenizer: Tokenizer, dtype: torch.dtype) -> "PreTrainedConfig":
    """The transformers configuration with the checkpoint's sizes.

    Raises:
        UserError: sizes that the Hugging Face classes refuse.
    """
    from transformers import EuroBertConfig, LlamaConfig

    encoder = reader.record.encoder
    if encoder.hidden_size % encoder.num_attention_heads:
        raise UserError(
            f"checkpoint {reader.directory}: hidden_size {encoder.hidden_size} is not a multiple of num_attention_heads "
            f"{encoder.num_attention_heads}; {family.architecture} allows no other"
        )
    common: dict[str, Any] = {
        "architectures": [family.architecture],
        "dtype": _name(dtype),
        "vocab_size": reader.record.vocab_size,
        "hidden_size": encoder.hidden_size,
        "intermediate_size": encoder.ffn_hidden_size,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.num_attention_heads,
        "num_key_value_heads": encoder.num_query_groups,
        "head_dim": encoder.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": encoder.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(encoder.rotary_base)},
        "rms_norm_eps": encoder.norm_epsilon,
        "initializer_range": encoder.init_std,
        "tie_word_embeddings": encoder.tie_embeddings,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    return LlamaConfig(**common) if family.causal else EuroBertConfig(**common, mask_token_id=tokenizer.mask_id)


def _recorded_tokenizer(reader: CheckpointReader, family: Family) -> Tokenizer:
    """The tokenizer in the checkpoint, which must be the one that the data was made with."""
    record = reader.record
    tokenizer = load_tokenizer(record.tokenizer)
    if tokenizer.fingerprint != record.tokenizer_fingerprint:
        raise UserError(
            f"tokenizer {record.tokenizer}: its fingerprint {tokenizer.fingerprint[:12]} is not the one that the data was made "
            f"with, {record.tokenizer_fingerprint[:12]}"
        )
    if tokenizer.vocab_size != record.vocab_size:
        raise UserError(f"tokenizer {record.tokenizer} has {tokenizer.vocab_size} ids, the model {record.vocab_size}")
    if tokenizer.mask_id is None and not family.causal:
        raise UserError(f"tokenizer {record.tokenizer} has no mask token: {family.architecture} needs one")
    return tokenizer


def _check_destination(out_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} exists and is not an empty folder: name another one, or remove it")


@contextlib.contextmanager
def _published_when_complete(out_dir: Path) -> Iterator[Path]:
    """A folder beside `out_dir` that is renamed to it at the end of the block, or removed if the block fails."""
    folder = out_dir.absolute().parent / f".{out_dir.name}.{os.getpid()}.tmp"
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(out_dir)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
