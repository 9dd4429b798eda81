"""A study's tree is really trained: against each model trained alone, bit by bit, and through failures, stops and repetitions."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from megatron_ext.runtime.launch import run_on_ranks
from tests.conftest import Corpus
from tests.distributed.test_training import Run, run_training

ROOT = Path(__file__).parents[2]
MLM, CLM = {"objective": "mlm"}, {"objective": "clm"}
HALF = {"objective": "clm", "share": 0.5}
RUN = {
    "training": {"micro_batch_size": 2, "log_interval": 1},
    "optimizer": {"learning_rate": 1e-3},
    "validation": {"interval": 0},
    "tracking": {"mlflow": False},
    "checkpoint": {"interval": 0},
}
NAMES = {"nano-mlm0.4-4", "nano-mlm0.4-6", "nano-clm50%+mlm0.4-6", "nano-mlm0.4-4+mlm0.4-3"}


def write_study(corpus: Corpus, folder: Path, families: list[dict[str, Any]], **changes: Any) -> Path:
    """Decays of two steps after one of warm-up; four samples of 32 tokens a step."""
    data = {"tokenizer": str(corpus.tokenizer), "train": [{"prefix": str(corpus.prefix)}], "split": [0.9, 0.1, 0.0]}
    sizes = {"global_batch_size": 4, "sequence_length": 32, "vocab_size": 540, "warmup_steps": 1, "decay_steps": 2}
    tree = {"name": "small", **sizes, "families": families, "run": {"data": data, **RUN}, **changes}
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


FAMILIES = [
    {"name": "base", "sizes": ["nano"], "budgets": [4, 6], "plans": [{"stretches": [MLM]}]},
    {"name": "pfs", "sizes": ["nano"], "budgets": [6], "plans": [{"stretches": [HALF, MLM]}]},
    {
        "name": "cpt",
        "sizes": ["nano"],
        "budgets": [3],
        "plans": [{"stretches": [MLM]}],
        "continues": [{"stretches": [MLM]}],
        "continues_budget": 4,
    },
]


def study_command(command: str, study: Path, output_dir: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools/run_study.py"), command, str(study), "--output-dir", str(output_dir), *arguments]


def call(*arguments: Any, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        study_command(*arguments), capture_output=True, text=True, timeout=300, env={**os.environ, **environment}, cwd=ROOT
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def last_checkpoint(output_dir: Path, segment: str) -> tuple[Run, int]:
    step = int(segment.rsplit("-", 1)[1])
    return Run(output_dir / "segments" / segment, []), step


def alone(study: Path, output_dir: Path, phases: list[dict[str, Any]]) -> dict[str, Any]:
    """The configuration of a whole model, as somebody would write it who knows of no tree."""
    tree = yaml.safe_load(study.read_text())
    run = {name: dict(section) for name, section in tree["run"].items()}
    run["data"]["sequence_length"] = tree["sequence_length"]
    run["training"]["global_batch_size"] = tree["global_batch_size"]
    run["optimizer"] |= {"schedule": "wsd", "warmup_steps": tree["warmup_steps"], "decay_steps": tree["decay_steps"]}
    run["validation"]["mask_ratio"] = 0.4
    return {**run, "model": {"preset": "nano"}, "output_dir": str(output_dir), "phases": phases}


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The study file, and its folder after `run`."""
    folder = tmp_path_factory.mktemp("study")
    study = write_study(corpus, folder, FAMILIES)
    call("run", study, folder / "out", "--jobs", "2")
    return study, folder / "out"


MODELS = {
    "nano.mlm0.4-2.mlm0.4-decay-4": [{**MLM, "steps": 4}],
    "nano.mlm0.4-2.mlm0.4-4.mlm0.4-decay-6": [{**MLM, "steps": 6}],
    "nano.clm-2.mlm0.4-4.mlm0.4-decay-6": [{**CLM, "steps": 2}, {**MLM, "steps": 4}],
    "nano.mlm0.4-2.mlm0.4-decay-4.mlm0.4-from-a-warm-up-5.mlm0.4-decay-7": [
        {**MLM, "steps": 4},
        {**MLM, "steps": 3, "learning_rate": "rewarm"},
    ],
}
"""Last segments, and the plan of the model that ends there."""


