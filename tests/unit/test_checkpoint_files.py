"""What is damage in a checkpoint and what is not, and what retention and a new save may never take away."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint_files import (
    RUN_FILE,
    complete_checkpoints,
    describe_files,
    file_sum,
    find_damage,
    published_checkpoints,
    seal,
)
from megatron_ext.config import CheckpointConfig
from megatron_ext.config_reading import from_dict
from megatron_ext.errors import UnreadableError
from megatron_ext.objective import PhasePlan
from megatron_ext.train.retention import BRANCHES, remove_old_checkpoints
from tests.unit.test_properties_checkpoint import RECORD


def write_checkpoint(folder: Path, step: int, **changes: Any) -> Path:
    """A directory that looks like a checkpoint, with one file besides run.json."""
    checkpoint = folder / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "__0_0.distcp").write_bytes(b"weights")
    record = {**copy.deepcopy(RECORD), "step": step, "files": describe_files(checkpoint, ["__0_0.distcp"]), **changes}
    (checkpoint / RUN_FILE).write_text(json.dumps(seal(record), indent=1))
    return checkpoint


def rewrite(checkpoint: Path, **changes: Any) -> None:
    """Change run.json as a disk, or a person, might."""
    path = checkpoint / RUN_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_every_value_of_the_record_is_covered(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 10)
    assert find_damage(checkpoint) == {}
    for name, value in (("step", 11), ("samples", 1), ("skipped_in_a_row", 5), ("run_key", "other"), ("causal", False)):
        before = (checkpoint / RUN_FILE).read_text()
        rewrite(checkpoint, **{name: value})
        assert find_damage(checkpoint)[RUN_FILE] == "run.json is not as it was written", name
        (checkpoint / RUN_FILE).write_text(before)
    renamed = checkpoint.rename(tmp_path / "step_00000020")
    assert find_damage(renamed) == {RUN_FILE: "run.json is that of step 10"}
    assert find_damage(renamed.rename(tmp_path / "best")) == {}


def test_a_record_without_a_sum_is_one_of_an_earlier_version(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 10)
    record = json.loads((checkpoint / RUN_FILE).read_text())
    del record["record_sha256"]
    (checkpoint / RUN_FILE).write_text(json.dumps(record))
    assert find_damage(checkpoint) == {}


def test_what_a_newer_version_wrote_is_not_called_damaged(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 10)
    rewrite(checkpoint, format=2)
    with pytest.raises(UnreadableError, match="format 2"):
        find_damage(checkpoint)
    rewrite(checkpoint, format=1, encoder={**RECORD["encoder"], "experts": 8})
    with pytest.raises(UnreadableError, match="experts"):
        find_damage(checkpoint)


def test_sums_are_those_that_the_standards_give_for_abc(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sum(tmp_path / "file") == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    earlier = file_sum(tmp_path / "file", "sha256")
    assert earlier == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_checkpoint_summed_with_sha256_is_still_held_against_its_sums(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 10)
    file = checkpoint / "__0_0.distcp"
    content = file.read_bytes()
    files = {file.name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    record = json.loads((checkpoint / RUN_FILE).read_text()) | {"files": files}
    del record["record_sha256"]
    (checkpoint / RUN_FILE).write_text(json.dumps(seal(record)))
    assert find_damage(checkpoint) == {}
    file.write_bytes(content[:-1] + b"?")
    assert "has the sha256 sum" in find_damage(checkpoint)[file.name]


def test_a_disk_that_errs_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path, 10)

    def failing(path: Path, kind: str) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("megatron_ext.checkpoint_files.file_sum", failing)
    with pytest.raises(UnreadableError, match="__0_0.distcp cannot be read"):
        find_damage(checkpoint)


def test_a_checkpoint_without_a_record_is_there_and_damaged(tmp_path: Path) -> None:
    whole, robbed = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 20)
    (robbed / RUN_FILE).unlink()
    assert published_checkpoints(tmp_path) == [whole, robbed]
    assert complete_checkpoints(tmp_path) == [whole]
    assert "there is no run.json" in find_damage(robbed)[RUN_FILE]


def test_what_was_kept_for_ever_stays_though_the_configuration_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(1, 10):
        write_checkpoint(tmp_path, step, kept=step in (2, 3))
    (tmp_path / "step_00000004" / BRANCHES).mkdir()
    (tmp_path / "step_00000004" / BRANCHES / "other.json").write_text("{}")
    (tmp_path / "step_00000005" / RUN_FILE).write_text("{")
    tree = {
        "output_dir": "o",
        "data": {"tokenizer": "t", "train": [{"prefix": "p"}]},
        "phases": [{"objective": "clm", "steps": 99}],
    }
    remove_old_checkpoints(tmp_path, CheckpointConfig(keep_last=1, branch_points=[6]), PhasePlan.from_config(from_dict(tree)))
    kept = [int(path.name[5:]) for path in published_checkpoints(tmp_path)]
    # 2, 3: kept when they were saved; 4: branched from; 5: cannot be read, so nobody knows; 6: kept now; 9: the newest
    assert kept == [2, 3, 4, 5, 6, 9]
    assert "step_00000005 is not removed" in capsys.readouterr().err
