"""Documents out of input files, in order, in bounded memory.

JSON Lines, Parquet and plain text, the text formats also as `.gz` and `.zst`. What cannot be read is yielded as a `Reject`, so
that one bad line costs one line and no line is lost silently. Blank lines of a JSON Lines file hold no record and are skipped.
"""

import gzip
import io
import json
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from megatron_ext.errors import UserError

ALLOWED = ".jsonl, .txt (each also with .gz or .zst) or .parquet"
KNOWN_NAME = r"\.(?:(?P<format>jsonl|txt)(?:\.gz|\.zst)?|(?P<parquet>parquet))$"
TEXT_DOCUMENTS = ("file", "paragraph", "line")
HEAD_LENGTH = 200
PIECE_BYTES = 2**20  # what is read of a long line at a time
LARGEST_LINE_LIMIT = 2**30  # the index of a data set counts the tokens of a document in 32 bits
BATCH_BYTES = 64 * 2**20  # of a Parquet column, at most (one cell, if that is larger)
BATCH_ROWS = 256
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FOREIGN_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")  # of UTF-16 and UTF-32
CORRUPT_FILE = (OSError, EOFError, UnicodeError, zlib.error)


@dataclass(frozen=True)
class Reject:
    """One record that gave no document.

    Causes: broken_json, missing_field, not_text, invalid_utf8, empty_text, too_long, unreadable_file.
    """

    line: int  # counted from 1; the row of a Parquet file; 0 for a whole file without a column of text
    cause: str
    head: str  # the first bytes of the record, undecodable ones escaped


class RejectList:
    """Counts rejected records by cause and lists them in a file, one JSON object a line; ASCII, so that none steers a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.counts: Counter[str] = Counter()
        """Cause -> records."""
        self._stream = stream

    def add(self, source: Path, reject: Reject) -> None:
        """List one record of an input file."""
        self.counts[reject.cause] += 1
        self._stream.write(json.dumps({"input": str(source), **asdict(reject)}).replace("\x7f", "\\u007f") + "\n")


def rejects_summary(counts: dict[str, int], listed_in: Path) -> str:
    """How many records were rejected for which cause, and where the first one was: part of a message."""
    if not counts:
        return "they are empty"
    with open(listed_in, encoding="ascii") as stream:
        first = json.loads(stream.readline())
    causes = ", ".join(f"{number:,} {cause}" for cause, number in counts.items())
    return f"rejected: {causes}; first {first['input']} line {first['line']}: {first['cause']} (all in {listed_in})"


@dataclass(frozen=True)
class ReaderSettings:
    """How documents are cut out of files."""

    json_field: str = "text"  # also the Parquet column
    text_documents: str = "file"  # of plain text: one document per file, paragraph (blank lines between) or line
    max_line_bytes: int = 64 * 2**20  # longer lines, rows and text documents are rejected as too_long

    def __post_init__(self) -> None:
        if self.text_documents not in TEXT_DOCUMENTS:
            raise UserError(f"text documents {self.text_documents!r} (allowed: {', '.join(TEXT_DOCUMENTS)})")
        if not 1 <= self.max_line_bytes <= LARGEST_LINE_LIMIT:
            raise UserError(f"longest line {self.max_line_bytes} bytes (allowed: 1 to {LARGEST_LINE_LIMIT})")


def input_format(path: Path) -> str:
    """The format of an input file, by its name: `jsonl`, `txt` or `parquet`. Raises `UserError` for any other name."""
    match = re.search(KNOWN_NAME, path.name, re.IGNORECASE)
    if match is None:
        raise UserError(f"input {path}: unknown format (allowed: {ALLOWED})")
    return (match["format"] or match["parquet"]).lower()


def expand_inputs(paths: list[str]) -> list[Path]:
    """The files of paths, folders (all files of known formats below them, sorted) and globs, in the order given, each once.

    What `corpus.preprocess` itself leaves in a folder (rejects, unfinished shards) is not taken from folders and globs, nor are
    pipes, sockets and devices. Folders behind symbolic links are entered only where they are named: links may form loops.

    Raises `UserError` for a path without any such file, or that is a pipe, socket or device.
    """
    found: dict[Path, Path] = {}
    for name in reversed(paths):
        try:
            found.update({path.resolve(): path for path in reversed(_expand(name))})
        except (OSError, ValueError, NotImplementedError) as error:  # a name too long, or a pattern that is none
            raise UserError(f"input {name}: {getattr(error, 'strerror', None) or error}") from None
    return list(reversed(found.values()))


def check_regular(path: Path) -> None:
    """Raise `UserError` for a missing file, or what is no regular file: reading a pipe or a device might never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"input {path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"input {path}: a pipe, socket, device or folder (allowed: regular files)")


def _is_own_output(path: Path) -> bool:
    return path.name.endswith(".rejects.jsonl") or any(part.endswith(".shards") for part in path.parts)


def _expand(path: str) -> list[Path]:
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        found = [name for name in Path(path).rglob("*") if re.search(KNOWN_NAME, name.name, re.IGNORECASE)]
    elif Path(path).exists():
        check_regular(Path(path))
    else:
        found = _matching(Path(path))
    found = sorted(name for name in found if name.is_file() and not _is_own_output(name))
    if not found:
        raise UserError(f"input {path}: no such file, folder with {ALLOWED} files, or pattern")
    return found


