"""A Hugging Face folder or a stock Megatron checkpoint as one to start training from: converted by tensor, verified, published."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megatron_ext.checkpoint_files import (
    FORMAT,
    RUN_FILE,
    TOKENIZER_FOLDER,
    describe_files,
    read_run_file,
    seal,
    sha256,
)
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.hf.checkpoint_writer import LazyTensor, write_tensors
from megatron_ext.hf.import_config import ImportedConfig, read_config
from megatron_ext.hf.mask_token import MaskToken, add_mask_token, check_ids, copy_tokenizer
from megatron_ext.hf.output_folder import check_destination, published_when_complete
from megatron_ext.hf.stock_checkpoint import StockSource, StockVerification, is_stock_checkpoint
from megatron_ext.hf.verify import ReferenceLogits, VerificationReport, verify_import
from megatron_ext.hf.weight_map import Mapping, StripVocabularyPadding, build_mappings
from megatron_ext.hf.weight_source import WeightSource

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float32}
"""safetensors' name -> dtype in the checkpoint: half precision is stored as float32, which holds its every value."""

DEFAULT_MASK_RATIO = 0.4


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
    files: Sequence[Path]
    """What it was read from; `run.json` keeps their sums."""
    origin: dict[str, Any]
    """What else `run.json` is to keep of it."""

    def copy_tokenizer(self, target: Path) -> Path:
        """Put the tokenizer into a new folder; returns what to load it from: the folder, or a file in it."""

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
        reference_logits: the training code's forward pass, to verify with; None leaves verification out.

    Raises:
        UserError: the model is none that can be represented, or a file is missing or damaged.
        VerificationError: the checkpoint is not the model; nothing is left at `checkpoint`.
    """
    check_destination(checkpoint)
    source = _open(folder, tokenizer, model_fields)
    with published_when_complete(checkpoint) as aside:
        path = source.copy_tokenizer(aside / TOKENIZER_FOLDER)
        check_ids(source.folder, load_tokenizer(path), source.config.vocab_size)
        new_tokenizer, mask = _tokenizer(path, with_mask_token)
        vocab_size = max(source.config.vocab_size, new_tokenizer.vocab_size)
        mappings = build_mappings(source.config.encoder, vocab_size, vocab_size)
        source.check(mappings)
        conversion = _Conversion(source, new_tokenizer, mask, vocab_size)
        _write(aside, [conversion.lazy(mapping) for mapping in mappings])
        _write_record(aside, source.folder, source.config, source, new_tokenizer, mask, vocab_size)
        verification = reference_logits and source.verify(aside, mappings, new_tokenizer, reference_logits)
    parameters = sum(mapping.parameters for mapping in mappings)
    architecture = source.config.family.architecture
    return ImportReport(checkpoint, architecture, parameters, source.dtype(mappings[0]), vocab_size, mask, verification)


def _open(folder: Path, tokenizer: Path | None, model_fields: dict[str, Any] | None) -> Source:
    if is_stock_checkpoint(folder):
        if tokenizer is None:
            raise UserError(f"checkpoint {folder} of megatron holds no tokenizer: name it with --tokenizer PATH")
        return StockSource(folder, tokenizer, model_fields)
    for option, value in (("--tokenizer", tokenizer), ("--model-config", model_fields)):
        if value is not None:
            raise UserError(f"{option} is for megatron checkpoints: {folder} has, or lacks, its own as a Hugging Face folder")
    return HuggingFaceSource(folder)


def _write(aside: Path, tensors: list[LazyTensor]) -> None:
    try:
        write_tensors(aside, tensors)
    except CheckpointException as error:  # not an `Exception`: what a tensor's source has raised, per rank
        raise next(iter(error.failures.values()))[0] from None


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


class HuggingFaceSource:
    """A Hugging Face model folder (see `Source`)."""

    def __init__(self, folder: Path):
        """Read the configuration and the headers of the weight files.

        Raises:
            UserError: the model is none that can be represented, or a file is missing or damaged.
        """
        self.folder = folder
        self.config = read_config(folder)
        self._weights = WeightSource(folder)
        self.files = (folder / "config.json", *self._weights.files)
        self.origin = {"source": "hugging face"}

    def copy_tokenizer(self, target: Path) -> Path:
        """See `Source`."""
        copy_tokenizer(self.folder, target)
        return target

    def check(self, mappings: list[Mapping]) -> None:
        """See `Source`."""
        shapes = {name: shape for mapping in mappings for name, shape in self._expected(mapping).items()}
        zeros = self.config.family.zero_tensors(self.config.encoder)
        extra = set(self._weights.shapes) - set(shapes) - set(zeros)
        if self.config.encoder.tie_embeddings and "lm_head.weight" in extra:
            extra.remove("lm_head.weight")
            self._check_equal("lm_head.weight", self._weights.read("model.embed_tokens.weight"))
        if extra:
            raise UserError(f"{self.folder} holds {min(extra)}, which a {self.config.family.architecture} of its shape does not")
        for name, shape in (shapes | zeros).items():
            if name not in self._weights.shapes:
                raise UserError(f"{self.folder} lacks {name}, which its config.json asks for")
            if self._weights.shapes[name] != shape:
                found, wanted = list(self._weights.shapes[name]), list(shape)
                raise UserError(f"{self.folder}: {name} has the shape {found}, its config.json asks for {wanted}")
            if self._weights.dtypes[name] not in DTYPES:
                raise UserError(f"{self.folder}: {name} is stored as {self._weights.dtypes[name]}: allowed are {', '.join(DTYPES)}")
        for name, shape in zeros.items():
            self._check_equal(name, torch.zeros(shape))

    def dtype(self, mapping: Mapping) -> torch.dtype:
        """See `Source`."""
        return DTYPES[self._weights.dtypes[mapping.hf_names[0]]]

    def read(self, mapping: Mapping) -> Tensor:
        """See `Source`."""
        parts = tuple(self._weights.read(name).to(self.dtype(mapping)) for name in mapping.hf_names)
        return parts[0] if _is_vocabulary(mapping) else mapping.from_hf(parts)

    def verify(
        self, checkpoint: Path, mappings: list[Mapping], tokenizer: Tokenizer, reference_logits: ReferenceLogits
    ) -> VerificationReport:
        """See `Source`."""
        return verify_import(
            self.folder,
            checkpoint,
            family=self.config.family,
            tokenizer=tokenizer,
            max_length=self.config.encoder.max_position_embeddings,
            reference_logits=reference_logits,
        )

    def _expected(self, mapping: Mapping) -> dict[str, tuple[int, ...]]:
        """Shapes as the folder has them: without the row that is made for the mask token."""
        if _is_vocabulary(mapping):
            return {mapping.hf_names[0]: (self.config.vocab_size, self.config.encoder.hidden_size)}
        return dict(zip(mapping.hf_names, mapping.converter.hf_shapes, strict=True))

    def _check_equal(self, name: str, wanted: Tensor) -> None:
        if not torch.equal(self._weights.read(name).float(), wanted.float()):
            raise UserError(
                f"{self.folder} cannot be imported: {name} is not "
                + (
                    "the embedding, though config.json ties them"
                    if name == "lm_head.weight"
                    else "zero, and our model has no such bias"
                )
            )


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
            if _is_vocabulary(mapping):
                tensor = self._with_mask_row(tensor)
            if not torch.isfinite(tensor).all():
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


def _is_vocabulary(mapping: Mapping) -> bool:
    return isinstance(mapping.converter, StripVocabularyPadding)


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


def _write_record(
    aside: Path,
    folder: Path,
    config: ImportedConfig,
    source: Source,
    tokenizer: Tokenizer,
    mask: MaskToken | None,
    vocab_size: int,
) -> None:
    names = [str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file()]
    record: dict[str, Any] = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": 0,
        "phase": "imported",
        "causal": config.family.causal,
        **dict.fromkeys(("samples", "tokens", "predicted_tokens"), 0),
        "flops": 0.0,
        "phases": [],
        "comparison_mask_ratio": DEFAULT_MASK_RATIO,
        **dict.fromkeys(("parent", "mlflow_run_id", "run_key")),
        "imported": {
            "family": config.family.name,
            "architecture": config.family.architecture,
            "folder": folder.resolve().name,
            **source.origin,
            "files": {path.name: sha256(path) for path in source.files},
            "mask_token": None if mask is None else {**asdict(mask), "embedding": "as it was" if mask.how == "present" else "mean"},
        },
        "encoder": vars(config.encoder),
        "vocab_size": vocab_size,
        "padded_vocab_size": vocab_size,
        "tokenizer": {"path": str(tokenizer.source.relative_to(aside)), "fingerprint": tokenizer.fingerprint},
        "data": [],
        "parallel": {},
        "config": {"data": {}, "training": {}},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "files": describe_files(aside, sorted(names)),
    }
    (aside / RUN_FILE).write_text(json.dumps(seal(record), indent=1))
    read_run_file(aside)
