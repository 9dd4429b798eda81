"""The model card: YAML that parses, and the whole way from the first model to this one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ext.hf.checkpoint_reader import RunRecord
from megatron_ext.hf.families import FAMILIES
from megatron_ext.hf.model_card import model_card
from megatron_ext.hf.verify import VerificationReport
from megatron_ext.hf.verify_tokenizer import TokenizerReport
from megatron_ext.hf.verify_weights import WeightReport
from megatron_ext.model.presets import EncoderConfig

ENCODER = EncoderConfig(num_layers=2, hidden_size=48, ffn_hidden_size=80, num_attention_heads=6, num_query_groups=2, head_dim=16)
DATA = [{"prefix": "corpus/news", "split": "train", "weight": 1.0, "fingerprint": "5" * 64}]
TREE = {
    "step": 40,
    "phase": "1-mlm",
    "samples": 640,
    "tokens": 3000,
    "predicted_tokens": 1200,
    "flops": 5e9,
    "phases": [{"name": "0-clm", "start_step": 0, "end_step": 30}, {"name": "1-mlm", "start_step": 30, "end_step": 40}],
    "data": DATA,
    "mlflow_run_id": "run-of-this",
    "tokenizer": {"path": "tokenizer", "fingerprint": "7" * 64},
    "config": {"data": {"sequence_length": 128}, "precision": {"recipe": "bf16"}},
    "created": "2026-02-02T00:00:00+00:00",
}
IMPORTED = {
    "family": "llama",
    "architecture": "LlamaForCausalLM",
    "folder": "Great-Model-8B",
    "files": {"model.safetensors": "9" * 64},
    "mask_token": None,
}
LINEAGE = [
    {"checkpoint": "/runs/import", "step": 0, "phase": "imported", "tokens": 0, "flops": 0.0, "created": "2026-01-01"},
    {
        "checkpoint": "/runs/one/checkpoints/step_00000100",
        "step": 100,
        "phase": "0-clm",
        "phases": [{"name": "0-clm", "start_step": 0, "end_step": 100, "ratio": 0.4}],
        "samples": 1600,
        "tokens": 7000,
        "predicted_tokens": 6500,
        "flops": 2e9,
        "data": [{"prefix": "corpus/books", "fingerprint": "6" * 64}],
        "mlflow_run_id": "run-of-one",
        "created": "2026-01-02",
    },
]
CHECKED = VerificationReport("float32", 3e-6, 2e-7, 900, 0.7, WeightReport(20, 123_456, 41.5, 0.0), TokenizerReport(13, 33, 2, 0))


def card(family: str = "eurobert", verifications: tuple[VerificationReport, ...] = (CHECKED,), **changes: Any) -> str:
    tree = {**TREE, **changes}
    record = RunRecord(ENCODER, 1003, 1024, FAMILIES[family].causal, tree["step"], None, Path("t"), "7" * 64, tree)
    return model_card(record, FAMILIES[family], "float32", 123_456, verifications, None)


def front_matter(text: str) -> dict[str, Any]:
    head, _, _ = text.removeprefix("---\n").partition("\n---\n")
    assert text.startswith("---\n")
    return yaml.safe_load(head)


def table_after(text: str, heading: str) -> list[dict[str, str]]:
    """The first table under a heading, as one dictionary a row."""
    lines = text.partition(f"\n{heading}\n")[2].splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert {len(row) for row in rows} == {len(rows[0])}, "a row with another number of cells"
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_yaml(family: str) -> None:
    found = front_matter(card(family))
    assert found["library_name"] == "transformers" and found["tags"] == ["megatron_ext", family]
    assert found["pipeline_tag"] in ("fill-mask", "text-generation", "feature-extraction")
    assert "base_model" not in found


@pytest.mark.parametrize(
    ("name", "is_named"),
    [
        ("meta-llama/Llama-3.2-1B", True),
        ("gpt2", True),
        ("/home/me/model", False),
        ("a: [b\n---", False),
        (None, False),
        (7, False),
    ],
)
def test_a_base_model_is_named_if_the_hub_knows_such_names(name: Any, is_named: bool) -> None:
    text = card(imported={**IMPORTED, "base_model": name})
    assert front_matter(text).get("base_model") == (name if is_named else None)


def test_a_run_from_nothing_has_no_lineage() -> None:
    assert "Lineage" not in card() and "Lineage" not in card(imported=None, lineage=[])


def test_the_line_is_told_from_the_first_model_on() -> None:
    text = card(imported=IMPORTED, lineage=LINEAGE)
    rows = table_after(text, "## Lineage")
    assert [row["from"] for row in rows] == [
        "Great-Model-8B (LlamaForCausalLM, Hugging Face)",
        "one/step_00000100",
        "this run",
        "together",
    ]
    assert (rows[1]["tokens"], rows[1]["mlflow_run_id"], rows[1]["step"]) == ("7,000", "run-of-one", "100")
    assert (rows[2]["tokens"], rows[2]["flops"]) == ("3,000", "5e+09")
    assert [rows[3][name] for name in ("samples", "tokens", "predicted_tokens", "flops")] == ["2,240", "10,000", "7,700", "7e+09"]
    for word in ("9" * 64, "6" * 64, "5" * 64, "7" * 64, "run-of-this", "corpus/books", "corpus/news"):
        assert word in text, word


def test_an_import_that_was_not_trained_says_where_it_is_from() -> None:
    text = card(imported=IMPORTED, step=0, tokens=0, flops=0.0, phase="imported")
    assert "Great-Model-8B, imported into megatron_ext and exported without training" in text
    assert "Trained further with megatron_ext from Great-Model-8B" in card(imported=IMPORTED)
    rows = table_after(text, "## Lineage")
    assert [row["from"] for row in rows][0].startswith("Great-Model-8B") and rows[-1]["tokens"] == "0"


def test_ancestors_that_lack_fields_or_hold_odd_ones_break_nothing() -> None:
    odd = [{"checkpoint": "a|b\n# no heading"}, {"tokens": 5, "phases": []}]
    text = card(lineage=odd)
    assert len(table_after(text, "## Lineage")) == 4 and "\n# no heading" not in text


def test_the_figures_of_the_verification_are_there() -> None:
    text = card()
    section = text.partition("## Verification")[2]
    assert "3e-06" in section and "123,456" in section and "41.5" in section and "2 run(s) of a repeated character" in section
    assert "Not verified" in card(verifications=())
    assert json.loads(json.dumps(CHECKED.figures()))["tokenizer_report.cases"] == 33