def _matching(pattern: Path) -> list[Path]:
    """The paths of a pattern. As in a shell, names that begin with a dot match only if the pattern's part begins with one."""
    inside = pattern.relative_to(pattern.anchor)
    if not inside.parts:
        return []
    hidden = any(part.startswith(".") for part in inside.parts)
    found = Path(pattern.anchor).glob(str(inside))
    return [path for path in found if hidden or not any(part.startswith(".") for part in path.parts)]


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
        elif line and not line.isspace():
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
    if settings.text_documents == "file":
        yield from _whole_file(path, settings.max_line_bytes)
        return
    start, block, whole = 1, bytearray(), True
    for number, (line, line_whole) in enumerate(_lines(path, settings.max_line_bytes), start=1):
        blank = not line or line.isspace()
        if settings.text_documents == "line":
            if not blank:
                yield number, line.rstrip(b"\r\n"), line_whole
            continue
        if blank:
            if block:
                yield start, bytes(block).rstrip(b"\r\n"), whole
            block, whole = bytearray(), True
            continue
        if not block:
            start = number
        whole = whole and line_whole and len(block) + len(line) <= settings.max_line_bytes
        block += line if whole else line[: max(0, HEAD_LENGTH - len(block))]
        if not whole:
            del block[HEAD_LENGTH:]
    if block:
        yield start, bytes(block), whole


def _whole_file(path: Path, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """A file as one document, or the head of one that is too long; nothing for an empty file."""
    block = bytearray()
    with _open(path) as stream:
        while len(block) <= limit and (piece := stream.read(PIECE_BYTES)):
            block += piece if block else _without_mark(piece)
    if block:
        yield 1, bytes(block) if len(block) <= limit else bytes(block[:HEAD_LENGTH]), len(block) <= limit


def _without_mark(start: bytes) -> bytes:
    """The beginning of a file without its byte order mark. Raises `UnicodeError` for those of UTF-16 and UTF-32."""
    if start.startswith(FOREIGN_BYTE_ORDER_MARKS):
        raise UnicodeError("the file begins with the byte order mark of UTF-16 or UTF-32 (allowed: UTF-8)")
    return start.removeprefix(BYTE_ORDER_MARK)


def _lines(path: Path, limit: int) -> Iterator[tuple[bytes, bool]]:
    """Yield (line, True) with its line end, or (head, False) for a line of more than `limit` bytes, never held whole."""
    with _open(path) as stream:
        first = True
        while start := stream.readline(PIECE_BYTES):
            if first:
                start, first = _without_mark(start), False
            line = _rest_of_line(stream, start, limit)
            whole = len(line) - line.endswith(b"\n") <= limit
            yield (line, True) if whole else (line[:HEAD_LENGTH], False)


def _rest_of_line(stream: BinaryIO, start: bytes, limit: int) -> bytes | bytearray:
    """Read on to the line's end. Once more than `limit` bytes are there, the rest is read but not kept."""
    line: bytes | bytearray = start
    piece = start
    while not piece.endswith(b"\n") and (piece := stream.readline(PIECE_BYTES)):
        if len(line) <= limit:
            line = bytearray(line) if line is start else line
            line += piece
    return line


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

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=PIECE_BYTES) as table:  # without a buffer a row group is read whole
            if reject := _column_reject(table, settings.json_field):
                yield reject
                return
            row = 0
            for batch in table.iter_batches(batch_size=_batch_rows(table, settings.json_field), columns=[settings.json_field]):
                for scalar in batch.column(0):
                    row += 1
                    yield _parquet_document(row, scalar, settings.max_line_bytes)
    except pyarrow.ArrowException as error:
        raise EOFError(str(error)) from error


def _column_reject(table: Any, field: str) -> Reject | None:
    """The reject of a whole file whose column is missing, there twice, or of a type that is never text."""
    schema, rows = table.schema_arrow, table.metadata.num_rows
    if schema.names.count(field) != 1:
        return Reject(0, "missing_field", _escape(f"{rows} rows, columns: {', '.join(schema.names)}".encode()))
    kind = schema.field(field).type
    if not _holds_text(kind):
        return Reject(0, "not_text", _escape(f"{rows} rows of type {kind}".encode()))
    return None


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    kind = getattr(kind, "storage_type", kind)  # of an extension type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(check(kind) for check in checks)


def _batch_rows(table: Any, field: str) -> int:
    """Rows to decode at a time. A cell may be as large as its column chunk, and by a dictionary be there in every row."""
    groups = (table.metadata.row_group(number) for number in range(table.metadata.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    largest = max((chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == field), default=1)
    return min(BATCH_ROWS, max(1, BATCH_BYTES // max(1, largest)))


def _parquet_document(row: int, scalar: Any, limit: int) -> tuple[int, str] | Reject:
    while scalar.is_valid and not hasattr(scalar, "as_buffer"):
        scalar = scalar.value  # out of a dictionary or an extension type
    if not scalar.is_valid:
        return Reject(row, "not_text", "null")
    content = scalar.as_buffer()
    if content.size > limit:
        return Reject(row, "too_long", _escape(content.slice(0, min(content.size, HEAD_LENGTH)).to_pybytes()))
    raw = content.to_pybytes()
    try:
        return _checked(row, raw, raw.decode("utf-8"))
    except UnicodeDecodeError:
        return Reject(row, "invalid_utf8", _escape(raw))


def _escape(raw: bytes) -> str:
    """The first bytes of a record as text, undecodable ones spelled out."""
    return raw[:HEAD_LENGTH].decode("utf-8", "backslashreplace")
