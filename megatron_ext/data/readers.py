"""Documents out of input files, in order, in bounded memory.

JSON Lines, Parquet and plain text, the text formats also as `.gz` and `.zst`. What cannot be read is yielded as a `Reject`, so
that one bad line costs one line and no line is lost silently. Blank lines of a JSON Lines file hold no record and are skipped.
"""

import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_ext.errors import UserError

ALLOWED = ".jsonl, .txt (each also with .gz or .zst) or .parquet"
KNOWN_NAME = r"\.(?:(?P<format>jsonl|txt)(?:\.gz|\.zst)?|(?P<parquet>parquet))$"
TEXT_DOCUMENTS = ("file", "paragraph", "line")
HEAD_LENGTH = 200
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CORRUPT_FILE = (OSError, EOFError, zlib.error)  # pyarrow's input errors are OSError or ValueError


@dataclass(frozen=True)
class Reject:
    """One record that gave no document.

    Causes: broken_json, missing_field, not_text, invalid_utf8, empty_text, too_long, unreadable_file.
    """

    line: int  # counted from 1; the row of a Parquet file; 0 for a whole file without the column
    cause: str
    head: str  # the first bytes of the record, undecodable ones escaped


@dataclass(frozen=True)
class ReaderSettings:
    """How documents are cut out of files."""

    json_field: str = "text"  # also the Parquet column
    text_documents: str = "file"  # of plain text: one document per file, paragraph (blank lines between) or line
    max_line_bytes: int = 64 * 2**20  # longer lines, rows and text documents are rejected as too_long

    def __post_init__(self) -> None:
        if self.text_documents not in TEXT_DOCUMENTS:
            raise UserError(f"text documents {self.text_documents!r} (allowed: {', '.join(TEXT_DOCUMENTS)})")
        if self.max_line_bytes < 1:
            raise UserError(f"longest line {self.max_line_bytes} bytes (allowed: 1 or more)")


def input_format(path: Path) -> str:
    """The format of an input file, by its name: `jsonl`, `txt` or `parquet`. Raises `UserError` for any other name."""
    match = re.search(KNOWN_NAME, path.name, re.IGNORECASE)
    if match is None:
        raise UserError(f"input {path}: unknown format (allowed: {ALLOWED})")
    return (match["format"] or match["parquet"]).lower()


def expand_inputs(paths: list[str]) -> list[Path]:
    """The files of paths, folders (all files of known formats below them, sorted) and globs, in the order given, each once.

    What `corpus.preprocess` itself leaves in a folder (rejects, unfinished shards) is not taken from folders and globs.

    Raises `UserError` for a path without any such file.
    """
    found = {path.resolve(): path for name in reversed(paths) for path in reversed(_expand(name))}
    return list(reversed(found.values()))


def _is_own_output(path: Path) -> bool:
    return path.name.endswith(".rejects.jsonl") or any(part.endswith(".shards") for part in path.parts)


def _expand(path: str) -> list[Path]:
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        found = [name for name in Path(path).rglob("*") if re.search(KNOWN_NAME, name.name, re.IGNORECASE)]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True)]
    found = sorted(name for name in found if name.is_file() and not _is_own_output(name))
    if not found:
        raise UserError(f"input {path}: no such file, folder with {ALLOWED} files, or pattern")
    return found


def read_documents(path: Path, settings: ReaderSettings) -> Iterator[tuple[int, str] | Reject]:
    """Yield (line number, text) for each document and a `Reject` for each record without one.

    A file that breaks off (a damaged archive, say) ends with a `Reject` of cause unreadable_file; what came before stands, but for
    the last 64 KiB before the damage in a `.zst` file.
    """
    reader = {"jsonl": _read_jsonl, "parquet": _read_parquet, "txt": _read_text}[input_format(path)]
    line = 0
    try:
        for record in reader(path, settings):
            line = record.line if isinstance(record, Reject) else record[0]
            yield record
    except CORRUPT_FILE as error:
        yield Reject(line + 1, "unreadable_file", _escape(f"{type(error).__name__}: {error}".encode()))


def _read_jsonl(path: Path, settings: ReaderSettings) -> Iterator[tuple[int, str] | Reject]:
    for number, (line, whole) in enumerate(_lines(path, settings.max_line_bytes), start=1):
        if not whole:
            yield Reject(number, "too_long", _escape(line))
        elif line.strip():
            yield _checked(number, line, _json_text(line, settings.json_field))


