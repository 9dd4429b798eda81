"""A Hugging Face folder or a stock Megatron checkpoint as one to start training from: converted by tensor, verified, published."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ext.checkpoint_files import TOKENIZER_FOLDER
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.hf.checkpoint_writer import LazyTensor, write_tensors
from megatron_ext.hf.finite import all_finite
from megatron_ext.hf.folder_source import FolderSource
from megatron_ext.hf.import_config import ImportedConfig
from megatron_ext.hf.import_record import write_record
from megatron_ext.hf.mask_token import MaskToken, add_mask_token, check_ids
from megatron_ext.hf.output_folder import check_destination, published_when_complete
from megatron_ext.hf.stock_checkpoint import StockSource, StockVerification, is_stock_checkpoint
from megatron_ext.hf.summed_files import SummedFiles
from megatron_ext.hf.verify import ReferenceLogits, VerificationReport
from megatron_ext.hf.weight_map import Mapping, build_mappings, is_vocabulary


@dataclass(frozen=True)
class ImportReport:
    """What was written."""

    checkpoint: Path
    architecture: str
    parameters: int
    dtype: torch.dtype
    vocab_size: int
    mask_token: MaskToken | None
    verification: VerificationReport | StockVerification | None
    """None without reference logits."""


class Source(Protocol):
    """A model to be imported, wherever it comes from."""

    folder: Path
    config: ImportedConfig
    origin: dict[str, Any]
    """What else `run.json` is to keep of it."""

    def copy_tokenizer(self, target: Path) -> Path:
        """Put the tokenizer into a new folder; returns what to load it from: the folder, or a file in it."""

    def sums(self) -> dict[str, str]:
        """BLAKE3 sums of the files that it was read from, by name; asked for when all was read."""

    def check(self, mappings: list[Mapping]) -> None:
        """Refuse what the table does not ask for, lacks, or asks for otherwise."""

    def dtype(self, mapping: Mapping) -> torch.dtype:
        """Of the tensor in the checkpoint."""

    def read(self, mapping: Mapping) -> Tensor:
        """One tensor in megatron's layout and its stored dtype; of the vocabulary, the rows that the model has."""

    def verify(
        self, checkpoint: Path, mappings: list[Mapping], tokenizer: Tokenizer, reference_logits: ReferenceLogits
    ) -> VerificationReport | StockVerification:
        """Hold the checkpoint against the source. Raises `VerificationError`."""


def import_model(
    folder: Path,
    checkpoint: Path,
    *,
    with_mask_token: bool = False,
    tokenizer: Path | None = None,
    model_fields: dict[str, Any] | None = None,
    files: SummedFiles | None = None,
    reference_logits: ReferenceLogits | None = None,
) -> ImportReport:
    """Turn a model into a checkpoint. Nothing is fetched, no code of it is run.

    Args:
        folder: a Hugging Face folder with `config.json`, safetensors and a tokenizer, as a download from a hub leaves it; or a
            checkpoint of megatron-core's GPTModel (`iter_*`, or the folder above it).
        checkpoint: destination; must not exist, or be empty.
        with_mask_token: give the tokenizer a mask token if it has none.
        tokenizer: of a megatron checkpoint, which holds none: a SentencePiece file or a folder.
        model_fields: shape of a megatron checkpoint that does not say it: fields of `ModelConfig`.
        files: the weight files of a Hugging Face folder, if they are being summed already.
        reference_logits: the training code's forward pass, to verify with; None leaves verification out.

    Raises:
        UserError: the model is none that can be represented, or a file is missing or damaged.
        VerificationError: the checkpoint is not the model; nothing is left at `checkpoint`.
    """
    check_destination(checkpoint)
    source = _open(folder, tokenizer, model_fields, files)
    with published_when_complete(checkpoint) as aside:
        path = source.copy_tokenizer(aside / TOKENIZER_FOLDER)
        check_ids(source.folder, load_tokenizer(path), source.config.vocab_size)
        new_tokenizer, mask = _tokenizer(path, with_mask_token)
        vocab_size = max(source.config.vocab_size, new_tokenizer.vocab_size)
        mappings = build_mappings(source.config.encoder, vocab_size, vocab_size)
        source.check(mappings)
        conversion = _Conversion(source, new_tokenizer, mask, vocab_size)
        written = write_tensors(aside, [conversion.lazy(mapping) for mapping in mappings])
        origin = {"folder": source.folder.resolve().name, **source.origin, "files": source.sums()}
        write_record(aside, source.config, origin, new_tokenizer, mask, vocab_size, written)
        verification = reference_logits and source.verify(aside, mappings, new_tokenizer, reference_logits)
    parameters = sum(mapping.parameters for mapping in mappings)
    architecture = source.config.family.architecture
    return ImportReport(checkpoint, architecture, parameters, source.dtype(mappings[0]), vocab_size, mask, verification)


