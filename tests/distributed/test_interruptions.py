"""Signals, steps that are not finite, changed configurations: what a run does, with real processes."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config_reading import from_dict
from megatron_ext.runtime.launch import run_on_ranks
from megatron_ext.train.stopping import EXIT_STOPPED
from tests.conftest import Corpus
from tests.distributed.faults import Job
from tests.distributed.test_training import TOTAL, Run, config_tree, one_rank, refused, run_training  # noqa: F401

BAD_SAMPLE = 37
"""In step 2 (from 0 on) of 16 samples each, in the micro-batch of samples 36 and 37."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves(number: int, corpus: Corpus, one_rank: dict[str, Run], tmp_path: Path) -> None:  # noqa: F811
    tree = config_tree(corpus, tmp_path / "run", {}, checkpoint={"interval": 0})
    with Job(tree, tmp_path) as job:
        job.wait_until(lambda: "step 2/" in job.text, "step 2")
        job.process.send_signal(number)
        assert job.wait() == EXIT_STOPPED, job.text
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert signal.Signals(number).name in job.text
    assert 2 <= int(saved.name[5:]) < TOTAL
    run_on_ranks(run_training, 1, [{**tree, "resume": "auto"}])
    assert Run(tmp_path / "run", []).shard_sums(TOTAL) == one_rank["whole"].shard_sums(TOTAL)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(corpus: Corpus, tmp_path: Path) -> None:
    tree = config_tree(corpus, tmp_path / "run", {"tensor": 2})
    tree["phases"] = [{"objective": "clm", "steps": 100_000}]
    with Job(tree, tmp_path, "--standalone", "--nproc-per-node", "2") as job:
        job.wait_until(lambda: "step 2/" in job.text, "step 2")
        job.worker(1).send_signal(signal.SIGTERM)
        job.wait()
    assert "which was saved: --resume auto continues it" in job.text
    newest = sorted((tmp_path / "run/checkpoints").glob("step_*"))[-1]
    assert json.loads((newest / "run.json").read_text())["parallel"]["tensor"] == 2


def test_a_second_run_in_the_same_folder_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    tree = config_tree(corpus, tmp_path / "run", {}, resume="auto")
    tree["phases"] = [{"objective": "clm", "steps": 100_000}]
    with Job(tree, tmp_path) as first:
        first.wait_until(lambda: "step 2/" in first.text, "step 2")
        first.process.send_signal(signal.SIGSTOP)  # it leaves the cores to the second
        with Job(tree, tmp_path, "--standalone", "--nproc-per-node", "2") as second:
            assert second.wait() != 0
        first.process.send_signal(signal.SIGCONT)
        assert f"is in use by process {first.process.pid} on" in second.text
        assert "exitcode  : 2" in second.text, second.text
        first.process.send_signal(signal.SIGTERM)
        assert first.wait() == EXIT_STOPPED, first.text
    assert [step for step, name in Run(tmp_path / "run", []).losses() if name == "loss"] == list(range(1, first.last_step() + 1))


