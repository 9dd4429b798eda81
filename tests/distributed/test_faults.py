"""Faults, with real processes: killed ranks and writers, damaged checkpoints, a full disk. What goes on must be bitwise equal."""

import random
import shutil
import time
from pathlib import Path

import pytest

from megatron_ext.checkpoint_files import checkpoint_name
from tests.conftest import Corpus
from tests.distributed.faults import (
    Job,
    assert_whole,
    error_of,
    finished,
    how_to_fill,
    leftovers,
    published,
    shard_sums,
    small_disk,
    small_tree,
    warnings_of,
)

STEPS = 16
TORCHRUN = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
KILLS = 3


@pytest.fixture(scope="module")
def undisturbed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run on one process that saved after every step."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Job(small_tree(corpus, folder / "run", STEPS, 1), folder) as run:
        finished(run)
    assert len(published(folder / "run")) == STEPS
    return folder / "run"


def final(output_dir: Path) -> dict[str, str]:
    return shard_sums(output_dir / "checkpoints" / checkpoint_name(STEPS))


def test_torchrun_goes_on_by_itself_when_a_rank_is_killed(corpus: Corpus, tmp_path: Path) -> None:
    steps, interval = 40, 8
    trees = [small_tree(corpus, tmp_path / name, steps, interval, resume="auto") for name in ("undisturbed", "killed")]
    with Job(trees[1], tmp_path, *TORCHRUN) as killed:
        killed.wait_until(
            lambda: published(tmp_path / "killed") and killed.last_step() % interval, "a step after a checkpoint was published"
        )
        killed.worker(1).kill()
        with Job(trees[0], tmp_path, *TORCHRUN) as undisturbed:
            finished(undisturbed)
        assert killed.wait() == 0, killed.text[-3000:]
        killed.wait_until_gone()
    (start,) = [line["resumed_from"] for line in killed.metrics() if "resumed_from" in line]
    assert start in range(interval, steps, interval)
    assert shard_sums(published(tmp_path / "killed")[-1]) == shard_sums(published(tmp_path / "undisturbed")[-1])
    assert len(published(tmp_path / "killed")) == steps // interval
    assert leftovers(tmp_path / "killed") == []
    assert_whole(published(tmp_path / "killed")[-1])


def test_sigkill_while_saving_leaves_only_whole_checkpoints(corpus: Corpus, undisturbed: Path, tmp_path: Path) -> None:
    tree = small_tree(corpus, tmp_path / "run", STEPS, 1, resume="auto")
    delays = random.Random(1)
    found = []
    for kill in range(KILLS):
        before = len(published(tmp_path / "run"))
        with Job(tree, tmp_path) as run:
            run.wait_until(lambda n=before: len(published(tmp_path / "run")) > n, "a checkpoint was published")
            run.wait_until(lambda: list((tmp_path / "run/checkpoints").glob(".writing-*")), "a save was under way")
            time.sleep(delays.uniform(0, 0.1) if kill else 0)  # the moment is what is tested
            run.process.kill()  # its manager and its writers are to end by themselves
            run.wait()
            run.wait_until_gone()
        found += leftovers(tmp_path / "run")
        for checkpoint in published(tmp_path / "run"):
            assert_whole(checkpoint)
            assert shard_sums(checkpoint) == shard_sums(undisturbed / "checkpoints" / checkpoint.name)
    assert [name for name in found if name.startswith(".writing-")], "no kill hit a save"
    with Job(tree, tmp_path) as run:
        finished(run)
        run.wait_until_gone()
    assert final(tmp_path / "run") == final(undisturbed)
    assert leftovers(tmp_path / "run") == []


def damage(checkpoint: Path, how: str) -> str:
    """Damage a checkpoint's largest file; returns its name."""
    shard = max(checkpoint.glob("*.distcp"), key=lambda file: (file.stat().st_size, file.name))
    content = bytearray(shard.read_bytes())
    if how == "truncated":
        shard.write_bytes(content[:-100])
    elif how == "a flipped bit":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    else:
        shard.unlink()
    return shard.name


