"""The doctor on layouts and checkpoints: the real ones pass, and a fault in either is found."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint_files import describe_files, seal
from megatron_ext.doctor import equivalence
from megatron_ext.doctor.checkpoint import check_checkpoints
from megatron_ext.doctor.text import Painter, render
from megatron_ext.errors import UserError
from megatron_ext.runtime.launch import run_on_ranks
from megatron_ext.runtime.megatron_versions import common_writer
from tests.conftest import Corpus
from tests.distributed.test_training import config_tree

ROOT = Path(__file__).parents[2]
HAS_COMMON_FILE = common_writer() is not None
NOT_CHECKED = "AdamW's step count was not checked"
"""What the doctor says of a checkpoint without `common.pt`, as megatron-core 0.19 writes them."""
needs_common_file = pytest.mark.skipif(not HAS_COMMON_FILE, reason="megatron-core 0.19 writes no common.pt")


def measure_with_faults(trial: Any) -> Any:
    """The doctor's own measurement, in ranks whose attention looks ahead under clm and whose gradients are off under mlm."""

    from megatron_ext.doctor import whole_tensors
    from megatron_ext.model import attention

    mask_type, whole_gradients = attention.mask_type, whole_tensors.whole_gradients
    run = equivalence._run

    def broken_run(trial: Any, objective: str, *arguments: Any) -> Any:
        if objective == "clm":
            attention.mask_type = lambda *_: "no_mask"
        if objective == "mlm":
            whole_tensors.whole_gradients = _scaled(whole_gradients)
        try:
            return run(trial, objective, *arguments)
        finally:
            attention.mask_type, whole_tensors.whole_gradients = mask_type, whole_gradients

    equivalence._run = broken_run
    return equivalence.measure(trial)


def _scaled(whole_gradients: Any) -> Any:
    """One element of one gradient is off by a ten-thousandth of the largest."""

    def gradients(*arguments: Any) -> dict[str, torch.Tensor]:
        found = whole_gradients(*arguments)
        weight = found["decoder.layers.1.mlp.linear_fc2.weight"]
        weight[3, 5] += 1e-4 * weight.abs().max()
        return found

    return gradients


def test_faults_in_the_ranks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_faults(function: Any, world_size: int, *arguments: Any, **options: Any) -> list[Any]:
        return run_on_ranks(measure_with_faults if world_size > 1 else function, world_size, *arguments, **options)

    monkeypatch.setattr(equivalence, "run_on_ranks", with_faults)
    report = equivalence.check_equivalence("tensor=2", "fp32", True, ("clm", "mlm", "mntp"), steps=2)
    rows = {(row["objective"], row["step"]): row for row in report.facts["results"]}
    assert {key: row["ok"] for key, row in rows.items()} == {
        (objective, step): objective == "mntp" for objective in ("clm", "mlm", "mntp") for step in (1, 2)
    }
    assert any("the loss differs" in failure for failure in rows["clm", 1]["failures"])
    assert rows["mlm", 1]["worst_parameter"] == "decoder.layers.1.mlp.linear_fc2.weight"
    assert rows["mlm", 1]["worst_gradient_difference"] == pytest.approx(1e-4, rel=0.1)
    assert "FAIL" in "\n".join(render(report, Painter(coloured=False)))


def test_the_tool_compares_bf16_with_float32() -> None:
    arguments = "--equivalence --layout data=1 --precision bf16 --objective mlm --packing unpacked --json"
    command = [sys.executable, str(ROOT / "tools/doctor.py"), *arguments.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["world_size"], report["packing"], report["precision"]) == (1, "unpacked", "bf16")
    (row,) = report["results"]
    assert row["ok"]
    assert 1e-4 < row["worst_gradient_difference"] < 1e-1  # bf16 against float32, not a model against itself
    assert len(row["gradient_differences"]) == 4 * 6 + 3


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="virtual_pipeline"):
        equivalence.check_equivalence("virtual_pipeline=2", "fp32", True, ("mlm",), 1)


# --- checkpoints -----------------------------------------------------------------------------------------------------------


