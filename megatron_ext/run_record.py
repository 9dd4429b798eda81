"""What `run.json` must hold: a table of its keys, and a reader that lets nothing else through.

The file may come from anywhere, so no number reaches an allocation, and no text a query or a path, before it was looked at here.
Keys that the table does not know are left alone: a newer version may have written them.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_ext.errors import UnreadableError, UserError

DEEPEST_NESTING = 16
LARGEST_COUNT = 2**53
LARGEST_NUMBER = 1e300
LARGEST_SIZE = 2**24
MOST_LAYERS = 2**12


@dataclass(frozen=True)
class _Kind:
    """What a value may be."""

    allowed: str
    accepts: Callable[[Any], bool]


def _is_count(value: Any, lowest: int = 0, highest: int = LARGEST_COUNT) -> bool:
    return type(value) is int and lowest <= value <= highest


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST_NUMBER


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-]{1,64}", value, re.ASCII) is not None


def _is_versions(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_package(name) and isinstance(version, str) for name, version in value.items())


def _is_package(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) is not None


COUNT = _Kind("a whole number, at least 0", _is_count)
SIZE = _Kind(f"a whole number from 1 to {LARGEST_SIZE}", lambda value: _is_count(value, 1, LARGEST_SIZE))
LAYERS = _Kind(f"a whole number from 1 to {MOST_LAYERS}", lambda value: _is_count(value, 1, MOST_LAYERS))
NUMBER = _Kind("a number, at least 0", _is_number)
FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
TEXT = _Kind("text", lambda value: isinstance(value, str))
NAME = _Kind("null, or up to 64 letters, digits, _ and -", lambda value: value is None or _is_name(value))
DIGEST = _Kind("a sum of 64 hexadecimal digits", lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)))
OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
OBJECT_OR_NULL = _Kind("null or an object", lambda value: value is None or isinstance(value, dict))
VERSIONS = _Kind("an object of package names and texts", _is_versions)
OBJECTS = _Kind("a list of objects", lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value))

ENCODER = {
    "num_layers": LAYERS,
    "hidden_size": SIZE,
    "ffn_hidden_size": SIZE,
    "num_attention_heads": SIZE,
    "num_query_groups": SIZE,
    "head_dim": SIZE,
    "rotary_base": NUMBER,
    "norm_epsilon": NUMBER,
    "init_std": NUMBER,
    "tie_embeddings": FLAG,
    "max_position_embeddings": SIZE,
}
ENCODER_SINCE = {
    "qkv_bias": FLAG,
    "qk_norm": FLAG,
    "rotary_scaling": TEXT,
    "rotary_factor": NUMBER,
    "rotary_low_frequency_factor": NUMBER,
    "rotary_high_frequency_factor": NUMBER,
    "rotary_original_length": SIZE,
}
"""Fields that checkpoints of earlier versions lack."""
CONFIG = {"data": OBJECT, "training": OBJECT}
"""The rest of the configuration is checked where one is read: `megatron_ext.config.from_dict`."""

TOKENIZER = {"path": TEXT, "fingerprint": DIGEST}
PARENT = {"checkpoint": TEXT, "step": COUNT, "mlflow_run_id": NAME}
DATA_SET = {"prefix": TEXT, "split": TEXT, "weight": NUMBER, "fingerprint": DIGEST}
PHASE = {"name": TEXT, "start_step": COUNT, "end_step": COUNT}
FILE, FILE_EARLIER = {"bytes": COUNT, "blake3": DIGEST}, {"bytes": COUNT, "sha256": DIGEST}
RUN = {
    "step": COUNT,
    "phase": TEXT,
    "causal": FLAG,
    "samples": COUNT,
    "tokens": COUNT,
    "predicted_tokens": COUNT,
    "flops": NUMBER,
    "phases": OBJECTS,
    "comparison_mask_ratio": NUMBER,
    "parent": OBJECT_OR_NULL,
    "mlflow_run_id": NAME,
    "run_key": NAME,
    "encoder": OBJECT,
    "vocab_size": SIZE,
    "padded_vocab_size": SIZE,
    "tokenizer": OBJECT,
    "data": OBJECTS,
    "parallel": OBJECT,
    "config": OBJECT,
    "versions": VERSIONS,
    "files": OBJECT,
}
IMPORTED = {"family": TEXT}
RUN_SINCE = {
    "changes": OBJECTS,
    "skipped_steps": COUNT,
    "skipped_in_a_row": COUNT,
    "imported": OBJECT_OR_NULL,
    "lineage": OBJECTS,
}
"""Keys that checkpoints of earlier versions lack."""


def parse_run_record(text: str, source: str, version: int) -> dict[str, Any]:
    """Read and check the text of a `run.json`.

    Args:
        text: the file's content.
        source: its path, for error messages.
        version: the format that is read.

    Raises:
        UserError: it is not JSON, of another format, or a value is missing or impossible.
    """
    try:
        record = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise UserError(f"{source} cannot be read as JSON (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{source} cannot be read as JSON ({error})") from None
    if not isinstance(record, dict) or record.get("format") != version:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise UnreadableError(f"{source} has format {found!r:.40}: this version reads format {version}")
    if _is_deeper_than(record, DEEPEST_NESTING):
        raise UserError(f"{source} cannot be read as JSON (nested too deeply)")
    _check(record, RUN | _present(RUN_SINCE, record), source, "")
    _check(record["config"], CONFIG, source, "config.")
    known = _present(ENCODER_SINCE, record["encoder"])
    _check(record["encoder"], ENCODER | known, source, "encoder.")
    unknown = sorted(record["encoder"].keys() - ENCODER.keys() - known.keys())
    if unknown:
        raise UnreadableError(f"{source}: encoder has the unknown field {', '.join(unknown):.200}; a newer version wrote it")
    if record["padded_vocab_size"] < record["vocab_size"]:
        raise UserError(f"{source}: padded_vocab_size {record['padded_vocab_size']} is below vocab_size {record['vocab_size']}")
    _check(record["tokenizer"], TOKENIZER, source, "tokenizer.")
    if record["parent"] is not None:
        _check(record["parent"], PARENT, source, "parent.")
    if record.get("imported") is not None:
        _check(record["imported"], IMPORTED, source, "imported.")
    for name, table in (("data", DATA_SET), ("phases", PHASE)):
        for number, item in enumerate(record[name]):
            _check(item, table, source, f"{name}[{number}].")
    if record["phases"] and record["step"] > record["phases"][-1]["end_step"]:
        raise UserError(f"{source}: step is {record['step']}, but its phases end with step {record['phases'][-1]['end_step']}")
    for name, item in record["files"].items():
        if not isinstance(item, dict):
            raise UserError(f"{source}: files[{name!r:.200}] is {item!r:.40}: it must be an object")
        _check(item, FILE_EARLIER if "sha256" in item else FILE, source, f"files[{name!r:.200}].")
    return record


def check_encoder(values: dict[str, Any], source: str) -> None:
    """Hold the shape of a model against what a checkpoint may have.

    Raises:
        UserError: naming the first field that is impossible.
    """
    _check(values, ENCODER | ENCODER_SINCE, source, "")


def check_sizes(values: dict[str, Any], names: dict[str, str], source: str) -> None:
    """Look at the sizes in somebody else's configuration before anything is built with them.

    Args:
        values: the configuration.
        names: what it calls our fields: its name -> ours.
        source: where it is from.

    Raises:
        UserError: naming the first that is impossible.
    """
    present = {theirs: ENCODER.get(ours, SIZE) for theirs, ours in names.items() if values.get(theirs) is not None}
    _check(values, present, source, "")


def _present(table: dict[str, _Kind], values: dict[str, Any]) -> dict[str, _Kind]:
    return {name: kind for name, kind in table.items() if name in values}


def _check(values: dict[str, Any], table: dict[str, _Kind], source: str, place: str) -> None:
    missing = [name for name in table if name not in values]
    if missing:
        raise UserError(f"{source} lacks {', '.join(place + name for name in missing)}")
    for name, kind in table.items():
        if not kind.accepts(values[name]):
            raise UserError(f"{source}: {place}{name} is {values[name]!r:.100}: it must be {kind.allowed}")


def _is_deeper_than(tree: Any, depth: int) -> bool:
    level = [tree]
    while level and depth >= 0:
        inner = (value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list))
        level = [value for values in inner for value in values]
        depth -= 1
    return bool(level)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twice!r:.100} occurs twice")
    return values


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number that JSON has")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits:.40} is too large a number")
    return value
