"""The `run.json` of an imported checkpoint: a model at step 0 with no training of ours behind it, and where it comes from."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint_files import FORMAT, RUN_FILE, describe_files, read_run_file, seal
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.hf.import_config import ImportedConfig
from megatron_ext.hf.mask_token import MaskToken

DEFAULT_MASK_RATIO = 0.4


def write_record(
    aside: Path,
    config: ImportedConfig,
    origin: dict[str, Any],
    tokenizer: Tokenizer,
    mask: MaskToken | None,
    vocab_size: int,
    written: dict[str, dict[str, int | str]],
) -> None:
    """Complete the directory of an imported checkpoint.

    Args:
        aside: holds tensors and tokenizer.
        config: of the model.
        origin: where it comes from.
        tokenizer: loaded from the directory.
        mask: its mask token.
        vocab_size: rows of the embedding.
        written: sizes and sums of files that are known already, as `describe_files` gives them.
    """
    names = [str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file()]
    record: dict[str, Any] = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": 0,
        "phase": "imported",
        "causal": config.family.causal,
        **dict.fromkeys(("samples", "tokens", "predicted_tokens"), 0),
        "flops": 0.0,
        "phases": [],
        "comparison_mask_ratio": DEFAULT_MASK_RATIO,
        **dict.fromkeys(("parent", "mlflow_run_id", "run_key")),
        "imported": {
            "family": config.family.name,
            "architecture": config.family.architecture,
            **origin,
            "mask_token": None if mask is None else {**asdict(mask), "embedding": "as it was" if mask.how == "present" else "mean"},
        },
        "encoder": vars(config.encoder),
        "vocab_size": vocab_size,
        "padded_vocab_size": vocab_size,
        "tokenizer": {"path": str(tokenizer.source.relative_to(aside)), "fingerprint": tokenizer.fingerprint},
        "data": [],
        "parallel": {},
        "config": {"data": {}, "training": {}},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "files": dict(sorted((written | describe_files(aside, [name for name in names if name not in written])).items())),
    }
    (aside / RUN_FILE).write_text(json.dumps(seal(record), indent=1))
    read_run_file(aside)
