"""What MLflow is to be told, on disk until the server has taken it.

`mlflow_spool.jsonl` is only ever appended to; `mlflow_spool.ack.json` says up to where it has been delivered. A record is
one JSON object with its `kind`:

- `start`: a process begins or continues a run: its key, name, experiment, parameters, tags, and the `step` it goes on from.
- `artifact`: a text file of the run.
- `metrics`: one reading, with its step and its own time; the time makes a repeated delivery an exact repeat.
- `tags`: tags that change during the run.
- `status`: how the run stands.

The records after a `start` belong to its run, so one spool may hold several runs that used the folder one after the other.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.secrets import redact, without_user_info
from megatron_ext.train.line_file import LineFile

SPOOL_FILE = "mlflow_spool.jsonl"
DELIVERED_FILE = "mlflow_spool.ack.json"
REJECTED_FILE = "mlflow_spool.rejected.jsonl"
START = b'{"kind": "start"'
"""How the line of a start record begins."""


@dataclass
class Delivered:
    """How much of a spool a server has taken."""

    server: str
    """Its address without credentials; another server has taken nothing yet."""
    offset: int = 0
    """Bytes of the spool that are delivered or set aside."""
    runs: dict[str, str] = field(default_factory=dict)
    """Run key -> the id that the server gave the run."""


class Spool:
    """The records of an output folder; who uses it holds the folder's lock (`folder_lock`)."""

    def __init__(self, output_dir: Path):
        self.path = output_dir / SPOOL_FILE
        self._delivered_path = output_dir / DELIVERED_FILE
        self._rejected_path = output_dir / REJECTED_FILE
        self._lines = LineFile(self.path)

    def append(self, kind: str, **fields: Any) -> None:
        """Add a record; costs one write and never raises for the disk's sake."""
        self._lines.append(json.dumps({"kind": kind, "time": int(time.time() * 1000), **fields}))

    def records(self, offset: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """The whole records from an offset on, as (offset, offset of the next, record); a damaged line has the kind `damaged`."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # being written
                yield offset, offset + len(line), _parse(line)
                offset += len(line)

    def starts(self) -> list[tuple[int, dict[str, Any]]]:
        """(offset, record) of every start, in order."""
        found, offset = [], 0
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            for line in file:
                if line.startswith(START) and line.endswith(b"\n") and (record := _parse(line))["kind"] == "start":
                    found.append((offset, record))
                offset += len(line)
        return found

    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def count(self, offset: int) -> int:
        """Records from an offset on, those that still wait for the disk included."""
        return sum(1 for _ in self.records(offset)) + self._lines.waiting

    def read_delivered(self, uri: str) -> Delivered:
        """How much a server has taken of this spool; nothing, if the file that says so is missing or of another server."""
        server = redact(without_user_info(uri))
        try:
            delivered = Delivered(**json.loads(self._delivered_path.read_text()))
        except (OSError, ValueError, TypeError):
            return Delivered(server)
        # A machine that lost power may have kept this file and lost the spool's last lines.
        delivered.offset = min(delivered.offset, self.size())
        return delivered if delivered.server == server else Delivered(server)

    def write_delivered(self, delivered: Delivered) -> None:
        """Store how much was taken. A disk that takes it not now takes it later; until then a crash means exact repeats."""
        aside = self._delivered_path.with_name(f".{DELIVERED_FILE}.writing")
        with contextlib.suppress(OSError):
            aside.write_text(json.dumps(asdict(delivered)))
            os.replace(aside, self._delivered_path)

    def set_aside(self, refused: list[tuple[dict[str, Any], str]]) -> None:
        """Keep records that the server refuses for good, each with the reason."""
        file = LineFile(self._rejected_path)
        for record, reason in refused:
            file.append(json.dumps({"time": int(time.time() * 1000), "reason": redact(reason), "record": record}))
        file.close()

    def close_file(self) -> None:
        """Nothing is appended after this."""
        self._lines.close()


class Starts:
    """The starts in a spool: which run a record belongs to, and whether a later start ran its step again."""

    def __init__(self, found: list[tuple[int, dict[str, Any]]]):
        """
        Args:
            found: (offset, record) of each, in order.
        """
        self.found = found

    def add(self, offset: int, start: dict[str, Any]) -> None:
        """Take up a start that came to the spool since."""
        if all(begin != offset for begin, _ in self.found):
            self.found.append((offset, start))

    def before(self, offset: int) -> dict[str, Any] | None:
        """The start that the record at an offset belongs to."""
        return next((start for begin, start in reversed(self.found) if begin <= offset), None)

    def beginning_of(self, run_key: str) -> int:
        """The offset of a run's first start."""
        return next(begin for begin, start in self.found if start["run_key"] == run_key)

    def supersede(self, offset: int, step: int) -> bool:
        """Whether the run was continued from an earlier step after the reading of a step at an offset."""
        own = self.before(offset)
        later = [start for begin, start in self.found if begin > offset]
        return own is not None and any(start["run_key"] == own["run_key"] and start["step"] < step for start in later)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("kind"), str):
            return record
    except ValueError:
        pass
    return {"kind": "damaged", "text": line.decode(errors="replace").rstrip("\n")}
