"""Are the files of a data set, byte for byte, those that preprocessing wrote? Reads them whole."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.doctor.report import Report

if TYPE_CHECKING:
    from megatron_ext.data.corpus import DatasetInfo

BYTES_AT_ONCE = 2**22
SECONDS_WITHOUT_BAR = 1.0


def check_sums(prefix: str, info: "DatasetInfo", found: Report) -> dict[str, str | None]:
    """Hold `.bin` and `.idx` against the SHA-256 that the sidecar keeps of each.

    Args:
        prefix: the data set.
        info: its sidecar.
        found: takes problems, and a note where nothing is recorded.

    Returns:
        What the files have, where that was asked for: facts for the report.
    """
    sums = {f"{ending[1:]}_sha256": _check(Path(prefix + ending), info.sha256.get(ending), found) for ending in (".bin", ".idx")}
    if None in sums.values():
        found.notes.append("SHA-256 not recorded in the sidecar, which an earlier version wrote: a changed id may pass")
    return sums


def _check(path: Path, recorded: str | None, found: Report) -> str | None:
    if recorded is None:
        return None
    has = _sha256(path)
    if has != recorded:
        found.problems.append(f"{path.name} has SHA-256 {has[:12]}, {recorded[:12]} was written")
    return has


def _sha256(path: Path) -> str:
    """The sum, with a bar on stderr where that is a terminal and the file is long."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    bar = {"unit": "B", "unit_scale": True, "desc": f"SHA-256 of {path.name}", "disable": None, "delay": SECONDS_WITHOUT_BAR}
    with open(path, "rb") as file, tqdm(total=path.stat().st_size, **bar) as shown:
        while block := file.read(BYTES_AT_ONCE):
            digest.update(block)
            shown.update(len(block))
    return digest.hexdigest()