def copy_of(undisturbed: Path, folder: Path, last_steps: range) -> Path:
    """An output folder with some checkpoints of the undisturbed run."""
    for step in last_steps:
        shutil.copytree(undisturbed / "checkpoints" / checkpoint_name(step), folder / "checkpoints" / checkpoint_name(step))
    return folder


def test_resume_auto_goes_back_to_the_newest_sound_checkpoint(corpus: Corpus, undisturbed: Path, tmp_path: Path) -> None:
    damages = {"truncated": 12, "a flipped bit": 11, "missing": 10}
    folder = copy_of(undisturbed, tmp_path / "run", range(9, 13))
    names = {step: damage(folder / "checkpoints" / checkpoint_name(step), how) for how, step in damages.items()}
    with Job(small_tree(corpus, folder, STEPS, 1, resume="auto"), tmp_path) as run:
        finished(run)
        assert run.metrics()[0]["step"] == 10
    lines = warnings_of(run)
    assert len(lines) == len(damages)
    for line, (step, name) in zip(lines, names.items(), strict=True):
        assert checkpoint_name(step) in line and f"damaged-{checkpoint_name(step)}" in line and name in line
    assert sorted(leftovers(folder)) == sorted(f"damaged-{checkpoint_name(step)}" for step in names)
    assert final(folder) == final(undisturbed)


def test_a_record_that_is_gone_or_changed_is_damage_too(corpus: Corpus, undisturbed: Path, tmp_path: Path) -> None:
    folder = copy_of(undisturbed, tmp_path / "run", range(9, 12))
    records = [path / "run.json" for path in published(folder)]
    records[1].write_text(records[1].read_text().replace('"step": 10,', '"step": 11,', 1))
    records[2].unlink()
    with Job(small_tree(corpus, folder, STEPS, 1, resume="auto"), tmp_path) as run:
        finished(run)
        assert run.metrics()[0]["step"] == 10
    assert sorted(leftovers(folder)) == [f"damaged-{checkpoint_name(step)}" for step in (10, 11)]
    assert final(folder) == final(undisturbed)


def test_checkpoints_of_a_newer_version_are_left_as_they_are(corpus: Corpus, undisturbed: Path, tmp_path: Path) -> None:
    folder = copy_of(undisturbed, tmp_path / "run", range(9, 11))
    newest = published(folder)[-1] / "run.json"
    newest.write_text(newest.read_text().replace('"format": 1,', '"format": 2,', 1))
    with Job(small_tree(corpus, folder, STEPS, 1, resume="auto"), tmp_path) as run:
        assert "has format 2" in error_of(run)
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.name not in map(checkpoint_name, (9, 10))] == []


def test_a_branch_that_is_started_again_goes_on(corpus: Corpus, undisturbed: Path, tmp_path: Path) -> None:
    """As torchrun or a requeue starts it: with the arguments of the first attempt."""
    start = undisturbed / "checkpoints" / checkpoint_name(4)
    tree = small_tree(corpus, tmp_path / "branch", STEPS, 1, resume=str(start))
    with Job(tree, tmp_path) as killed:
        killed.wait_until(lambda: len(published(tmp_path / "branch")) > 2, "three checkpoints")
        killed.kill_all()
    begun = published(tmp_path / "branch")[-1].name
    with Job(tree, tmp_path) as again:
        finished(again)
        assert [line["resumed_from"] for line in again.metrics() if "resumed_from" in line] == [int(begun[5:])]
    assert final(tmp_path / "branch") == final(undisturbed)


def test_damage_that_leaves_nothing_to_go_on_from_ends_the_run(corpus: Corpus, undisturbed: Path, tmp_path: Path) -> None:
    named = copy_of(undisturbed, tmp_path / "named", range(1, 3)) / "checkpoints" / checkpoint_name(2)
    name = damage(named, "a flipped bit")
    every = copy_of(undisturbed, tmp_path / "every", range(1, 3))
    names = [damage(path, how) for path, how in zip(published(every), ("truncated", "missing"), strict=True)]
    named_tree = small_tree(corpus, tmp_path / "named", STEPS, 1, resume=str(named))
    with Job(named_tree, tmp_path) as one, Job(small_tree(corpus, every, STEPS, 1, resume="auto"), tmp_path) as all_of_them:
        assert name in error_of(one) and str(named) in error_of(one)
        line = error_of(all_of_them)
    assert "every checkpoint" in line and names[0] in line
    assert [path.name for path in published(tmp_path / "named")] == [checkpoint_name(1), checkpoint_name(2)]
    # torchrun starts a run that failed again: the second attempt finds no step_* folder, and still must not start anew.
    with Job(small_tree(corpus, every, STEPS, 1, resume="auto"), tmp_path) as again:
        assert "damaged-" in error_of(again)
    assert published(every) == [] and not (every / "metrics.jsonl").exists()
    assert len(leftovers(every)) == 2


