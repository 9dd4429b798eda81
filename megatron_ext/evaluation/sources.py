"""A task's examples in the columns of its family, out of local files, packages or the hub.

sc: text, text_pair (optional), label. tc: tokens, tags (BIO). qa: question, context, answers {text, answer_start}. ir: query,
positive.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError, one_line
from megatron_ext.evaluation.tasks import Task, find_task

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
COLUMNS = {"sc": ("text", "label"), "tc": ("tokens", "tags"), "qa": ("question", "context", "answers"), "ir": ("query", "positive")}
TEXTS = {"sc": ("text", "text_pair"), "tc": (), "qa": ("question", "context"), "ir": ("query", "positive")}
TAG = re.compile(r"O|[BIES]-.+")
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


def load(task: Task, data: Path | None, packages: Path, source_data: Path | None = None) -> Examples:
    """Read a task's examples.

    Args:
        task: which.
        data: a file with a column `split`, or a folder with train, validation and test files (.jsonl, .csv, .parquet or .conll);
            None takes the packaged set, or the hub.
        packages: where `tools/fetch_demo_data.py` puts the packaged sets.
        source_data: of a transfer, the same for the task that it is trained on.

    Raises:
        UserError: something is missing or not what the task's family needs.
    """
    splits = _splits(task, data, packages)
    if task.trained_on is not None:
        source = _splits(find_task(task.trained_on), source_data, packages)
        splits = {**source, "test": splits["test"], "validation": splits["validation"] or source["validation"]}
    if not splits["validation"]:
        splits = _cut(splits)
    for split in SPLITS:
        if not splits[split]:
            raise UserError(f"task {task.name}: {_name(task, data)} has no rows for {split}")
    labels = _labels(task, splits["train"])
    if task.family == "sc":
        _check_labels(task, splits, labels)
    return Examples(**splits, labels=labels)


def _name(task: Task, data: Path | None) -> str:
    return str(data) if data is not None else task.hub.path if task.hub else "the packaged set"


def _splits(task: Task, data: Path | None, packages: Path) -> dict[str, list[Row]]:
    """Its rows, checked; a split that is not there is empty."""
    if data is None and task.hub is None:
        data = packages / f"{task.name}.jsonl"
        if not data.is_file():
            raise UserError(f"task {task.name}: there is no {data}; run tools/fetch_demo_data.py --corpus {task.name}")
    found = _from_hub(task) if data is None else _from_folder(data) if data.is_dir() else _from_file(data)
    for split, rows in found.items():
        pairs = sum("text_pair" in row for row in rows if isinstance(row, dict))
        if task.family == "sc" and pairs not in (0, len(rows)):
            raise UserError(f"task {task.name}: {pairs} of {len(rows)} rows of {_name(task, data)}, {split}, have a text_pair")
        for number, row in enumerate(rows, 1):
            if problem := problem_of(task.family, row):
                raise UserError(f"task {task.name}: row {number} of {_name(task, data)}, {split}: {problem}")
    return {split: found.get(split, []) for split in SPLITS}


def problem_of(family: str, row: Any) -> str | None:
    """What a row lacks to be one of its family; None if nothing."""
    if not isinstance(row, dict):
        return "it is no object with columns"
    if missing := [name for name in COLUMNS[family] if name not in row]:
        return f"it lacks {', '.join(missing)}; it has {', '.join(map(str, row))}"
    for name in TEXTS[family]:
        if name in row and not (isinstance(row[name], str) and row[name].strip()):
            return f"{name} is {row[name]!r}: it must be a text that says something"
    if family == "sc" and row["label"] in (None, ""):
        return f"label is {row['label']!r}"
    if family == "tc":
        tokens, tags = row["tokens"], row["tags"]
        if not isinstance(tokens, list) or not isinstance(tags, list) or len(tokens) != len(tags) or not tokens:
            return "tokens and tags must be lists of one length, and not empty (JSONL, Parquet or CoNLL)"
        if wrong := [tag for tag in tags if not (isinstance(tag, str) and TAG.fullmatch(tag))]:
            return f"the tag {wrong[0]!r} is neither O nor like B-person or I-person"
    if family == "qa":
        answers = row["answers"]
        if not isinstance(answers, dict) or not {"text", "answer_start"} <= answers.keys():
            return "answers must have text and answer_start (JSONL or Parquet)"
        if any(not isinstance(answers[name], list) for name in ("text", "answer_start")):
            return "text and answer_start of answers must be lists"
        if len(answers["text"]) != len(answers["answer_start"]):
            return "text and answer_start of answers must be of one length"
    return None


def _labels(task: Task, train: list[Row]) -> tuple[str, ...]:
    if task.family == "sc":
        return tuple(sorted({str(row["label"]) for row in train}))
    if task.family == "tc":
        return tuple(sorted({tag for row in train for tag in row["tags"]}))
    return ()


def _check_labels(task: Task, splits: dict[str, list[Row]], labels: tuple[str, ...]) -> None:
    for split in ("validation", "test"):
        for row in splits[split]:
            if str(row["label"]) not in labels:
                raise UserError(f"task {task.name}: {split} has the label {row['label']!r}, and no training row has it")


def _from_folder(folder: Path) -> dict[str, list[Row]]:
    found = {path.stem: path for kind in KINDS for path in sorted(folder.glob(f"*{kind}")) if path.stem in SPLITS}
    if not found:
        raise UserError(f"--data {folder}: there is no train, validation or test file ({', '.join(KINDS)})")
    return {split: list(read_rows(path)) for split, path in found.items()}


def _from_file(file: Path) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in read_rows(file):
        split = row.get("split") if isinstance(row, dict) else None
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
                for number, row in enumerate(csv.DictReader(file), 1):
                    if None in row or None in row.values():
                        raise UserError(f"--data {path}: row {number} has more or fewer columns than the head")
                    yield row
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
    names = {"train": hub.train, "validation": hub.validation, "test": hub.test}
    try:
        loaded = datasets.load_dataset(hub.path, hub.name)
        return {split: _renamed(loaded[name], hub.columns) for split, name in names.items() if name in loaded}
    except Exception as error:  # no network, no such name, a format that is no longer read, other columns
        raise UserError(
            f"task {task.name}: datasets cannot load {hub.path}: {one_line(error)[:200]}; give a copy of it with --data"
        ) from None


def _renamed(rows: Any, columns: tuple[tuple[str, str], ...]) -> list[Row]:
    """Rows under our names, with labels as words."""
    wanted = dict(columns) or {name: name for name in rows.column_names}
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
    """Take the validation rows from the training rows: those with the smallest hashes, whatever their place."""
    keys = [hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).digest() for row in splits["train"]]
    count = min(len(keys) // CUT_SHARE, LARGEST_CUT)
    chosen = set(sorted(range(len(keys)), key=lambda place: keys[place])[:count])
    rows = list(enumerate(splits["train"]))
    train, validation = ([row for place, row in rows if (place in chosen) == is_cut] for is_cut in (False, True))
    return {**splits, "train": train, "validation": validation}
