"""`make soak`: one training run, killed again and again and given damaged checkpoints, must end bitwise like an undisturbed one.

Both runs train the same model on real processes under torchrun, with a checkpoint every few steps written in the background, and
MLflow on. The disturbed one is killed at random moments - one rank, the whole job, or the whole job just while a checkpoint is
being written - and between attempts its newest checkpoint is sometimes truncated, flipped in one bit or robbed of a shard. The
layout changes on the way between those that give the same bits. Figures go to `build/soak/summary.json`.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from tqdm import tqdm

from megatron_ext.checkpoint_files import complete_checkpoints, find_damage
from megatron_ext.data.corpus import preprocess
from megatron_ext.data.readers import ReaderSettings
from megatron_ext.data.tokenizer_training import train_tokenizer
from megatron_ext.train.line_file import read_metrics
from tests.conftest import write_text

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_START = 120
SECONDS_WITHOUT_STEP = 120


@dataclass
class Figures:
    """What happened."""

    kills_of_one_rank: int = 0
    kills_of_the_job: int = 0
    kills_while_saving: int = 0
    resumes: int = 0
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
        return self.kills_of_one_rank + self.kills_of_the_job + self.kills_while_saving


def config_tree(folder: Path, output_dir: Path, steps: int) -> dict[str, Any]:
    """CLM, then MLM, on two data-parallel ranks, saved every 7 steps."""
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
        "training": {"micro_batch_size": 2, "global_batch_size": 8, "log_interval": 1, "log_batches": True},
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


class Job:
    """One attempt: torchrun and its ranks."""

    def __init__(self, config: Path, output_dir: Path, ranks: int, log: Path):
        self._output_dir = output_dir
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(ROOT / "pretrain_encoder.py")]
        with open(log, "a") as file:
            self.process = subprocess.Popen(
                [*command, "--config", str(config)], env=environment, stdout=file, stderr=file, start_new_session=True
            )
        self._family: set[psutil.Process] = set()

    def look(self) -> list[psutil.Process]:
        """The ranks; remembers every process of the job, so that none can hide."""
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self._family.update(family)
        return [process for process in family if _is_rank(process)]

    def is_running(self) -> bool:
        """torchrun has not ended."""
        return self.process.poll() is None

    def kill_all(self) -> None:
        """SIGKILL to torchrun and all ranks, as when a machine is lost."""
        for process in [*self.look(), psutil.Process(self.process.pid)]:
            _kill(process)
        self.process.wait()

    def left_behind(self, seconds: float = 20) -> int:
        """Processes of the job that are still there after so long; they are killed then."""
        _, alive = psutil.wait_procs(list(self._family), timeout=seconds)
        for process in alive:
            _kill(process)
        return len(alive)


def _is_rank(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
        return str(ROOT / "pretrain_encoder.py") in command and process.ppid() != 1 and "LOCAL_RANK" in process.environ()
    except psutil.Error:
        return False


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.Error:
        return


def newest_step(output_dir: Path) -> int:
    """Step of the last line of metrics.jsonl; -1 if there is none."""
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        return json.loads(lines[-1])["step"] if lines else -1
    except json.JSONDecodeError:  # cut by a kill
        return -1


def lines_of(output_dir: Path) -> int:
    """Lines in metrics.jsonl."""
    path = output_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_for_steps(job: Job, output_dir: Path, more: int) -> bool:
    """Wait until so many more lines of metrics are there; False if the job has ended before."""
    start, deadline = lines_of(output_dir), time.monotonic() + SECONDS_TO_START + SECONDS_WITHOUT_STEP
    while lines_of(output_dir) < start + more:
        job.look()
        if not job.is_running():
            return False
        if time.monotonic() > deadline:
            raise RuntimeError("the run does not get on")
        time.sleep(0.02)
    return True


def wait_for_save(job: Job, output_dir: Path) -> bool:
    """Wait until a checkpoint is being written; False if the job has ended before."""
    while job.is_running():
        job.look()
        if any((output_dir / "checkpoints").glob(".writing-*")):
            return True
        time.sleep(0.002)
    return False


def disturb(job: Job, output_dir: Path, chance: random.Random, figures: Figures) -> None:
    """Let a job get on a little, then kill it, or a rank of it."""
    if not wait_for_steps(job, output_dir, chance.randint(3, 14)):
        return
    kind = chance.choice(["rank", "job", "save", "save"])
    if kind == "save":
        if not wait_for_save(job, output_dir):
            return
        figures.kills_while_saving += 1
    time.sleep(chance.uniform(0, 0.3))
    if not job.is_running():
        return
    ranks = job.look()
    if kind == "rank" and ranks:
        figures.kills_of_one_rank += 1
        _kill(chance.choice(ranks))
        job.process.wait()
        return
    figures.kills_of_the_job += kind != "save"
    job.kill_all()


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


def sums_of(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of weights and moments, taken here."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(checkpoint.glob("*.distcp"))}


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
    """Every point of metrics.jsonl, as one story of the run, must be in MLflow."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{output_dir / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("megatron_ext").experiment_id])
    known: dict[str, set[tuple[int, float]]] = {}
    for record in read_metrics(output_dir):
        for name, value in record.items():
            if name in ("step", "phase", "time"):
                continue
            if name not in known:
                known[name] = {(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)}
            figures.metrics_in_jsonl += 1
            figures.metrics_lost += (record["step"], value) not in known[name]


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
    configs = {}
    for name in ("whole", "killed"):
        configs[name] = folder / f"{name}.yaml"
        configs[name].write_text(yaml.safe_dump(config_tree(folder, folder / name, arguments.steps)))
    whole = Job(configs["whole"], folder / "whole", arguments.ranks, folder / "whole.log")
    if whole.process.wait():
        raise RuntimeError(f"the undisturbed run failed: see {folder / 'whole.log'}")
    last = f"checkpoints/step_{arguments.steps:08d}"
    killed = folder / "killed"
    with tqdm(total=arguments.kills, unit="kill", dynamic_ncols=True) as bar:
        while not (killed / last / "run.json").is_file():
            job = Job(configs["killed"], killed, arguments.ranks, folder / "killed.log")
            figures.resumes += 1
            if figures.kills < arguments.kills:
                disturb(job, killed, chance, figures)
            else:
                job.process.wait()
            figures.processes_left_behind += job.left_behind()
            check_published(killed, figures)
            if chance.random() < 0.3 and figures.kills < arguments.kills:
                damage_newest(killed, chance, figures)
            bar.update(figures.kills - bar.n)
    figures.resumes -= 1
    figures.damaged_checkpoints_refused = len(list((killed / "checkpoints").glob("damaged-*")))
    figures.bitwise_equal = sums_of(folder / "whole" / last) == sums_of(killed / last)
    batches, differently = batches_of(killed)
    figures.samples_seen_differently = differently + (batches != batches_of(folder / "whole")[0])
    figures.steps_of_the_plan = arguments.steps
    figures.steps_run = sum(len(path.read_text().splitlines()) for path in (killed / "batches").glob("*.jsonl")) // 8
    count_lost_metrics(killed, figures)
    figures.seconds = round(time.monotonic() - started, 1)
    summary = {"kills": figures.kills, **asdict(figures), "ranks": arguments.ranks, "seed": arguments.seed}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary, indent=1))
    sound = figures.bitwise_equal and not (
        figures.metrics_lost
        or figures.samples_seen_differently
        or figures.published_checkpoints_found_damaged
        or figures.processes_left_behind
        or figures.damaged_checkpoints_offered != figures.damaged_checkpoints_refused
    )
    return 0 if sound and figures.kills >= arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
