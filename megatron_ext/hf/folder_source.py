"""A Hugging Face model folder as something to import: what it must hold, and its tensors in megatron's layout."""

from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint_files import file_sum
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError
from megatron_ext.hf.import_config import read_config
from megatron_ext.hf.mask_token import copy_tokenizer
from megatron_ext.hf.summed_files import SummedFiles
from megatron_ext.hf.verify import ReferenceLogits, VerificationReport, verify_import
from megatron_ext.hf.weight_map import Mapping, is_vocabulary
from megatron_ext.hf.weight_source import WeightSource

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float32}
"""safetensors' name -> dtype in the checkpoint: half precision is stored as float32, which holds its every value."""


class FolderSource:
    """A Hugging Face model folder, as the source of an import (see `import_model.Source`)."""

    def __init__(self, folder: Path, files: SummedFiles | None = None):
        """Read the configuration and the headers of the weight files.

        Args:
            folder: of the model.
            files: its weight files, if they have been found already.

        Raises:
            UserError: the model is none that can be represented, or a file is missing or damaged.
        """
        self.folder = folder
        self.config = read_config(folder)
        self._weights = WeightSource(folder, files)
        self.origin = {"source": "hugging face", "base_model": self.config.base_model}

    def copy_tokenizer(self, target: Path) -> Path:
        """See `import_model.Source`."""
        copy_tokenizer(self.folder, target)
        return target

    def sums(self) -> dict[str, str]:
        """See `import_model.Source`."""
        return {"config.json": file_sum(self.folder / "config.json"), **self._weights.files.sums()}

    def check(self, mappings: list[Mapping]) -> None:
        """See `import_model.Source`."""
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
        """See `import_model.Source`."""
        # Queries, keys and values become one tensor, and may be stored differently: the widest loses nothing of any.
        return reduce(torch.promote_types, [DTYPES[self._weights.dtypes[name]] for name in mapping.hf_names])

    def read(self, mapping: Mapping) -> Tensor:
        """See `import_model.Source`."""
        self._weights.files.start()  # while they are in memory because their tensors are being read
        parts = tuple(self._weights.read(name).to(self.dtype(mapping)) for name in mapping.hf_names)
        return parts[0] if is_vocabulary(mapping) else mapping.from_hf(parts)

    def verify(
        self, checkpoint: Path, mappings: list[Mapping], tokenizer: Tokenizer, reference_logits: ReferenceLogits
    ) -> VerificationReport:
        """See `import_model.Source`."""
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
        if is_vocabulary(mapping):
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