def train_all(trees: list[dict[str, Any]]) -> None:
    from megatron_ext.config_reading import from_dict
    from megatron_ext.train.trainer import train

    for tree in trees:
        train(from_dict(tree))


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs: float32, and bf16 with the distributed optimizer and a tied embedding."""
    folder = tmp_path_factory.mktemp("runs")
    phases = [{"objective": "clm", "steps": 1}, {"objective": "mlm", "steps": 2, "optimizer_state": "reset"}]
    short = {"phases": phases, "validation": {"interval": 0}, "optimizer": {"warmup_steps": 1}}
    other = {"precision": {"recipe": "bf16"}, "model": {"preset": "nano", "tie_embeddings": True}}
    trees = [
        config_tree(corpus, folder / "plain", {}, **short),
        config_tree(corpus, folder / "other", {"distributed_optimizer": True}, **short, **other),
    ]
    run_on_ranks(train_all, 1, trees)
    return folder


@pytest.mark.parametrize("name", ["plain", "other"])
def test_whole_checkpoints_pass_oldest_first(runs: Path, name: str) -> None:
    report = check_checkpoints(runs / name)
    assert report.ok, report.problems
    assert [note for note in report.notes if NOT_CHECKED not in note] == []
    assert [seen["step"] for seen in report.facts["checkpoints"]] == [1, 2, 3]
    assert "checkpoint: all good" in render(report, Painter(coloured=False))
    json.dumps(report.as_dict())


@pytest.fixture
def checkpoint(runs: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may break: step 3, two steps after the optimizer was reset."""
    return Path(shutil.copytree(runs / "plain/checkpoints/step_00000003", tmp_path / "step_00000003"))


def change_record(checkpoint: Path, **changes: Any) -> None:
    """Write other values into run.json, with the sum that belongs to them."""
    (checkpoint / "run.json").write_text(json.dumps(seal(record_of(checkpoint) | changes)))


def record_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "run.json").read_text())


def first_shard(checkpoint: Path) -> Path:
    return sorted(checkpoint.glob("*.distcp"))[0]