def test_branches_have_the_weights_of_models_trained_alone(trained: tuple[Path, Path], tmp_path: Path) -> None:
    study, output_dir = trained
    trees = [alone(study, tmp_path / str(number), phases) for number, phases in enumerate(MODELS.values())]
    run_on_ranks(run_training, 1, trees)
    for number, segment in enumerate(MODELS):
        branch, step = last_checkpoint(output_dir, segment)
        assert branch.shard_sums(step) == Run(tmp_path / str(number), []).shard_sums(step), segment


def test_models_are_exported_to_see_both_ways(trained: tuple[Path, Path]) -> None:
    folders = {folder.name: folder for folder in (trained[1] / "models").iterdir()}
    assert folders.keys() == NAMES
    assert {AutoConfig.from_pretrained(folder).model_type for folder in folders.values()} == {"eurobert"}


def test_what_is_trained_is_not_trained_again(trained: tuple[Path, Path]) -> None:
    study, output_dir = trained
    before = {path: path.stat().st_mtime_ns for path in output_dir.rglob("*") if path.name != ".lock" and path.is_file()}
    call("run", study, output_dir)
    assert before == {path: path.stat().st_mtime_ns for path in output_dir.rglob("*") if path.name != ".lock" and path.is_file()}
    assert "9 of 9 segments, 17 of 17 steps (100%)" in call("status", study, output_dir)


def test_another_study_in_the_same_folder_is_refused(trained: tuple[Path, Path], corpus: Corpus, tmp_path: Path) -> None:
    """A segment that was begun with other weights in view is not gone on with."""
    study = write_study(
        corpus, tmp_path, FAMILIES, run={**yaml.safe_load(trained[0].read_text())["run"], "optimizer": {"beta1": 0.8}}
    )
    output = call("run", study, trained[1], code=2)
    assert "was begun with optimizer.beta1 0.9 and the study says 0.8: choose another --output-dir" in output


def test_a_failure_stops_its_subtree_alone(corpus: Corpus, tmp_path: Path) -> None:
    study, output_dir = write_study(corpus, tmp_path, FAMILIES[:1]), tmp_path / "out"
    in_the_way = output_dir / "segments/nano.mlm0.4-2.mlm0.4-4/checkpoints"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("")
    output = call("run", study, output_dir, "--jobs", "2", code=1)
    assert "not finished: nano.mlm0.4-2.mlm0.4-4: ended with code" in output
    assert "nano.mlm0.4-2.mlm0.4-4.mlm0.4-decay-6: its parent nano.mlm0.4-2.mlm0.4-4 was not trained" in output
    assert [folder.name for folder in (output_dir / "models").iterdir()] == ["nano-mlm0.4-4"]
    assert "2 of 4 segments, 6 of 8 steps" in call("status", study, output_dir)
    in_the_way.unlink()
    call("run", study, output_dir)
    assert (output_dir / "models/nano-mlm0.4-6").is_dir()


