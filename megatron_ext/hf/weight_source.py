"""The weights in a Hugging Face model folder, read one tensor at a time: safetensors only, in one file or many."""

import json
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.errors import UserError, one_line
from megatron_ext.hf.mapped_tensor import map_tensor
from megatron_ext.hf.summed_files import SummedFiles

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Of the tensors that can be read."""
DERIVED = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that old folders hold although they follow from the configuration."""


class WeightSource:
    """Names, shapes and values of a folder's tensors."""

    def __init__(self, folder: Path, files: SummedFiles | None = None):
        """Find the files and read their headers.

        Args:
            folder: of the model.
            files: those of the folder, if they have been found already.

        Raises:
            UserError: there are none, a file is damaged, or the index and the files disagree.
        """
        self.folder = folder
        self.files = files or SummedFiles(folder)
        self._place_of: dict[str, tuple[Path, int]] = {}
        """File, and first byte in it."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """By name, in the order of the files."""
        self.dtypes: dict[str, str] = {}
        """As safetensors spells them: F32, BF16, F16, ..."""
        for path in self.files.paths:
            self._read_header(path)

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored: a private view of the file, whose memory is given back with it.

        Raises:
            UserError: it cannot be read.
        """
        path, start = self._place_of[name]
        dtype, shape = TORCH_DTYPES.get(self.dtypes[name]), self.shapes[name]
        if dtype is None:
            raise UserError(f"{path}: tensor {name} is stored as {self.dtypes[name]}: allowed are {', '.join(TORCH_DTYPES)}")
        try:
            return map_tensor(path, start, dtype, shape)
        except (OSError, ValueError) as error:  # it became shorter
            raise UserError(f"{path}: tensor {name} cannot be read ({one_line(error)})") from None

    def _read_header(self, path: Path) -> None:
        try:
            with _open(path) as file:
                names = [name for name in file.keys() if not name.endswith(DERIVED)]  # noqa: SIM118 - not a dictionary
            # safetensors has looked at the header, but does not say where a tensor begins.
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            for name in names:
                if name in self._place_of:
                    raise UserError(f"{path} holds {name}, which {self._place_of[name][0].name} holds too")
                self._place_of[name] = path, 8 + length + header[name]["data_offsets"][0]
                self.shapes[name] = tuple(header[name]["shape"])
                self.dtypes[name] = header[name]["dtype"]
        except UserError:
            raise
        except Exception as error:  # safetensors raises its own error, and OSError
            raise UserError(f"{path} cannot be read as safetensors ({one_line(error)})") from None


def _open(path: Path):  # noqa: ANN202 - safetensors names no type for it
    from safetensors import safe_open

    return safe_open(str(path), framework="pt", device="cpu")