def flip_a_bit(checkpoint: Path) -> None:
    content = bytearray(first_shard(checkpoint).read_bytes())
    content[len(content) // 2] ^= 1
    first_shard(checkpoint).write_bytes(content)


def rename(checkpoint: Path) -> Path:
    return checkpoint.rename(checkpoint.with_name("step_00000009"))


def shrink_encoder(checkpoint: Path) -> None:
    encoder = {**record_of(checkpoint)["encoder"], "num_layers": 3, "ffn_hidden_size": 128}
    change_record(checkpoint, encoder=encoder)


def batch_change(step: int, before: Any, now: int) -> dict[str, Any]:
    """What `run.json` keeps of a batch size that was changed by name."""
    return {"step": step, "field": "training.global_batch_size", "before": before, "now": now, "effect": "", "final": False}


BREAKS = {
    "has the blake3 sum": flip_a_bit,
    "is missing": lambda checkpoint: first_shard(checkpoint).unlink(),
    "bytes, ": lambda checkpoint: os.truncate(first_shard(checkpoint), 100),
    "does not name it": lambda checkpoint: (checkpoint / "extra.bin").touch(),
    "cannot be read": lambda checkpoint: (checkpoint / ".metadata").write_bytes(b"\x80\x04damaged"),
    "run.json": lambda checkpoint: (checkpoint / "run.json").write_text("{"),
    "there is no": lambda checkpoint: (checkpoint / "run.json").unlink(),
    "the folder's name says 9": rename,
    "samples is 7": lambda checkpoint: change_record(checkpoint, samples=7),
    "tokens is 8": lambda checkpoint: change_record(checkpoint, tokens=8),
    "phase is 0-clm": lambda checkpoint: change_record(checkpoint, phase="0-clm"),
    "causal is True": lambda checkpoint: change_record(checkpoint, causal=True),
    "step is 4, but its phases end with step 3": lambda checkpoint: change_record(checkpoint, step=4),
    "outside the plan of 3 steps": lambda checkpoint: change_record(checkpoint, step=4, phases=[]),
    "branches/notes.txt is there": lambda checkpoint: (
        (checkpoint / "branches").mkdir(),
        (checkpoint / "branches/notes.txt").touch(),
    ),
    "do not lead to its configuration": lambda checkpoint: change_record(checkpoint, changes=[batch_change(1, 8, 12)]),
    "samples is 48 in run.json, but": lambda checkpoint: change_record(checkpoint, changes=[batch_change(1, 8, 16)]),
    "belongs to no parameter": shrink_encoder,
    "has the shape": shrink_encoder,
    "lacks flops": lambda checkpoint: (checkpoint / "run.json").write_text(
        json.dumps({key: value for key, value in record_of(checkpoint).items() if key != "flops"})
    ),
    "parallel.tensor is x": lambda checkpoint: change_record(checkpoint, parallel={"tensor": "x"}),
    "padded_vocab_size is 641": lambda checkpoint: change_record(checkpoint, padded_vocab_size=641),
    "the run's had 0000": lambda checkpoint: change_record(
        checkpoint, tokenizer={**record_of(checkpoint)["tokenizer"], "fingerprint": "0" * 64}
    ),
}


if HAS_COMMON_FILE:
    BREAKS["AdamW has counted 2"] = lambda checkpoint: change_record(checkpoint, step=2)


@pytest.mark.parametrize("message", BREAKS)
def test_every_break_is_named(checkpoint: Path, message: str) -> None:
    checkpoint = BREAKS[message](checkpoint) if message.startswith("the folder") else (BREAKS[message](checkpoint), checkpoint)[1]
    found = check_checkpoints(checkpoint).problems
    assert any(message in problem for problem in found), found
    assert all("\n" not in problem for problem in found)


def test_values_that_are_not_finite_are_found_behind_right_sums(checkpoint: Path) -> None:
    """A run that saved NaN: every file is as it was written."""
    from torch.distributed.checkpoint import FileSystemReader

    index = FileSystemReader(checkpoint).read_metadata()
    keys = ("decoder.layers.2.mlp.linear_fc2.weight", "optimizer.state.exp_avg.output_layer.weight")
    for key in keys:
        place = next(info for item, info in index.storage_data.items() if item.fqn == key)
        path = checkpoint / place.relative_path
        content = path.read_bytes()
        part = content[place.offset : place.offset + place.length]
        value = next(part[at : at + 4] for at in range(len(part) // 2 & ~3, len(part), 4) if any(part[at : at + 4]))
        nan = torch.tensor(float("nan")).numpy().tobytes()
        spoiled = part.replace(value, nan, 1)
        assert len(spoiled) == len(part)
        path.write_bytes(content[: place.offset] + spoiled + content[place.offset + place.length :])
    change_record(checkpoint, files=describe_files(checkpoint, list(record_of(checkpoint)["files"])))
    found = check_checkpoints(checkpoint).problems
    assert [problem.split()[0] for problem in found] == list(keys)
    assert all("not finite" in problem for problem in found)


@needs_common_file
@pytest.mark.parametrize(
    "skipped, counted, passes", [(0, 2, True), (1, 1, True), (1, 2, True), (2, 0, True), (1, 0, False), (0, 1, False)]
)
def test_skipped_steps_are_not_counted_by_adamw(checkpoint: Path, skipped: int, counted: int, passes: bool) -> None:
    common = torch.load(checkpoint / "common.pt", weights_only=True)
    for group in common["optimizer"]["param_groups"]:
        group["step"] = counted
    torch.save(common, checkpoint / "common.pt")
    change_record(checkpoint, skipped_steps=skipped, files=describe_files(checkpoint, list(record_of(checkpoint)["files"])))
    found = check_checkpoints(checkpoint).problems
    assert found == [] if passes else [f"AdamW has counted {counted}" in problem for problem in found] == [True]


def test_a_branch_leaves_a_checkpoint_whole(checkpoint: Path, corpus: Corpus, tmp_path: Path) -> None:
    from megatron_ext.config_reading import from_dict
    from megatron_ext.train.retention import note_branch

    note_branch(checkpoint, from_dict(config_tree(corpus, tmp_path / "branch", {})))
    assert len(list((checkpoint / "branches").iterdir())) == 1
    assert check_checkpoints(checkpoint).problems == []


@needs_common_file
def test_a_checkpoint_without_common_pt_passes_with_a_word(checkpoint: Path) -> None:
    (checkpoint / "common.pt").unlink()
    assert any("common.pt is missing" in problem for problem in check_checkpoints(checkpoint).problems)
    change_record(checkpoint, files={name: entry for name, entry in record_of(checkpoint)["files"].items() if name != "common.pt"})
    report = check_checkpoints(checkpoint)
    assert report.problems == []
    assert "step count was not checked" in report.notes[0]


def test_sizes_changed_on_the_way_are_counted_as_they_were(checkpoint: Path) -> None:
    record = record_of(checkpoint)
    batch, length = record["config"]["training"]["global_batch_size"], record["config"]["data"]["sequence_length"]
    changes = [batch_change(1, 8, 4), {**batch_change(1, 16, length), "field": "data.sequence_length"}, batch_change(2, 4, batch)]
    sums = {"samples": 8 + 4 + batch, "tokens": 8 * 16 + 4 * length + batch * length, "predicted_tokens": 1}
    change_record(checkpoint, changes=changes, **sums)
    assert check_checkpoints(checkpoint).problems == []


def test_a_checkpoint_of_an_earlier_version_passes(checkpoint: Path) -> None:
    from megatron_ext.run_record import ENCODER, RUN_SINCE

    record = record_of(checkpoint)
    record["encoder"] = {name: record["encoder"][name] for name in ENCODER}
    old = {key: value for key, value in record.items() if key not in RUN_SINCE}
    (checkpoint / "run.json").write_text(json.dumps(seal(old)))
    assert check_checkpoints(checkpoint).problems == []


def test_other_versions_are_a_note(checkpoint: Path) -> None:
    change_record(checkpoint, versions={"torch": "1.0", "megatron-core": "0.1"})
    report = check_checkpoints(checkpoint)
    assert report.ok
    notes = [note for note in report.notes if NOT_CHECKED not in note]
    assert [note.split()[2] for note in notes] == ["torch", "megatron-core"]