def test_a_study_that_is_stopped_goes_on(corpus: Corpus, tmp_path: Path) -> None:
    """A branch that was half trained when the study was stopped ends with the weights of its model trained alone."""
    family = {
        "name": "long",
        "sizes": ["nano"],
        "budgets": [100],
        "plans": [{"stretches": [{"objective": "clm", "share": 0.1}, MLM]}],
    }
    study, output_dir = write_study(corpus, tmp_path, [family]), tmp_path / "out"
    segment = "nano.clm-10.mlm0.4-98"
    metrics = output_dir / f"segments/{segment}/metrics.jsonl"
    process = subprocess.Popen(study_command("run", study, output_dir), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "stopped by SIGTERM: the same command goes on from here" in errors
    saved = [path.name for path in (metrics.parent / "checkpoints").glob("step_*")]
    assert len(saved) == 1 and 10 < int(saved[0].removeprefix("step_")) < 98
    assert "[~]" in call("status", study, output_dir)
    call("run", study, output_dir)
    run_on_ranks(run_training, 1, [alone(study, tmp_path / "alone", [{**CLM, "steps": 10}, {**MLM, "steps": 90}])])
    branch, step = last_checkpoint(output_dir, f"{segment}.mlm0.4-decay-100")
    assert branch.shard_sums(step) == Run(tmp_path / "alone", []).shard_sums(step)


def test_an_export_that_fails_stops_nothing_else(trained: tuple[Path, Path], corpus: Corpus) -> None:
    """A step that is evaluated after all: its checkpoint was not kept."""
    study, output_dir = trained
    later = write_study(corpus, study.parent, FAMILIES, evaluation_steps=[1, 2])
    output = call("run", later, output_dir, code=1)
    assert (
        output.count("put into evaluation_steps after the segment had passed it") == 4
    )  # of two roots; warned, and told at the end
    assert (output_dir / "models/nano.mlm0.4-2.at-2").is_dir()
    origin = output_dir / "origins/nano-mlm0.4-4"
    origin.write_text("elsewhere step_00000004")
    told = call("export", later, output_dir, code=1)
    assert "models/nano-mlm0.4-4 was made of elsewhere step_00000004" in told and told.count("not finished:") == 3
    write_study(corpus, study.parent, FAMILIES)


def test_slurm_gets_a_job_for_each_segment(corpus: Corpus, tmp_path: Path) -> None:
    """A stand-in for sbatch notes what it is asked for; no Slurm ran these jobs."""
    study, output_dir = write_study(corpus, tmp_path, FAMILIES), tmp_path / "out"
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    (tools / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {calls}\nwc -l < {calls}\n')
    (tools / "squeue").write_text("#!/bin/sh\nseq 1 10\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    call("run", study, output_dir, "--slurm", "--sbatch-option=--nodes=2", PATH=path)
    *segments, export = calls.read_text().splitlines()
    assert len(segments) == 9 and all("--nodes=2" in line for line in (*segments, export))
    jobs = {line.split("--job-name=")[1].split()[0]: number for number, line in enumerate(segments, 1)}
    for name, number in jobs.items():
        parents = [other for other in jobs if name.startswith(f"{other}.")]
        line = segments[number - 1]
        config = yaml.safe_load((output_dir / "segments" / name / "config.yaml").read_text())
        if parents:
            parent = max(parents, key=len)
            assert f"--dependency=afterok:{jobs[parent]} " in line
            assert config["resume"].startswith(f"{output_dir}/segments/{parent}/checkpoints/step_")
        assert f"--resume {config['resume']}" in line
    assert "--dependency=afterany:1:2:3:4:5:6:7:8:9" in export and "run_study.py export" in export
    call("run", study, output_dir, "--slurm", "--sbatch-option=--nodes=2", PATH=path)
    assert len(calls.read_text().splitlines()) == 11  # nothing that waits is submitted again, but for the export
    (tools / "squeue").write_text("#!/bin/sh\nseq 1 8\n")
    call("run", study, output_dir, "--slurm", PATH=path)
    assert len(calls.read_text().splitlines()) == 13


def test_options_of_the_other_way_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    study = write_study(corpus, tmp_path, FAMILIES)
    assert "--sbatch-option needs --slurm" in call("run", study, tmp_path / "out", "--sbatch-option=--nodes=2", code=2)
    assert "--jobs and --ranks are of this machine" in call("run", study, tmp_path / "out", "--slurm", "--jobs", "2", code=2)
    message = "--jobs 2 x --ranks 1 are more processes than there are GPUs (1)"
    assert message in call("run", study, tmp_path / "out", "--jobs", "2", code=2, CUDA_VISIBLE_DEVICES="0")
