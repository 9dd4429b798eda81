"""The exported model's README.md: what it is, how to use it, and where it comes from."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.hf.checkpoint_reader import RunRecord
from megatron_ext.hf.families import Family
from megatron_ext.hf.import_config import HUB_NAME
from megatron_ext.hf.verify import LIMIT, Rounding, VerificationReport
from megatron_ext.hf.verify_tokenizer import TokenizerReport
from megatron_ext.secrets import redact

USAGE = {
    "masked": 'from transformers import pipeline\n\nfill_mask = pipeline("fill-mask", model="PATH")\n'
    'fill_mask(f"The capital of France is {fill_mask.tokenizer.mask_token}.")',
    "bidirectional": 'from transformers import AutoModel\n\nencoder = AutoModel.from_pretrained("PATH")',
    "causal": 'from transformers import pipeline\n\ngenerate = pipeline("text-generation", model="PATH")\n'
    'generate("The capital of France is")',
}


COUNTERS = ("samples", "tokens", "predicted_tokens", "flops")
ANCESTOR_COLUMNS = ("step", "phase", *COUNTERS, "mlflow_run_id", "created")


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
        _front_matter(record, family),
        _introduction(record, family, parameters),
        f"## Usage\n\n```python\n{USAGE[_kind(family)]}\n```",
        "## Model\n\n" + _pairs({**asdict(record.encoder), "vocab_size": record.vocab_size, "dtype": dtype}),
        "## Training\n\n" + _pairs(_training(record.tree)),
        *_lineage(record.tree),
        "## Phases\n\n" + _records(record.tree.get("phases")),
        "## Data\n\n" + _records(record.tree.get("data")),
        "## Verification\n\n" + _verification(record, family, verifications, rounding),
    ]
    return redact("\n\n".join(sections) + "\n")  # a checkpoint of before secrets were taken out of run.json may hold some


def _kind(family: Family) -> str:
    return "causal" if family.causal else "masked" if family.architecture.endswith("ForMaskedLM") else "bidirectional"


def _front_matter(record: RunRecord, family: Family) -> str:
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": {"causal": "text-generation", "masked": "fill-mask", "bidirectional": "feature-extraction"}[_kind(family)],
        "tags": ["megatron_ext", family.name],
    }
    base_model = (record.tree.get("imported") or {}).get("base_model")
    if isinstance(base_model, str) and HUB_NAME.fullmatch(base_model):  # the hub refuses a card that names anything else
        fields["base_model"] = base_model
    return f"---\n{yaml.safe_dump(redact(fields), sort_keys=False)}---"


def _introduction(record: RunRecord, family: Family, parameters: int) -> str:
    trained, exported = ("causal" if causal else "bidirectional" for causal in (record.causal, family.causal))
    text = (
        f"# {family.architecture}, {parameters / 1e6:,.1f}M parameters\n\n{_origin(record)} Attention in the last step: {trained}."
    )
    if trained != exported:
        text += (
            f" The exported class attends {exported}ly, which this model was not trained to do: it is a starting point for "
            "further training or fine-tuning, and its masked-token predictions mean nothing yet."
        )
    return text


def _origin(record: RunRecord) -> str:
    imported = record.tree.get("imported")
    if not imported:
        return f"Pretrained with megatron_ext and exported after step {record.step:,}."
    if record.step == 0:
        return f"The model {imported.get('folder')}, imported into megatron_ext and exported without training."
    return f"Trained further with megatron_ext from {imported.get('folder')}, and exported after step {record.step:,}."


def _precision(config: dict[str, Any]) -> str | None:
    """The recipe; that an emulated one was emulated is always said. Earlier versions kept it under `training`."""
    precision = config.get("precision", {})
    recipe = precision.get("recipe") or config.get("training", {}).get("precision")
    return f"{recipe} (emulation)" if precision.get("emulation") else recipe


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
        "precision": _precision(config),
        "seed": config.get("training", {}).get("seed"),
        "parallel layout": tree.get("parallel"),
        "tokenizer SHA-256": tree["tokenizer"]["fingerprint"],
        "MLflow run": tree.get("mlflow_run_id"),
        "branched from": _parent(tree),
        "versions": tree.get("versions"),
        "checkpoint written": tree.get("created"),
    }
    return {name: value for name, value in chosen.items() if value is not None}


def _lineage(tree: dict[str, Any]) -> list[str]:
    """What the run started from, oldest first, and the sums over the line; no section for a run that started from nothing."""
    imported, ancestors = tree.get("imported"), tree.get("lineage") or []
    if not imported and not ancestors:
        return []
    rows: list[dict[str, Any]] = []
    if imported:
        rows.append({"from": f"{imported.get('folder')} ({imported.get('architecture')}, Hugging Face)"})
    # An import is the Hugging Face model itself: its line stands already.
    trained = [ancestor for ancestor in ancestors if ancestor.get("phase") != "imported"]
    rows += [{"from": _place(ancestor.get("checkpoint")), **_chosen(ancestor)} for ancestor in trained]
    rows.append({"from": "this run", **_chosen(tree)})
    totals = {name: sum(run.get(name) or 0 for run in (*trained, tree)) for name in COUNTERS}
    rows.append({"from": "together", **totals})
    sections = ["## Lineage\n\nEach line counts its own training.\n\n" + _records(rows)]
    if imported:
        sections.append("### Imported model\n\n" + _pairs({name: value for name, value in imported.items() if value is not None}))
    for ancestor in trained:
        title = f"{_place(ancestor.get('checkpoint'))}".replace("\n", " ")
        details = "\n\n".join(_records(ancestor[part]) for part in ("phases", "data") if ancestor.get(part))
        sections += [f"### Phases and data of {title}\n\n{details}"] if details else []
    return sections


def _chosen(run: dict[str, Any]) -> dict[str, Any]:
    return {name: run.get(name) for name in ANCESTOR_COLUMNS}


def _verification(
    record: RunRecord, family: Family, verifications: tuple[VerificationReport, ...], rounding: Rounding | None
) -> str:
    if not verifications:
        return "Not verified: the export was made without verification."
    mask = ", run under a causal mask," if record.causal and not family.causal else ""
    text = (
        f"The exported folder{mask} was reloaded in float32 and its logits compared with those of the training code, over the "
        "whole vocabulary, on Article 1 of the Universal Declaration of Human Rights in several scripts. Limit of the largest "
        f"difference: {LIMIT:.0e}. The norm of every row of every weight was compared with the checkpoint's. Token ids of both "
        "tokenizers are equal on these texts and on hard cases such as joined emoji, combining marks, white space and code"
        f"{_exceptions(verifications[-1].tokenizer_report)}.\n\n"
    )
    if rounding is not None:
        text += (
            "The weights were compared as trained, and as written against the trained weights rounded likewise. Rounding moves "
            f"a logit by {rounding[0]:.2g} at most and {rounding[1]:.2g} on average.\n\n"
        )
    figures = [report.figures() for report in verifications]
    return text + "\n\n".join(_pairs(values) for values in figures)


def _exceptions(tokenizer: TokenizerReport | None) -> str:
    """The two kinds of difference that are known, where there were any."""
    text = ""
    if tokenizer and tokenizer.reordered:
        text += f"; in {tokenizer.reordered} run(s) of a repeated character the same pieces, of equal score, stand in another order"
    if tokenizer and tokenizer.renormalized:
        text += f"; {tokenizer.renormalized} case(s) of decomposed letters or line ends are normalized otherwise"
    return text


def _parent(tree: dict[str, Any]) -> dict[str, Any] | None:
    parent = tree.get("parent")
    return parent and {**parent, "checkpoint": _place(parent.get("checkpoint"))}


def _place(checkpoint: Any) -> Any:
    """Run and step of a checkpoint's path; where it lay on somebody's disk is nobody's business."""
    parts = [part for part in Path(checkpoint).parts if part not in ("checkpoints", "/")] if isinstance(checkpoint, str) else []
    return "/".join(parts[-2:]) or None


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
