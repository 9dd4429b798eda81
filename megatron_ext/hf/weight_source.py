"""The weights in a Hugging Face model folder, read one tensor at a time: safetensors only, in one file or many."""

import json
import math
import mmap
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint_files import sha256
from megatron_ext.errors import UserError, one_line

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Of the tensors that can be read."""
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
        self._sums = _Sums(self.files)
        self._place_of: dict[str, tuple[Path, int]] = {}
        """File, and first byte in it."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """By name, in the order of the files."""
        self.dtypes: dict[str, str] = {}
        """As safetensors spells them: F32, BF16, F16, ..."""
        for path in self.files:
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
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        self._sums.start()
        page = start - start % mmap.ALLOCATIONGRANULARITY
        try:
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), start - page + count * dtype.itemsize, access=mmap.ACCESS_COPY, offset=page)
        except (OSError, ValueError) as error:  # it became shorter
            raise UserError(f"{path}: tensor {name} cannot be read ({one_line(error)})") from None
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start - page).view(shape)

    def sums(self) -> dict[str, str]:
        """SHA-256 of every file, by its name; made in the background since the first tensor was read."""
        return self._sums.result()

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
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
                raise UserError(f"{index} names the path {name!r:.200}: only files of this folder are allowed")
            # A link is followed, as for the other files: a hub's cache is links to where the contents lie.
            if not os.path.isfile(self.folder / name):  # false, too, for a name that is too long
                raise UserError(f"{index} names {name}, which is missing")
        return [self.folder / name for name in names]

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


class _Sums:
    """Sums files in a thread, while they are in memory because their tensors are being read."""

    def __init__(self, files: list[Path]):
        self._files = files
        self._found: dict[str, str] = {}
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, if that has not been done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def result(self) -> dict[str, str]:
        """Name -> SHA-256, when all are there."""
        self.start()
        self._thread.join()
        if self._error is not None:
            raise UserError(f"{self._error.filename} cannot be read ({self._error.strerror})")
        return self._found

    def _run(self) -> None:
        try:
            self._found = {path.name: sha256(path) for path in self._files}
        except OSError as error:
            self._error = error
