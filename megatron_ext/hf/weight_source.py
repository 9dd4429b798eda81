"""The weights in a Hugging Face model folder, read one tensor at a time: safetensors only, in one file or many."""

import json
from pathlib import Path

from torch import Tensor

from megatron_ext.checkpoint_files import inside
from megatron_ext.errors import UserError, one_line

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DERIVED = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that old folders hold although they follow from the configuration."""


class WeightSource:
    """Names, shapes and values of a folder's tensors."""

    def __init__(self, folder: Path):
        """Find the files and read their headers.

        Raises:
            UserError: there are none, a file is damaged, or the index and the files disagree.
        """
        self.folder = folder
        self.files = self._find_files()
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """By name, in the order of the files."""
        self.dtypes: dict[str, str] = {}
        """As safetensors spells them: F32, BF16, F16, ..."""
        for path in self.files:
            self._read_header(path)

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored; its memory is its own.

        Raises:
            UserError: it cannot be read.
        """
        path = self._file_of[name]
        try:
            with _open(path) as file:
                return file.get_tensor(name).clone()
        except Exception as error:  # safetensors raises its own error, and OSError
            raise UserError(f"{path}: tensor {name} cannot be read ({one_line(error)})") from None

    def _find_files(self) -> list[Path]:
        if (self.folder / SINGLE_FILE).is_file():
            return [self.folder / SINGLE_FILE]
        index = self.folder / INDEX_FILE
        if not index.is_file():
            pickles = sorted(path.name for path in self.folder.glob("*.bin"))
            hint = f"; {pickles[0]} is a pickle, which is not read: save the model as safetensors" if pickles else ""
            raise UserError(f"{self.folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index} cannot be read as an index of weights ({one_line(error)})") from None
        files = [inside(self.folder, str(name), str(index)) for name in names]
        for path in files:
            if not path.is_file():
                raise UserError(f"{index} names {path.name}, which is missing")
        return files

    def _read_header(self, path: Path) -> None:
        try:
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    if name.endswith(DERIVED):
                        continue
                    if name in self._file_of:
                        raise UserError(f"{path} holds {name}, which {self._file_of[name].name} holds too")
                    part = file.get_slice(name)
                    self._file_of[name], self.shapes[name] = path, tuple(part.get_shape())
                    self.dtypes[name] = part.get_dtype()
        except UserError:
            raise
        except Exception as error:  # safetensors raises its own error, and OSError
            raise UserError(f"{path} cannot be read as safetensors ({one_line(error)})") from None


def _open(path: Path):  # noqa: ANN202 - safetensors names no type for it
    from safetensors import safe_open

    return safe_open(str(path), framework="pt", device="cpu")
