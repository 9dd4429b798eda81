"""A task's examples in the columns of its family, out of local files, packages or the hub.

sc: text, text_pair (optional), label. tc: tokens, tags (BIO). qa: question, context, answers {text, answer_start}. ir: query,
positive.
"""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError, one_line
from megatron_ext.evaluation.tasks import Task

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
COLUMNS = {"sc": ("text", "label"), "tc": ("tokens", "tags"), "qa": ("question", "context", "answers"), "ir": ("query", "positive")}
KINDS = (".jsonl", ".csv", ".parquet", ".conll")
CUT_SHARE, LARGEST_CUT = 10, 2000
"""One training row in so many is taken for validation where a set has no validation split of its own, up to this many rows."""
LONGEST_FIELD = 2**27


@dataclass(frozen=True)
class Examples:
    """Of one task."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: tuple[str, ...]
    """Of sc and tc: by id."""


def load(task: Task, data: Path | None, packages: Path) -> Examples:
    """Read a task's examples.

    Args:
        task: which.
        data: a file with a column `split`, or a folder with train, validation and test files (.jsonl, .csv, .parquet or .conll);
            None takes the packaged set, or the hub.
        packages: where `tools/fetch_demo_data.py` puts the packaged sets.

    Raises:
        UserError: something is missing or not what the task's family needs.
    """
    if data is None and task.hub is None:
        data = packages / f"{task.name}.jsonl"
        if not data.is_file():
            raise UserError(f"task {task.name}: there is no {data}; run tools/fetch_demo_data.py --corpus {task.name}")
    splits = _from_hub(task) if data is None else _from_folder(data) if data.is_dir() else _from_file(data)
    source = str(data) if data is not None else task.hub.path if task.hub else ""
    for split in SPLITS:
        _check(task, split, splits[split], source)
    return Examples(**splits, labels=_labels(task, splits))


def _check(task: Task, split: str, rows: list[Row], source: str) -> None:
    if not rows:
        raise UserError(f"task {task.name}: {source} has no rows for {split}")
    missing = [name for name in COLUMNS[task.family] if name not in rows[0]]
    if missing:
        raise UserError(
            f"task {task.name}: {source} lacks {', '.join(missing)} in its {split} rows; they have {', '.join(rows[0])}"
        )


def _labels(task: Task, splits: dict[str, list[Row]]) -> tuple[str, ...]:
    if task.family == "sc":
        return tuple(sorted({str(row["label"]) for row in splits["train"]}))
    if task.family == "tc":
        return tuple(sorted({str(tag) for row in splits["train"] for tag in row["tags"]}))
    return ()


def _from_folder(folder: Path) -> dict[str, list[Row]]:
    found = {path.stem: path for kind in KINDS for path in sorted(folder.glob(f"*{kind}")) if path.stem in SPLITS}
    if missing := [split for split in ("train", "test") if split not in found]:
        raise UserError(f"--data {folder}: there is no {' and no '.join(missing)} file ({', '.join(KINDS)})")
    splits = {split: list(read_rows(path)) for split, path in found.items()}
    return splits if "validation" in splits else _cut(splits)


def _from_file(file: Path) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in read_rows(file):
        split = row.get("split")
        if split not in splits:
            raise UserError(f"--data {file}: a row has the split {split!r}: allowed are {', '.join(SPLITS)}")
        splits[split].append(row)
    return splits


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl, .csv, .parquet or .conll file.

    Raises:
        UserError: it cannot be read as what its name says.
    """
    try:
        if path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as file:
                yield from (json.loads(line) for line in file if line.strip())
        elif path.suffix == ".csv":
            csv.field_size_limit(LONGEST_FIELD)
            with open(path, encoding="utf-8", newline="") as file:
                yield from csv.DictReader(file)
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".conll":
            yield from _conll(path)
        else:
            raise UserError(f"--data {path}: it is none of {', '.join(KINDS)}")
    except (OSError, ValueError) as error:  # what is not JSON, UTF-8 or Parquet is a ValueError
        raise UserError(f"--data {path} cannot be read: {one_line(error)}") from None


def _conll(path: Path) -> Iterator[Row]:
    """Sentences: the word in the first column, the tag in the last, an empty line after each."""
    tokens: list[str] = []
    tags: list[str] = []
    with open(path, encoding="utf-8") as file:
        for line in [*file, "\n"]:
            columns = line.split()
            if columns and columns[0] != "-DOCSTART-":
                tokens.append(columns[0])
                tags.append(columns[-1])
            elif tokens:
                yield {"tokens": tokens, "tags": tags}
                tokens, tags = [], []


def _from_hub(task: Task) -> dict[str, list[Row]]:
    import datasets

    hub = task.hub
    assert hub is not None
    try:
        loaded = datasets.load_dataset(hub.path, hub.name)
    except Exception as error:  # no network, no such name, a format that is no longer read
        raise UserError(
            f"task {task.name}: datasets cannot load {hub.path}: {one_line(error)[:200]}; give a copy of it with --data"
        ) from None
    names = {"train": hub.train, "validation": hub.validation, "test": hub.test}
    splits = {split: _renamed(loaded[name], hub.columns) for split, name in names.items() if name}
    return splits if hub.validation else _cut(splits)


def _renamed(rows: Any, columns: dict[str, str]) -> list[Row]:
    """Rows under our names, with labels as words."""
    wanted = columns or {name: name for name in rows.column_names}
    words = {}
    for here, there in wanted.items():
        kind = rows.features[there]
        inner = getattr(kind, "feature", kind)
        if hasattr(inner, "int2str"):
            words[here] = inner.int2str
    found = []
    for row in rows:
        new = {here: row[there] for here, there in wanted.items()}
        found.append({name: words[name](value) if name in words else value for name, value in new.items()})
    return found


def _cut(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Take the validation rows from the training rows, chosen by what they say and not by their place."""
    train: list[Row] = []
    validation: list[Row] = []
    for row in splits["train"]:
        key = hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).digest()
        is_cut = int.from_bytes(key[:8], "big") % CUT_SHARE == 0 and len(validation) < LARGEST_CUT
        (validation if is_cut else train).append(row)
    return {**splits, "train": train, "validation": validation}