def _open(folder: Path, tokenizer: Path | None, model_fields: dict[str, Any] | None, files: SummedFiles | None) -> Source:
    if is_stock_checkpoint(folder):
        if tokenizer is None:
            raise UserError(f"checkpoint {folder} of megatron holds no tokenizer: name it with --tokenizer PATH")
        return StockSource(folder, tokenizer, model_fields)
    for option, value in (("--tokenizer", tokenizer), ("--model-config", model_fields)):
        if value is not None:
            raise UserError(f"{option} is for megatron checkpoints: {folder} has, or lacks, its own as a Hugging Face folder")
    return FolderSource(folder, files)


def _tokenizer(path: Path, with_mask_token: bool) -> tuple[Tokenizer, MaskToken | None]:
    tokenizer = load_tokenizer(path)
    if tokenizer.mask_id is not None:
        return tokenizer, MaskToken("present", tokenizer.mask_id)
    if not with_mask_token:
        return tokenizer, None
    if path.is_file():  # SentencePiece models cannot be changed: the same ids as a Hugging Face tokenizer
        tokenizer.to_fast().save_pretrained(path.parent)
        path.unlink()
        path = path.parent
    return add_mask_token(path)


@dataclass(frozen=True)
class _Conversion:
    """From a source's tensors to the checkpoint's."""

    source: Source
    tokenizer: Tokenizer
    mask: MaskToken | None
    vocab_size: int

    def lazy(self, mapping: Mapping) -> LazyTensor:
        """One tensor of the checkpoint, to be made when its turn comes."""
        dtype = self.source.dtype(mapping)

        def load() -> Tensor:
            tensor = self.source.read(mapping).to(dtype)
            if is_vocabulary(mapping):
                tensor = self._with_mask_row(tensor)
            if not all_finite(tensor):
                raise UserError(f"{self.source.folder}: {mapping.megatron_key} ({mapping.hf_names[0]}) holds NaN or infinity")
            return tensor.contiguous()

        return LazyTensor(mapping.megatron_key, mapping.converter.megatron_shape, dtype, load)

    def _with_mask_row(self, tensor: Tensor) -> Tensor:
        if self.mask is None or self.mask.how == "present":
            return tensor
        mean = mean_of_tokens(tensor, self.tokenizer, self.mask.id)
        if self.vocab_size > len(tensor):
            tensor = torch.cat([tensor, mean.expand(self.vocab_size - len(tensor), -1)])
        tensor[self.mask.id] = mean
        return tensor


def mean_of_tokens(embedding: Tensor, tokenizer: Tokenizer, mask_id: int) -> Tensor:
    """[h] mean of the rows of ordinary tokens: what a token without a meaning of its own starts from.

    Its logits are then average ones, and its norm is small: nothing of any single token is in it.
    """
    ordinary = torch.ones(len(embedding), dtype=torch.bool)
    ordinary[[index for index in (*tokenizer.special_ids, mask_id) if index < len(embedding)]] = False
    ordinary[tokenizer.vocab_size :] = False
    total = torch.zeros(embedding.shape[1], dtype=torch.float64)
    for rows, chosen in zip(embedding.split(8192), ordinary.split(8192), strict=True):
        total += rows[chosen].sum(dim=0, dtype=torch.float64)
    return (total / int(ordinary.sum())).to(embedding.dtype)
