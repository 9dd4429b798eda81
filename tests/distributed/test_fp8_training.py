"""Whole runs with emulated FP8: exact resumes, changes of recipe, and what the checkpoints say and give."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.hf.checkpoint_reader import CheckpointReader
from megatron_ext.hf.export import export_checkpoint
from megatron_ext.runtime.launch import run_on_ranks
from tests.conftest import Corpus
from tests.distributed.test_training import Run, config_tree, run_training

SAVED, MOVED, TOTAL = 2, 3, 4
EMULATED = {"recipe": "fp8-delayed", "emulation": True, "amax_history_length": 1}
FIELDS = ["precision.recipe", "precision.emulation", "precision.amax_history_length"]
HISTORIES = 8  # two layers of four are in FP8, with four products each


def tree(corpus: Corpus, folder: Path, precision: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Two steps of CLM, then two of MLM; two micro-batches each."""
    phases = [{"objective": "clm", "steps": 2}, {"objective": "mlm", "steps": 2}]
    training = {"global_batch_size": 4, **changes.pop("training", {})}
    fixed = {"phases": phases, "validation": {"interval": 0}, "checkpoint": {"interval": 1}}
    fixed["optimizer"] = {"learning_rate": 1e-3}
    return config_tree(corpus, folder, {}, precision=precision, training=training, **changes) | fixed


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Delayed scaling, whole and continued; continued in bfloat16, and that in FP8 again; and with another history."""
    folder = tmp_path_factory.mktemp("fp8")
    start = str(folder / f"whole/checkpoints/step_{SAVED:08d}")
    middle = str(folder / f"bf16/checkpoints/step_{MOVED:08d}")
    changed = {"resume": start, "resume_changes": FIELDS}
    trees = {
        "whole": tree(corpus, folder / "whole", EMULATED),
        "resumed": tree(corpus, folder / "resumed", EMULATED, resume=start),
        "bf16": tree(corpus, folder / "bf16", {"recipe": "bf16"}, training={"stop_at_step": MOVED}, **changed),
        "back": tree(corpus, folder / "back", EMULATED, resume=middle, resume_changes=FIELDS),
        "longer": tree(corpus, folder / "longer", {**EMULATED, "amax_history_length": 3}, **changed),
    }
    results = run_on_ranks(run_training, 1, list(trees.values()))
    return {name: Run(folder / name, [rank[k] for rank in results]) for k, name in enumerate(trees)}


def histories(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(checkpoint)
    return {name: reader.read(name) for name in reader.fp8_histories}


def test_resume_is_bitwise_exact_with_the_history(runs: dict[str, Run]) -> None:
    assert runs["whole"].shard_sums(TOTAL) == runs["resumed"].shard_sums(TOTAL)
    before, after = (histories(runs["whole"].checkpoint(step)) for step in (SAVED, TOTAL))
    assert len(before) == HISTORIES and all(history.shape == (1, 3) and (history > 0).all() for history in before.values())
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_run_moves_between_recipes(runs: dict[str, Run]) -> None:
    """bfloat16 leaves the history behind; FP8 after it begins a new one, as one of another length does."""
    assert histories(runs["bf16"].checkpoint(MOVED)) == {}
    for name, length in (("back", 1), ("longer", 3)):
        found = histories(runs[name].checkpoint(TOTAL))
        steps = TOTAL - (MOVED if name == "back" else SAVED)
        assert len(found) == HISTORIES
        for history in found.values():
            assert history.shape == (length, 3) and ((history > 0).sum(dim=0) == min(length, steps)).all()


def test_what_is_emulated_is_called_so_and_exports(runs: dict[str, Run], tmp_path: Path) -> None:
    from megatron_ext.doctor.checkpoint import check_checkpoint
    from megatron_ext.train.checkpoint_logits import checkpoint_logits

    checkpoint = runs["whole"].checkpoint(TOTAL)
    record = json.loads((checkpoint / "run.json").read_text())
    assert record["precision"] == "fp8-delayed (emulation)" and record["config"]["precision"]["emulation"] is True
    assert check_checkpoint(checkpoint).problems == []
    export_checkpoint(checkpoint, tmp_path / "hf", reference_logits=checkpoint_logits)
    assert "fp8-delayed (emulation)" in (tmp_path / "hf/README.md").read_text()
