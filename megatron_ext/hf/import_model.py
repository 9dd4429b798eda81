"""A Hugging Face model folder as a checkpoint to start training from: converted tensor by tensor, verified, then published."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from megatron_ext.hf.mask_token import MaskToken, add_mask_token, copy_tokenizer
from megatron_ext.hf.output_folder import check_destination, published_when_complete
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
    verification: VerificationReport | None
    """None without reference logits."""


def import_model(
    folder: Path, checkpoint: Path, *, with_mask_token: bool = False, reference_logits: ReferenceLogits | None = None
) -> ImportReport:
    """Turn a model folder, as a download from a hub leaves it, into a checkpoint. Nothing is fetched, no code of it is run.

    Args:
        folder: with `config.json`, safetensors and a tokenizer.
        checkpoint: destination; must not exist, or be empty.
        with_mask_token: give the tokenizer a mask token if it has none.
        reference_logits: the training code's forward pass, to verify with; None leaves verification out.

    Raises:
        UserError: the model is none that can be represented, or a file is missing or damaged.
        VerificationError: the checkpoint is not the model; nothing is left at `checkpoint`.
    """
    check_destination(checkpoint)
    config = read_config(folder)
    source = WeightSource(folder)
    with published_when_complete(checkpoint) as aside:
        copy_tokenizer(folder, aside / TOKENIZER_FOLDER)
        tokenizer, mask = _tokenizer(aside / TOKENIZER_FOLDER, with_mask_token)
        vocab_size = max(config.vocab_size, tokenizer.vocab_size)
        mappings = build_mappings(config.encoder, vocab_size, vocab_size)
        conversion = _Conversion(source, config, tokenizer, mask, vocab_size)
        conversion.check(mappings)
        write_tensors(aside, [conversion.lazy(mapping) for mapping in mappings])
        _write_record(aside, folder, config, source, tokenizer, mask, vocab_size)
        length = config.encoder.max_position_embeddings
        verification = reference_logits and verify_import(
            folder, aside, family=config.family, tokenizer=tokenizer, max_length=length, reference_logits=reference_logits
        )
    dtype = DTYPES[source.dtypes["model.embed_tokens.weight"]]
    parameters = sum(mapping.parameters for mapping in mappings)
    return ImportReport(checkpoint, config.family.architecture, parameters, dtype, vocab_size, mask, verification)


def _tokenizer(folder: Path, with_mask_token: bool) -> tuple[Tokenizer, MaskToken | None]:
    if with_mask_token:
        return add_mask_token(folder)
    tokenizer = load_tokenizer(folder)
    return tokenizer, None if tokenizer.mask_id is None else MaskToken("present", tokenizer.mask_id)


@dataclass(frozen=True)
class _Conversion:
    """From a folder's tensors to the checkpoint's."""

    source: WeightSource
    config: ImportedConfig
    tokenizer: Tokenizer
    mask: MaskToken | None
    vocab_size: int

    def check(self, mappings: list[Mapping]) -> None:
        """Hold names and shapes of the folder against the table, so that nothing is left out or made up.

        Raises:
            UserError: naming the first that differs.
        """
        shapes = {name: shape for mapping in mappings for name, shape in self._expected(mapping).items()}
        zeros = self.config.family.zero_tensors(self.config.encoder)
        extra = set(self.source.shapes) - set(shapes) - set(zeros)
        if self.config.encoder.tie_embeddings and "lm_head.weight" in extra:
            extra.remove("lm_head.weight")
            self._check_equal("lm_head.weight", self.source.read("model.embed_tokens.weight"))
        if extra:
            raise UserError(
                f"{self.source.folder} holds {min(extra)}, which a {self.config.family.architecture} of its shape does not"
            )
        for name, shape in (shapes | zeros).items():
            if name not in self.source.shapes:
                raise UserError(f"{self.source.folder} lacks {name}, which its config.json asks for")
            if self.source.shapes[name] != shape:
                found, wanted = list(self.source.shapes[name]), list(shape)
                raise UserError(f"{self.source.folder}: {name} has the shape {found}, its config.json asks for {wanted}")
            if self.source.dtypes[name] not in DTYPES:
                raise UserError(
                    f"{self.source.folder}: {name} is stored as {self.source.dtypes[name]}: allowed are {', '.join(DTYPES)}"
                )
        for name, shape in zeros.items():
            self._check_equal(name, torch.zeros(shape))

    def lazy(self, mapping: Mapping) -> LazyTensor:
        """One tensor of the checkpoint, to be made when its turn comes."""
        dtype = DTYPES[self.source.dtypes[mapping.hf_names[0]]]

        def load() -> Tensor:
            parts = tuple(self._part(mapping, name).to(dtype) for name in mapping.hf_names)
            tensor = mapping.from_hf(parts).contiguous()
            if not torch.isfinite(tensor).all():
                raise UserError(f"{self.source.folder}: {mapping.hf_names[0]} holds NaN or infinity")
            return tensor

        return LazyTensor(mapping.megatron_key, mapping.converter.megatron_shape, dtype, load)

    def _expected(self, mapping: Mapping) -> dict[str, tuple[int, ...]]:
        """Shapes as the folder has them: without the row that is made for the mask token."""
        if isinstance(mapping.converter, StripVocabularyPadding):
            return {mapping.hf_names[0]: (self.config.vocab_size, self.config.encoder.hidden_size)}
        return dict(zip(mapping.hf_names, mapping.converter.hf_shapes, strict=True))

    def _part(self, mapping: Mapping, name: str) -> Tensor:
        tensor = self.source.read(name)
        if not isinstance(mapping.converter, StripVocabularyPadding) or self.mask is None or self.mask.how == "present":
            return tensor
        mean = mean_of_tokens(tensor, self.tokenizer, self.mask.id)
        if self.vocab_size > len(tensor):
            tensor = torch.cat([tensor, mean.expand(self.vocab_size - len(tensor), -1)])
        tensor[self.mask.id] = mean
        return tensor

    def _check_equal(self, name: str, wanted: Tensor) -> None:
        if not torch.equal(self.source.read(name).float(), wanted.float()):
            raise UserError(
                f"{self.source.folder} cannot be imported: {name} is not "
                + (
                    "the embedding, though config.json ties them"
                    if name == "lm_head.weight"
                    else "zero, and our model has no such bias"
                )
            )


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
    source: WeightSource,
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
            "files": {"config.json": sha256(folder / "config.json"), **source.sums()},
            "mask_token": None if mask is None else {**asdict(mask), "embedding": "as it was" if mask.how == "present" else "mean"},
        },
        "encoder": vars(config.encoder),
        "vocab_size": vocab_size,
        "padded_vocab_size": vocab_size,
        "tokenizer": {"path": TOKENIZER_FOLDER, "fingerprint": tokenizer.fingerprint},
        "data": [],
        "parallel": {},
        "config": {"data": {}, "training": {}},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "files": describe_files(aside, sorted(names)),
    }
    (aside / RUN_FILE).write_text(json.dumps(seal(record), indent=1))
    read_run_file(aside)
