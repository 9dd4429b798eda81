"""On GPUs: whole runs in bfloat16 and FP8, an exact resume, export, and how fast it is."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.runtime.launch import run_on_ranks
from tests.conftest import Corpus
from tests.distributed.test_training import SAVED, TOTAL, Run, config_tree, run_training

FP8 = {"fp8-delayed": (9, 0), "fp8-tensorwise": (9, 0), "fp8-blockwise": (9, 0), "mxfp8": (10, 0)}
"""Recipes, and the first compute capability on which this project runs each."""


def tree_of(corpus: Corpus, folder: Path, gpus: int, recipe: str, **changes: Any) -> dict[str, Any]:
    """The distributed tests' run with the `tiny` model, in widths of whole FP8 blocks, over as many GPUs as divide its batch."""
    tree = config_tree(corpus, folder, {"distributed_optimizer": gpus > 1}, precision={"recipe": recipe}, **changes)
    return tree | {"model": {"preset": "tiny", "ffn_hidden_size": 768}}


def ranks_for(gpus: int) -> int:
    """Data-parallel ranks: each runs micro-batches of two samples."""
    return max(count for count in (1, 2, 4, 8) if count <= gpus)


def test_a_run_resumes_to_the_bit_and_its_checkpoint_exports(
    gpus: int, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    ranks, start = ranks_for(gpus), str(tmp_path / f"whole/checkpoints/step_{SAVED:08d}")
    trees = [
        tree_of(corpus, tmp_path / "whole", ranks, "bf16"),
        tree_of(corpus, tmp_path / "resumed", ranks, "bf16", resume=start),
    ]
    run_on_ranks(run_training, ranks, trees, on_gpus=True)
    whole, resumed = (Run(Path(tree["output_dir"]), []) for tree in trees)
    assert whole.shard_sums(TOTAL) == resumed.shard_sums(TOTAL)
    command = ["tools/convert_checkpoint.py", "export", str(whole.checkpoint(TOTAL)), str(tmp_path / "hf"), "--verify"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "EuroBertForMaskedLM" in done.stdout


@pytest.mark.parametrize("recipe", FP8)
def test_fp8_trains_like_bf16(transformer_engine: None, corpus: Corpus, tmp_path: Path, recipe: str) -> None:
    """Eight steps are no proof of convergence: this sees a recipe that is wrong, not one that is worse."""
    capability = torch.cuda.get_device_capability()
    if capability < FP8[recipe]:
        pytest.skip(f"{recipe} needs compute capability {FP8[recipe]}, this GPU has {capability}")
    trees = [tree_of(corpus, tmp_path / name, 1, name) for name in ("bf16", recipe)]
    for tree in trees:
        run_on_ranks(run_training, 1, [tree], on_gpus=True)
    expected, found = (Run(Path(tree["output_dir"]), []).losses() for tree in trees)
    assert found.keys() == expected.keys()
    for key, loss in expected.items():
        assert found[key] == pytest.approx(loss, rel=2e-2), key


@pytest.mark.parametrize("recipe", ["bf16", "fp8-tensorwise"])
def test_throughput(transformer_engine: None, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture, recipe: str) -> None:
    """One GPU, the study's 210M, micro-batches of 16,384 tokens. Prints what was measured; only nonsense fails."""
    if recipe != "bf16" and torch.cuda.get_device_capability() < FP8[recipe]:
        pytest.skip(f"{recipe} needs compute capability {FP8[recipe]}")
    tree = tree_of(corpus, tmp_path, 1, recipe, validation={"interval": 0}, checkpoint={"interval": 0})
    tree["model"] = {"preset": "210m"}
    tree["data"]["sequence_length"] = 2048
    tree["training"] |= {"micro_batch_size": 8, "global_batch_size": 32, "log_interval": 5}
    tree["phases"] = [{"objective": "mlm", "steps": 15}]
    run_on_ranks(run_training, 1, [tree], on_gpus=True)
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"mfu"' in line][-1]
    numbers = {name: last[name] for name in ("tokens_per_second", "mfu", "memory_gib")}
    with capsys.disabled():
        print(f"\n210m, {recipe}, {torch.cuda.get_device_name()}: " + ", ".join(f"{k} {v:,.3f}" for k, v in numbers.items()))
    assert 0.01 < last["mfu"] < 1
