"""Properties of a checkpoint's `run.json`: what is whole survives, what was damaged is one line, whatever the damage."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.checkpoint_files import read_run_file
from megatron_ext.config_reading import from_dict
from megatron_ext.doctor.checkpoint import check_checkpoint
from megatron_ext.doctor.report import Report
from megatron_ext.doctor.text import Painter, render
from megatron_ext.errors import UserError
from megatron_ext.hf.checkpoint_reader import _read_record
from tests.unit.properties import TEXTS, changed, examples
from tests.unit.test_properties_config import ANYTHING, FULL

PLAIN = Painter(coloured=False)
DIGEST = "0123456789abcdef" * 4
CONFIG = from_dict(
    {
        **FULL,
        "model": {"preset": "nano"},
        "phases": [{"objective": "clm", "steps": 30}],
        "data": {**FULL["data"], "sequence_length": 64},
        "training": {**FULL["training"], "global_batch_size": 8, "micro_batch_size": 1},
    }
).as_dict()
RECORD: dict[str, Any] = {
    "format": 1,
    "step": 30,
    "phase": "0-clm",
    "causal": True,
    "samples": 200,
    "tokens": 8960,
    "predicted_tokens": 8000,
    "flops": 1.5e12,
    "phases": [{"name": "0-clm", "start_step": 0, "end_step": 30}],
    "comparison_mask_ratio": 0.4,
    "parent": {"checkpoint": "other/step_00000010", "step": 10, "mlflow_run_id": "abc"},
    "mlflow_run_id": None,
    "run_key": "key-1",
    "encoder": {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 160,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 16,
        "rotary_base": 10000.0,
        "norm_epsilon": 1e-5,
        "init_std": 0.02,
        "tie_embeddings": False,
        "max_position_embeddings": 128,
    },
    "vocab_size": 93,
    "padded_vocab_size": 128,
    "tokenizer": {"path": "tokenizer/tokenizer.model", "fingerprint": DIGEST},
    "data": [{"prefix": "set", "split": "train", "weight": 1.0, "fingerprint": DIGEST}],
    "parallel": {"tensor": 1},
    "config": CONFIG,
    "versions": {"torch": "2.13.0"},
    "files": {"__0_0.distcp": {"bytes": 12, "blake3": DIGEST}, "common.pt": {"bytes": 12, "sha256": DIGEST}},
    "changes": [
        {"step": 10, "field": "training.global_batch_size", "before": 4, "now": 8, "effect": "", "final": False},
        {"step": 20, "field": "data.sequence_length", "before": 32, "now": 64, "effect": "", "final": False},
    ],
    "skipped_steps": 1,
    "skipped_in_a_row": 0,
}


def read(folder: Path, content: bytes) -> dict[str, Any] | None:
    """The record, or None where it was refused in one line that names the file. Anything else fails."""
    (folder / "run.json").write_bytes(content)
    try:
        record = read_run_file(folder)
    except UserError as error:
        assert str(error).isprintable() and str(folder) in str(error), str(error)
        return None
    report = check_checkpoint(folder)
    assert report.problems  # there are no tensors
    json.dumps(report.as_dict())
    assert "checkpoint: " in render(Report("checkpoint", {"checkpoints": [report.facts]}, report.problems), PLAIN)[-1]
    return record


class EmptyReader:
    """In place of the reader of a checkpoint's tensors: there are none, but what `run.json` says of them is used all the same."""

    def __init__(self, directory: Path, mapped: bool = True):
        self.directory, self.record = directory, _read_record(directory)
        self.tensors: dict[str, Any] = {}
        self.optimizer_tensors: dict[str, Any] = {}
        self.fp8_histories: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ext.hf.checkpoint_reader.CheckpointReader", EmptyReader)
    monkeypatch.setattr("megatron_ext.unpickling.read_common", lambda checkpoint: {"optimizer": {"param_groups": [{"step": 30}]}})


def test_the_whole_record_lacks_only_its_files(tmp_path: Path) -> None:
    """So the examples below reach every check."""
    read(tmp_path, json.dumps(RECORD).encode())
    found = check_checkpoint(tmp_path).problems
    assert len(found) == 5, found
    assert all(re.search("is missing|no such file", problem) for problem in found), found


@examples(60)
@given(
    counts=st.tuples(st.integers(0, 30), *[st.integers(0, 2**53)] * 2),
    flops=st.floats(0, 1e300),
    prefix=TEXTS,
    extra=st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=30, max_size=40), st.integers() | TEXTS, max_size=2),
)
def test_a_record_survives(tmp_path: Path, counts: tuple, flops: float, prefix: str, extra: dict) -> None:
    record = copy.deepcopy(RECORD)
    record |= dict(zip(("step", "samples", "tokens"), counts, strict=True), flops=flops) | extra
    record["data"][0]["prefix"] = prefix
    for unicode in (True, False):
        assert read(tmp_path, json.dumps(record, ensure_ascii=unicode).encode()) == record


@examples(300)
@given(data=st.data(), value=ANYTHING, change=st.sampled_from(["replace", "delete", "add"]))
def test_one_changed_value_is_read_or_named(tmp_path: Path, data: st.DataObject, value: Any, change: str) -> None:
    record = changed(RECORD, data, value, change)
    read(tmp_path, json.dumps(record).encode())


@examples(200)
@given(
    cut=st.none() | st.integers(0, 5000),
    damage=st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=6)), max_size=3),
)
def test_damaged_bytes_are_read_or_named(tmp_path: Path, cut: int | None, damage: list[tuple[int, bytes]]) -> None:
    content = bytearray(json.dumps(RECORD, indent=1).encode())
    for place, junk in damage:
        content[place % len(content) : place % len(content) + len(junk)] = junk
    read(tmp_path, bytes(content[:cut]))


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe{}", b"\0" * 99]
)
def test_what_is_no_record_is_named(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path, content) is None
