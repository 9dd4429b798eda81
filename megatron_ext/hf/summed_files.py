"""The weight files of a Hugging Face folder: which they are, and their sums, made in the background. Without torch.

A conversion begins to sum before it imports torch, which takes longer than summing a gigabyte.
"""

import json
import os
import threading
from pathlib import Path

from megatron_ext.checkpoint_files import file_sum
from megatron_ext.errors import UserError, one_line

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class SummedFiles:
    """Files that are summed in a thread, while something else is done, or while their tensors are being read."""

    def __init__(self, folder: Path):
        """Find the files.

        Raises:
            UserError: there are none, or the index is damaged.
        """
        self.paths = find_weight_files(folder)
        self._found: dict[str, str] = {}
        self._error: str | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, if that has not been done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def sums(self) -> dict[str, str]:
        """BLAKE3 sum of every file, by its name, when all are there.

        Raises:
            UserError: a file cannot be read.
        """
        self.start()
        self._thread.join()
        if self._error is not None:
            raise UserError(self._error)
        return self._found

    def _run(self) -> None:
        for path in self.paths:
            try:
                self._found[path.name] = file_sum(path)
            except Exception as error:  # the thread has nobody else to tell
                self._error = f"{path} cannot be read ({one_line(error)})"
                return


def begin_summing(folder: Path) -> SummedFiles | None:
    """Begin with the files of a folder. None if it is none of a Hugging Face model, for whatever reason: others will say it."""
    try:
        files = SummedFiles(folder)
    except UserError:
        return None
    files.start()
    return files


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder: one, or those that its index names.

    Raises:
        UserError: there are none, or the index is damaged.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is not read: save the model as safetensors" if pickles else ""
        raise UserError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} cannot be read as an index of weights ({one_line(error)})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
            raise UserError(f"{index} names the path {name!r:.200}: only files of this folder are allowed")
        # A link is followed, as for the other files: a hub's cache is links to where the contents lie.
        if not os.path.isfile(folder / name):  # false, too, for a name that is too long
            raise UserError(f"{index} names {name}, which is missing")
    return [folder / name for name in names]