def poisoned_training(tree: dict[str, Any], bad_samples: list[int]) -> None:
    """Train with a loss that is not a number for micro-batches that hold certain samples, as broken hardware might give."""
    from megatron_ext.data.loader import TrainingLoader
    from megatron_ext.model.encoder import EncoderModel
    from megatron_ext.train.trainer import train

    forward, load = EncoderModel.forward, TrainingLoader.load
    poisoned: set[int] = set()

    def watched_load(self: Any, step: int) -> Any:
        data = load(self, step)
        for batch, samples in zip(data.micro_batches, data.samples, strict=True):
            if set(samples) & set(bad_samples):
                poisoned.add(hash(batch.input_ids.numpy().tobytes()))
        return data

    def watched_forward(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, batch, *args, **kwargs)
        is_bad = torch.is_grad_enabled() and hash(batch.input_ids.numpy().tobytes()) in poisoned
        return output * float("nan") if is_bad else output

    EncoderModel.forward, TrainingLoader.load = watched_forward, watched_load
    train(from_dict(tree))


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}], ids=["DP2", "PP2"])
def test_a_step_that_is_not_finite_is_skipped_by_all_ranks(parallel: dict[str, int], corpus: Corpus, tmp_path: Path) -> None:
    tree = config_tree(corpus, tmp_path / "run", parallel)
    run_on_ranks(poisoned_training, 2, tree, [BAD_SAMPLE])
    (skipped,) = [json.loads(line) for line in (tmp_path / "run/skipped_steps.jsonl").read_text().splitlines()]
    assert skipped["step"] == BAD_SAMPLE // 16
    assert skipped["samples"] == [32, 48]
    (offender,) = skipped["offending_micro_batches"]
    assert offender["samples"] == [36, 38]
    assert (offender["objective"], offender["loss"]) == ("clm", "nan")
    record = json.loads((tmp_path / f"run/checkpoints/step_{TOTAL:08d}/run.json").read_text())
    assert record["skipped_steps"] == 1
    assert record["samples"] == TOTAL * 16
    run = Run(tmp_path / "run", [])
    assert all(torch.isfinite(tensor).all() for tensor in run.weights(TOTAL).values())
    assert [step for step, name in run.losses() if name == "loss"] == [1, 2, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("parallel", [{"distributed_optimizer": True}, {"pipeline": 2}], ids=["DP2 distributed", "PP2"])
def test_a_skipped_step_is_the_same_whenever_the_host_hears_of_it(parallel: dict[str, int], corpus: Corpus, tmp_path: Path) -> None:
    """It looks after every step, or not before the phase ends: what the steps after a bad one have come to is the same."""
    trees = [
        config_tree(
            corpus, tmp_path / str(interval), parallel, training={"log_interval": interval}, validation={"interval": 0},
            checkpoint={"interval": 0}, optimizer={"learning_rate": 1e-2, "clip_grad_norm": 0.1},
        )
        for interval in (1, TOTAL)
    ]  # fmt: skip
    for tree in trees:
        run_on_ranks(poisoned_training, 2, tree, [16, 48])
    often, seldom = (Run(Path(tree["output_dir"]), []) for tree in trees)
    files = [Path(tree["output_dir"]) / "skipped_steps.jsonl" for tree in trees]
    assert files[0].read_text() == files[1].read_text()
    assert [json.loads(line)["step"] for line in files[0].read_text().splitlines()] == [1, 3]
    assert often.shard_sums(TOTAL) == seldom.shard_sums(TOTAL)
    lines = [(run.folder / "metrics.jsonl").read_text().splitlines() for run in (often, seldom)]
    metrics = [json.loads([line for line in each if "gradient_norm" in line][-1]) for each in lines]
    assert [each["total/skipped_steps"] for each in metrics] == [2, 2]
    assert metrics[0]["gradient_norm"] == metrics[1]["gradient_norm"]


def test_too_many_steps_that_are_not_finite_end_the_run(corpus: Corpus, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    tree = config_tree(corpus, tmp_path / "run", {}, training={"max_skipped_steps": 1})
    with pytest.raises(RuntimeError) as caught:
        run_on_ranks(poisoned_training, 1, tree, [BAD_SAMPLE, BAD_SAMPLE + 16])
    capfd.readouterr()
    assert "training.max_skipped_steps 1" in str(caught.value)
    assert len((tmp_path / "run/skipped_steps.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "change, field",
    [
        ({"training": {"seed": 5}}, "training.seed was 0 and is 5 (changes data order and masks)"),
        ({"model": {"preset": "nano", "rotary_base": 7.0}}, "model.rotary_base"),
        ({"validation": {"interval": 4, "samples": 16, "mask_ratio": 0.3}}, "validation.mask_ratio"),
    ],
)
def test_changes_are_listed_and_refused_unless_named(
    change: dict[str, Any],
    field: str,
    corpus: Corpus,
    one_rank: dict[str, Run],  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    start = str(one_rank["whole"].checkpoint(4))
    tree = config_tree(corpus, tmp_path / "run", {}, resume=start, **change)
    tree["training"]["log_interval"] = 3
    message = refused(capfd, tree)
    assert field in message
    name = field.split()[0]
    assert f"--resume_changes '[{name}]'" in message
    run_on_ranks(run_training, 1, [{**tree, "resume_changes": [name]}])
    assert "training.log_interval was 1 and is 3" in capfd.readouterr().err
    recorded = json.loads((tmp_path / f"run/checkpoints/step_{TOTAL:08d}/run.json").read_text())["changes"]
    assert {name, "training.log_interval"} <= {entry["field"] for entry in recorded}


def test_all_changes_are_listed_and_shapes_cannot_be_overridden(
    corpus: Corpus,
    one_rank: dict[str, Run],  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    start = str(one_rank["whole"].checkpoint(4))
    tree = config_tree(corpus, tmp_path / "run", {}, resume=start, training={"seed": 5}, precision={"recipe": "bf16"})
    tree["model"] = {"preset": "nano", "num_layers": 3}
    tree["resume_changes"] = ["training.seed"]
    assert "model.num_layers" in refused(capfd, tree)
    tree["resume_changes"] = []
    assert all(name in refused(capfd, tree) for name in ("model.num_layers", "training.seed", "precision.recipe"))
    tree["resume_changes"] = ["training.sed"]
    assert "resume_changes names 'training.sed'" in refused(capfd, tree)


def test_a_changed_address_is_listed_without_its_password(
    corpus: Corpus,
    one_rank: dict[str, Run],  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    tracking = {"mlflow": False, "uri": "http://alice:s3cr3t-hunter2@localhost:1"}
    tree = config_tree(corpus, tmp_path / "run", {}, resume=str(one_rank["whole"].checkpoint(4)), tracking=tracking)
    run_on_ranks(run_training, 1, [tree])
    said = capfd.readouterr().err
    assert "resume: tracking.uri was None and is http://***@localhost:1" in said
    assert "hunter2" not in said
    record = (tmp_path / f"run/checkpoints/step_{TOTAL:08d}/run.json").read_text()
    assert "hunter2" not in record and "tracking.uri" in record


def test_a_later_phase_that_is_taken_out_is_listed(
    corpus: Corpus,
    one_rank: dict[str, Run],  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    tree = config_tree(corpus, tmp_path / "run", {}, resume=str(one_rank["whole"].checkpoint(2)))
    tree["phases"] = tree["phases"][:1]
    tree["optimizer"]["decay_steps"] = 0
    tree["resume_changes"] = ["optimizer"]
    run_on_ranks(run_training, 1, [tree])
    assert "resume: phases.1 was PhaseConfig(" in capfd.readouterr().err


def batch_log(folder: Path) -> dict[int, tuple[Any, ...]]:
    """sample -> what the log says of it; a sample that was logged twice must be logged alike."""
    found: dict[int, tuple[Any, ...]] = {}
    for path in (folder / "batches").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            rest = tuple(value for name, value in entry.items() if name != "sample")
            assert found.setdefault(entry["sample"], rest) == rest
    return found


def test_data_masks_and_phases_are_the_same_through_changing_layouts_and_half_the_ranks(
    corpus: Corpus,
    one_rank: dict[str, Run],  # noqa: F811
    tmp_path: Path,
) -> None:
    def stretch(name: str, parallel: dict[str, int], stop: int | None) -> dict[str, Any]:
        return config_tree(corpus, tmp_path / name, parallel, resume="auto", training={"log_batches": True, "stop_at_step": stop})

    run_on_ranks(run_training, 1, [stretch("alone", {}, None)])
    two = [stretch("moved", {}, 2), stretch("moved", {"tensor": 2}, 4), stretch("moved", {"pipeline": 2}, 6)]
    run_on_ranks(run_training, 2, two)
    run_on_ranks(run_training, 1, [stretch("moved", {}, None)])
    alone, moved = batch_log(tmp_path / "alone"), batch_log(tmp_path / "moved")
    assert sorted(alone) == list(range(TOTAL * 16))
    assert moved == alone
    assert len({entry[-1] for entry in alone.values()}) == len(alone)  # the sums tell samples apart
    losses = Run(tmp_path / "moved", []).losses()
    assert {step for step, name in losses if name == "loss"} == set(range(1, TOTAL + 1))
    for key in losses.keys() & one_rank["whole"].losses().keys():  # a stretch also validates where it stops
        assert losses[key] == pytest.approx(one_rank["whole"].losses()[key], abs=1e-4), key


def test_checkpoints_that_are_kept(corpus: Corpus, tmp_path: Path) -> None:
    keeping = {"interval": 1, "keep_last": 1, "keep_every": 3, "branch_points": [5]}
    tree = config_tree(corpus, tmp_path / "run", {}, checkpoint=keeping, training={"stop_at_step": 2})
    branch = config_tree(corpus, tmp_path / "branch", {}, resume=str(tmp_path / "run/checkpoints/step_00000002"))
    again = {**tree, "resume": "auto", "training": {**tree["training"], "stop_at_step": None}}
    run_on_ranks(run_training, 1, [tree, branch, again])
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "run/checkpoints").glob("step_*"))
    # 2: branched from; 3, 6: keep_every; 4, 8: phase edges; 5: a branch point; 7: the newest besides
    assert kept == [2, 3, 4, 5, 6, 7, 8]
    (note,) = (tmp_path / "run/checkpoints/step_00000002/branches").glob("*.json")
    assert json.loads(note.read_text())["output_dir"] == str(tmp_path / "branch")
