"""`make soak`: one training run, killed again and again and given damaged checkpoints, must end bitwise like an undisturbed one.

Both runs train the same model on real processes under torchrun, with a checkpoint every few steps written in the background, and
MLflow on. The disturbed one is killed at random moments - one rank, the whole job, or the whole job just while a checkpoint is
being written - and between attempts its newest checkpoint is sometimes truncated, flipped in one bit or robbed of a shard. Figures
go to `summary.json` in the output folder.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ext.checkpoint_files import checkpoint_name, complete_checkpoints, find_damage
from megatron_ext.data.corpus import preprocess
from megatron_ext.data.readers import ReaderSettings
from megatron_ext.data.tokenizer_training import train_tokenizer
from megatron_ext.train.line_file import METRICS_FILE, read_metrics
from tests.conftest import write_text
from tests.distributed.faults import Job, shard_sums

GLOBAL_BATCH_SIZE = 8


@dataclass
class Figures:
    """What happened."""

    kills_of_one_rank: int = 0
    kills_of_the_job: int = 0
    kills_while_saving: int = 0
    """Those of the job that found a checkpoint being written."""
    attempts: int = 0
    """Starts of the job, the first one and those that were killed before their first step included."""
    resumes: int = 0
    """Starts that went on from a checkpoint and came to a step."""
    damaged_checkpoints_offered: int = 0
    damaged_checkpoints_refused: int = 0
    published_checkpoints_found_damaged: int = 0
    steps_run: int = 0
    steps_of_the_plan: int = 0
    samples_seen_differently: int = 0
    metrics_in_jsonl: int = 0
    metrics_lost: int = 0
    processes_left_behind: int = 0
    bitwise_equal: bool = False
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        """All of them."""
        return self.kills_of_one_rank + self.kills_of_the_job

    def are_sound(self) -> bool:
        """Nothing was lost, and nothing differs."""
        bad = self.published_checkpoints_found_damaged + self.samples_seen_differently + self.metrics_lost
        refused = self.damaged_checkpoints_offered == self.damaged_checkpoints_refused
        return self.bitwise_equal and refused and not bad + self.processes_left_behind


def config_tree(folder: Path, output_dir: Path, steps: int) -> dict[str, Any]:
    """CLM, then MLM, data-parallel, saved every 7 steps."""
    return {
        "output_dir": str(output_dir),
        "data": {
            "tokenizer": str(folder / "tokenizer.model"),
            "train": [{"prefix": str(folder / "data")}],
            "split": [0.9, 0.1, 0.0],
            "sequence_length": 64,
        },
        "model": {"preset": "nano"},
        "phases": [{"objective": "clm", "steps": steps // 2}, {"objective": "mlm", "steps": steps - steps // 2}],
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 10, "decay_steps": 20},
        "training": {"micro_batch_size": 2, "global_batch_size": GLOBAL_BATCH_SIZE, "log_interval": 1, "log_batches": True},
        "validation": {"interval": 50, "samples": 8},
        "checkpoint": {"interval": 7, "keep_last": 3},
        "resume": "auto",
    }


def make_data(folder: Path) -> None:
    """A small corpus, its tokenizer and data set."""
    text = folder / "text.jsonl"
    write_text(text, documents=2000, seed=1)
    train_tokenizer(
        [text], folder / "tokenizer", vocab_size=540, model_type="unigram", reader=ReaderSettings(), sample_sentences=2000, seed=1
    )
    preprocess([text], folder / "data", folder / "tokenizer.model", workers=1, progress=False)


def lines_of(output_dir: Path) -> int:
    """Lines in metrics.jsonl."""
    path = output_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def lives_until(job: Job, condition: Callable[[], bool], what: str) -> bool:
    """Wait for something; False if the job has ended before."""
    job.wait_until(lambda: condition() or not job.is_running(), what)
    return job.is_running()


def disturb(job: Job, chance: random.Random, figures: Figures) -> None:
    """Let a job get on a little, then kill it, or a rank of it."""
    goal = lines_of(job.output_dir) + chance.randint(5, 25)
    if not lives_until(job, lambda: lines_of(job.output_dir) >= goal, "some steps more"):
        return
    kind = chance.choice(["rank", "job", "save", "save"])
    saves = (job.output_dir / "checkpoints").glob
    if kind == "save" and not lives_until(job, lambda: any(saves(".writing-*")), "a save was under way"):
        return
    time.sleep(chance.uniform(0, 0.3))
    workers = job.workers()
    if not workers:
        return
    if kind == "rank":
        figures.kills_of_one_rank += 1
        chance.choice(workers).kill()
        job.wait()
        return
    figures.kills_while_saving += kind == "save" and any(saves(".writing-*"))
    figures.kills_of_the_job += 1
    job.kill_workers()


def check_published(output_dir: Path, figures: Figures) -> None:
    """A checkpoint that has its name is whole, whatever was killed."""
    for checkpoint in complete_checkpoints(output_dir / "checkpoints"):
        figures.published_checkpoints_found_damaged += bool(find_damage(checkpoint))


def damage_newest(output_dir: Path, chance: random.Random, figures: Figures) -> None:
    """Spoil the newest checkpoint, if there is one before it."""
    checkpoints = complete_checkpoints(output_dir / "checkpoints")
    if len(checkpoints) < 2:
        return
    shard = chance.choice(sorted(checkpoints[-1].glob("*.distcp")))
    content = bytearray(shard.read_bytes())
    kind = chance.choice(["truncated", "flipped", "missing"])
    if kind == "missing":
        shard.unlink()
    elif kind == "truncated":
        shard.write_bytes(content[: chance.randrange(len(content))])
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        shard.write_bytes(content)
    figures.damaged_checkpoints_offered += 1


def batches_of(output_dir: Path) -> tuple[dict[int, set[tuple[Any, ...]]], int]:
    """sample -> all that was logged of it; and how many samples were logged differently at different times."""
    found: dict[int, set[tuple[Any, ...]]] = {}
    for path in (output_dir / "batches").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # cut by a kill
                continue
            found.setdefault(entry.pop("sample"), set()).add(tuple(entry.values()))
    return found, sum(len(lines) > 1 for lines in found.values())


def count_lost_metrics(output_dir: Path, figures: Figures) -> None:
    """Every step must be in metrics.jsonl, and every point of it, as one story of the run, in MLflow."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{output_dir / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("megatron_ext").experiment_id])
    known: dict[str, set[tuple[int, float]]] = {}
    records = read_metrics(output_dir)
    figures.metrics_lost += len(
        set(range(1, figures.steps_of_the_plan + 1)) - {record["step"] for record in records if "loss" in record}
    )
    for record in records:
        for name, value in record.items():
            if name in ("step", "phase", "time"):
                continue
            if name not in known:
                known[name] = {(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)}
            figures.metrics_in_jsonl += 1
            figures.metrics_lost += (record["step"], value) not in known[name]