def _json_text(line: bytes, field: str) -> object:
    """The field's value, or a `Reject` cause as `_Cause`."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _Cause("invalid_utf8")
    except (ValueError, RecursionError):  # also integers of too many digits, and nesting too deep for the parser
        return _Cause("broken_json")
    if not isinstance(record, dict) or field not in record:
        return _Cause("missing_field")
    return record[field]


@dataclass(frozen=True)
class _Cause:
    """Why a record has no text."""

    name: str


def _checked(number: int, raw: bytes, value: object) -> tuple[int, str] | Reject:
    """The document, if the value is usable text."""
    if isinstance(value, _Cause):
        return Reject(number, value.name, _escape(raw))
    if not isinstance(value, str):
        return Reject(number, "not_text", _escape(raw))
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        return Reject(number, "invalid_utf8", _escape(raw))
    if not value.strip():
        return Reject(number, "empty_text", _escape(raw))
    return number, value


def _read_text(path: Path, settings: ReaderSettings) -> Iterator[tuple[int, str] | Reject]:
    for number, raw, whole in _text_blocks(path, settings):
        if not whole:
            yield Reject(number, "too_long", _escape(raw))
            continue
        try:
            yield _checked(number, raw, raw.decode("utf-8"))
        except UnicodeDecodeError:
            yield Reject(number, "invalid_utf8", _escape(raw))


def _text_blocks(path: Path, settings: ReaderSettings) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (first line, bytes, whether they are all) for each document of a plain-text file."""
    start, block, whole = 1, bytearray(), True
    for number, (line, line_whole) in enumerate(_lines(path, settings.max_line_bytes), start=1):
        blank = not line.strip()
        if settings.text_documents == "line":
            if not blank:
                yield number, line.rstrip(b"\r\n"), line_whole
            continue
        if settings.text_documents == "paragraph" and blank:
            if block:
                yield start, bytes(block).rstrip(b"\r\n"), whole
            block, whole = bytearray(), True
            continue
        if not block:
            start = number
        whole = whole and line_whole and len(block) + len(line) <= settings.max_line_bytes
        block += line if whole else line[: max(0, HEAD_LENGTH - len(block))]
    if block:
        yield start, bytes(block), whole


def _lines(path: Path, limit: int) -> Iterator[tuple[bytes, bool]]:
    """Yield (line, True) with its line end, or (head, False) for a line of more than `limit` bytes, never held whole."""
    with _open(path) as stream:
        first = True
        while line := stream.readline(limit + 1):
            if first:
                line, first = line.removeprefix(BYTE_ORDER_MARK), False
            whole = len(line) <= limit or line.endswith(b"\n")
            rest = line
            while not whole and rest and not rest.endswith(b"\n"):
                rest = stream.readline(min(limit, 2**20) + 1)
            yield (line, True) if whole else (line[:HEAD_LENGTH], False)


def _open(path: Path) -> BinaryIO:
    """A buffered byte stream of a file, decompressed by its name."""
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.lower().endswith(".zst"):
        import pyarrow

        # pyarrow rather than zstandard: its stream tells a cut-off file from a finished one.
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), 2**16)
    return open(path, "rb", buffering=2**20)


def _read_parquet(path: Path, settings: ReaderSettings) -> Iterator[tuple[int, str] | Reject]:
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if settings.json_field not in table.schema_arrow.names:
                head = f"{table.metadata.num_rows} rows, columns: {', '.join(table.schema_arrow.names)}"
                yield Reject(0, "missing_field", _escape(head.encode()))
                return
            for batch in table.iter_batches(batch_size=256, columns=[settings.json_field]):
                for scalar in batch.column(0):
                    row += 1
                    yield _parquet_document(row, scalar, settings.max_line_bytes)
    except pyarrow.ArrowException as error:
        raise EOFError(str(error)) from error


def _parquet_document(row: int, scalar, limit: int) -> tuple[int, str] | Reject:
    try:
        value = scalar.as_py()
        value = value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        return Reject(row, "invalid_utf8", _escape(bytes(error.object)))
    raw = str(value).encode("utf-8", "surrogatepass")
    return Reject(row, "too_long", _escape(raw)) if len(raw) > limit else _checked(row, raw, value)


def _escape(raw: bytes) -> str:
    """The first bytes of a record as text, undecodable ones spelled out."""
    return raw[:HEAD_LENGTH].decode("utf-8", "backslashreplace")