FULL = how_to_fill()


@pytest.mark.parametrize("how", [FULL])
def test_training_goes_on_while_the_disk_is_full_and_the_last_save_must_not_fail(
    corpus: Corpus, undisturbed: Path, tmp_path: Path, how: str
) -> None:
    size = size_of(published(undisturbed)[0])
    with small_disk(how, tmp_path / "disk", 5 * size // 2) as disk:
        tree = small_tree(corpus, disk.folder / "run", STEPS, 2)
        tree["checkpoint"]["max_failures"] = STEPS
        with Job(tree, tmp_path) as run:
            if not disk.is_file_system:
                run.wait_until(lambda: published(disk.folder / "run"), "the first checkpoint")
                disk.fill(run, size // 4)
            line = error_of(run)
            run.wait_until_gone()
        saved = published(disk.folder / "run")
        assert f"the checkpoint after step {STEPS} could not be saved" in line and str(saved[-1]) in line
        assert "No space left on device" in run.text or "File too large" in run.text
        assert f"step {STEPS}/{STEPS} " in run.text and sum("training goes on" in word for word in warnings_of(run)) >= 2
        assert leftovers(disk.folder / "run") == []
        for checkpoint in saved:
            assert_whole(checkpoint)
            assert shard_sums(checkpoint) == shard_sums(undisturbed / "checkpoints" / checkpoint.name)


@pytest.mark.parametrize("how", [FULL])
def test_saves_succeed_again_when_there_is_room_again(corpus: Corpus, undisturbed: Path, tmp_path: Path, how: str) -> None:
    size = size_of(published(undisturbed)[0])
    with small_disk(how, tmp_path / "disk", (STEPS + 2) * size) as disk:
        tree = small_tree(corpus, disk.folder / "run", STEPS, 1)
        tree["checkpoint"]["max_failures"] = STEPS
        with Job(tree, tmp_path) as run:
            run.wait_until(lambda: published(disk.folder / "run"), "the first checkpoint")
            disk.fill(run, size // 4)
            run.wait_until(lambda: "training goes on" in run.text, "a failed save")
            disk.make_room(run)
            finished(run)
        assert 2 <= len(published(disk.folder / "run")) < STEPS
        assert leftovers(disk.folder / "run") == []
        assert final(disk.folder / "run") == final(undisturbed)
        for checkpoint in published(disk.folder / "run"):
            assert_whole(checkpoint)


def size_of(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


@pytest.mark.slow  # a ratio of times: it wants a machine that does nothing else
def test_a_save_stalls_training_for_a_fraction_of_its_time(corpus: Corpus, tmp_path: Path) -> None:
    saved = 3
    tree = small_tree(corpus, tmp_path / "run", 5000, 0)
    tree["model"] = {"preset": "tiny", "num_layers": 2, "hidden_size": 768, "ffn_hidden_size": 3072}
    tree["training"] |= {"micro_batch_size": 1, "global_batch_size": 1}
    tree["checkpoint"]["branch_points"] = [saved]
    with Job(tree, tmp_path) as run:  # it is killed once the figures are there
        times = run.wait_until(lambda: [line for line in run.metrics() if "checkpoint/seconds" in line], "the save")[0]
        steps = run.last_step() - saved
    assert times["step"] == saved
    print(f"{times['checkpoint/seconds']:.2f} s, stalled {times['checkpoint/stalled_seconds']:.2f} s, {steps} steps meanwhile")
    assert times["checkpoint/stalled_seconds"] < times["checkpoint/seconds"] / 2
    assert steps >= 2
