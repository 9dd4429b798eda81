"""The exported model's README.md: what it is, how to use it, and where it comes from."""

import json
from dataclasses import asdict
from typing import Any

from megatron_ext.hf.checkpoint_reader import RunRecord
from megatron_ext.hf.families import Family
from megatron_ext.hf.verify import LIMIT, Rounding, VerificationReport
from megatron_ext.secrets import redact

USAGE = {
    "masked": 'from transformers import pipeline\n\nfill_mask = pipeline("fill-mask", model="PATH")\n'
    'fill_mask(f"The capital of France is {fill_mask.tokenizer.mask_token}.")',
    "bidirectional": 'from transformers import AutoModel\n\nencoder = AutoModel.from_pretrained("PATH")',
    "causal": 'from transformers import pipeline\n\ngenerate = pipeline("text-generation", model="PATH")\n'
    'generate("The capital of France is")',
}


def model_card(
    record: RunRecord,
    family: Family,
    dtype: str,
    parameters: int,
    verifications: tuple[VerificationReport, ...],
    rounding: Rounding | None,
) -> str:
    """Markdown with a YAML head.

    Args:
        record: run.json of the checkpoint.
        family: what it was exported as.
        dtype: of the exported weights.
        parameters: numbers in the exported weights; a tied embedding counts once.
        verifications: what was measured; empty if verification was left out.
        rounding: what rounding the weights to `dtype` did to the logits.
    """
    sections = [
        _front_matter(family),
        _introduction(record, family, parameters),
        f"## Usage\n\n```python\n{USAGE[_kind(family)]}\n```",
        "## Model\n\n" + _pairs({**asdict(record.encoder), "vocab_size": record.vocab_size, "dtype": dtype}),
        "## Training\n\n" + _pairs(_training(record.tree)),
        "## Phases\n\n" + _records(record.tree.get("phases")),
        "## Data\n\n" + _records(record.tree.get("data")),
        "## Verification\n\n" + _verification(record, family, verifications, rounding),
    ]
    return redact("\n\n".join(sections) + "\n")  # a checkpoint of before secrets were taken out of run.json may hold some


def _kind(family: Family) -> str:
    return "causal" if family.causal else "masked" if family.architecture.endswith("ForMaskedLM") else "bidirectional"


def _front_matter(family: Family) -> str:
    task = {"causal": "text-generation", "masked": "fill-mask", "bidirectional": "feature-extraction"}[_kind(family)]
    return f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- megatron_ext\n- {family.name}\n---"


def _introduction(record: RunRecord, family: Family, parameters: int) -> str:
    trained, exported = ("causal" if causal else "bidirectional" for causal in (record.causal, family.causal))
    text = (
        f"# {family.architecture}, {parameters / 1e6:,.1f}M parameters\n\n"
        f"Pretrained with megatron_ext and exported after step {record.step:,}. Attention in the last step: {trained}."
    )
    if trained != exported:
        text += (
            f" The exported class attends {exported}ly, which this model was not trained to do: it is a starting point for "
            "further training or fine-tuning, and its masked-token predictions mean nothing yet."
        )
    return text


def _training(tree: dict[str, Any]) -> dict[str, Any]:
    config = tree["config"]
    chosen = {
        "phase": tree.get("phase"),
        "steps": tree["step"],
        "samples": tree.get("samples"),
        "tokens": tree.get("tokens"),
        "predicted tokens": tree.get("predicted_tokens"),
        "FLOPs": f"{tree['flops']:.4g}" if tree.get("flops") is not None else None,
        "sequence length": config.get("data", {}).get("sequence_length"),
        "global batch size": config.get("training", {}).get("global_batch_size"),
        "precision": config.get("training", {}).get("precision"),
        "seed": config.get("training", {}).get("seed"),
        "parallel layout": tree.get("parallel"),
        "tokenizer SHA-256": tree["tokenizer"]["fingerprint"],
        "MLflow run": tree.get("mlflow_run_id"),
        "branched from": tree.get("parent"),
        "versions": tree.get("versions"),
        "checkpoint written": tree.get("created"),
    }
    return {name: value for name, value in chosen.items() if value is not None}


def _verification(
    record: RunRecord, family: Family, verifications: tuple[VerificationReport, ...], rounding: Rounding | None
) -> str:
    if not verifications:
        return "Not verified: the export was made without verification."
    mask = ", run under a causal mask," if record.causal and not family.causal else ""
    text = (
        f"The exported folder{mask} was reloaded in float32 and its logits compared with those of the training code, over the "
        "whole vocabulary, on Article 1 of the Universal Declaration of Human Rights in several scripts. Token ids of both "
        f"tokenizers are equal on these texts. Limit of the largest difference: {LIMIT:.0e}.\n\n"
    )
    if rounding is not None:
        text += (
            "The weights were compared as trained, and as written against the trained weights rounded likewise. Rounding moves "
            f"a logit by {rounding[0]:.2g} at most and {rounding[1]:.2g} on average.\n\n"
        )
    return text + _records([asdict(report) for report in verifications])


def _pairs(values: dict[str, Any]) -> str:
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _records(records: list[dict[str, Any]] | None) -> str:
    """A table with one row a record and a column for every key that occurs."""
    if not records:
        return "Not recorded."
    columns = list(dict.fromkeys(name for entry in records for name in entry))
    rows = [" | ".join(_cell(entry.get(name)) for name in columns) for entry in records]
    return "\n".join(f"| {row} |" for row in (" | ".join(map(_cell, columns)), " | ".join(["---"] * len(columns)), *rows))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(item)}" for name, item in value.items())
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