def run_whole(tree: dict[str, Any], folder: Path, launcher: list[str]) -> None:
    """The undisturbed run."""
    with Job(tree, folder, *launcher) as job:
        if job.process.wait():
            raise RuntimeError(f"the undisturbed run failed:\n{job.text[-3000:]}")


def run_killed(
    tree: dict[str, Any], folder: Path, launcher: list[str], kills: int, chance: random.Random, figures: Figures
) -> None:
    """The other one, started again until it has reached its end."""
    last = Path(tree["output_dir"]) / "checkpoints" / checkpoint_name(sum(phase["steps"] for phase in tree["phases"]))
    with tqdm(total=kills, unit="kill", dynamic_ncols=True) as bar:
        while not last.is_dir():
            with Job(tree, folder, *launcher) as job:
                figures.attempts += 1
                if figures.kills < kills:
                    disturb(job, chance, figures)
                elif job.process.wait():
                    raise RuntimeError(f"the run failed by itself:\n{job.text[-3000:]}")
                figures.processes_left_behind += len(job.left_behind())
            check_published(job.output_dir, figures)
            if chance.random() < 0.3 and figures.kills < kills and not last.is_dir():
                damage_newest(job.output_dir, chance, figures)
            bar.update(figures.kills - bar.n)


def compare(whole: Path, killed: Path, steps: int, figures: Figures) -> None:
    """Weights, data and metrics of the two runs."""
    last = f"checkpoints/{checkpoint_name(steps)}"
    lines = [json.loads(line) for line in (killed / METRICS_FILE).read_text().splitlines()]
    figures.resumes = sum(line.get("resumed_from", 0) > 0 for line in lines)
    figures.damaged_checkpoints_refused = len(list((killed / "checkpoints").glob("damaged-*")))
    figures.bitwise_equal = shard_sums(whole / last) == shard_sums(killed / last)
    batches, differently = batches_of(killed)
    figures.samples_seen_differently = differently + (batches != batches_of(whole)[0])
    figures.steps_of_the_plan = steps
    samples = sum(len(path.read_text().splitlines()) for path in (killed / "batches").glob("*.jsonl"))
    figures.steps_run = samples // GLOBAL_BATCH_SIZE
    count_lost_metrics(killed, figures)


def main() -> int:
    """Run both runs, compare them, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("build/soak"))
    parser.add_argument("--kills", type=int, default=30, help="kills at least")
    parser.add_argument("--steps", type=int, default=420)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, chance, figures = arguments.output_dir.resolve(), random.Random(arguments.seed), Figures()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    make_data(folder)
    whole, killed = (config_tree(folder, folder / name, arguments.steps) for name in ("whole", "killed"))
    launcher = ["--nproc-per-node", str(arguments.ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    run_whole(whole, folder, launcher)
    run_killed(killed, folder, launcher, arguments.kills, chance, figures)
    compare(folder / "whole", folder / "killed", arguments.steps, figures)
    figures.seconds = round(time.monotonic() - started, 1)
    summary = {"kills": figures.kills, **asdict(figures), "ranks": arguments.ranks, "seed": arguments.seed}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary, indent=1))
    return 0 if figures.are_sound() and figures.kills >= arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
