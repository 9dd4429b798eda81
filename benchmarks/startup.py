"""What is waited for: `--help` of every command, the first step of a run, and training standing still for a checkpoint.

python -m benchmarks.startup --output-dir build/bench/startup

Uses the data that `benchmarks.data` makes, in a folder beside the output.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.alternating import environment
from benchmarks.data import CORPUS, prepare_text
from benchmarks.machine import machine
from megatron_ext.errors import CommandLine, run_command
from megatron_ext.train.line_file import read_metrics

ROOT = Path(__file__).parents[1]
COMMANDS = [ROOT / "pretrain_encoder.py", *sorted((ROOT / "tools").glob("*.py"))]
STEPS, SAVE_EVERY = 40, 10
RUNS = {"one process": 1, "two processes": 2}


def main() -> int:
    """Measure, write JSON and a table."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("build/bench/startup"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    prepare_text(arguments.output_dir)
    found: dict[str, dict[str, list[Any]]] = {"help": {}, "run": {}}
    for _ in tqdm(range(arguments.rounds), desc="rounds"):
        for command in COMMANDS:
            found["help"].setdefault(command.name, []).append(_help_seconds(command))
        for name, processes in RUNS.items():
            found["run"].setdefault(name, []).append(_train(arguments.output_dir, processes))
    result = {"machine": machine(), **found}
    (arguments.output_dir / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output_dir / "summary.md").write_text(describe(result))
    print(describe(result))
    return 0


def _help_seconds(command: Path) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, str(command), "--help"], check=True, stdout=subprocess.DEVNULL, env=environment())
    return time.perf_counter() - start


def _train(folder: Path, processes: int) -> dict[str, Any]:
    """A short run of the tiny shape with checkpoints: seconds to its first step, of a step, of a save, and of standing still."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    settings = {
        "output_dir": str(out),
        "data": {
            "tokenizer": str(folder / "tokenizer.model"),
            "train": [{"prefix": str(folder / "tokens")}],
            "sequence_length": 128,
        },
        "model": {"preset": "tiny"},
        "phases": [{"objective": "mlm", "steps": STEPS}],
        "training": {"micro_batch_size": 8, "global_batch_size": 16, "log_interval": 1},
        "checkpoint": {"interval": SAVE_EVERY},
        "tracking": {"mlflow": False},
    }
    (folder / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / "pretrain_encoder.py"), "--config", str(folder / "run.yaml")]
    started = time.time()
    with open(folder / "run.log", "wb") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(2 // processes)})
    ended = time.time()
    records = list(read_metrics(out))
    steps = [record for record in records if "loss" in record]
    # The last save is waited for: no step follows it.
    saves = [record for record in records if "checkpoint/stalled_seconds" in record and record["step"] < STEPS]
    return {
        "first_step": steps[0]["time"] - started,
        "whole": ended - started,
        "step": statistics.median(record["seconds_per_step"] for record in steps[1:]),
        "save": statistics.median(save["checkpoint/seconds"] for save in saves),
        "stalled": statistics.median(save["checkpoint/stalled_seconds"] for save in saves),
    }


def describe(result: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    lines = [f"{result['machine']}.", "", "| command | `--help` |", "|---|---|"]
    lines += [f"| {name} | {_spread(seconds)} |" for name, seconds in result["help"].items()]
    lines += [
        "",
        f"L4 h256 on {CORPUS}, saved every {SAVE_EVERY} steps, no MLflow:",
        "",
        "| | to the first step | a step | a save | of which training stands still |",
        "|---|---|---|---|---|",
    ]
    for name, runs in result["run"].items():
        columns = (_spread([run[key] for run in runs]) for key in ("first_step", "step", "save", "stalled"))
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    sys.exit(run_command(main))
