"""Every benchmark of speed, one after the other: what `make bench` runs. 36 minutes on two cores, with nothing else running.

python -m benchmarks --output-dir build/bench
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import CommandLine, UserError, run_command


@dataclass(frozen=True)
class Benchmark:
    """A module and what it is asked for."""

    title: str
    module: str
    arguments: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """As typed, the folder aside."""
        return " ".join(["python -m", f"benchmarks.{self.module}", *self.arguments])


LARGE = ("--shapes", "210m", "--pairs", "2", "--peers", "transformers", "megatron_core")
BENCHMARKS = {
    "step-tiny": Benchmark("A training step beside its peers: tiny", "training_step", ("--shapes", "tiny")),
    "step-210m": Benchmark("A training step beside its peers: 210M", "training_step", LARGE),
    "step-tiny-as-they-come": Benchmark(
        "Peers as they come: tiny", "training_step", ("--shapes", "tiny", "--pairs", "3", "--as-they-come")
    ),
    "step-210m-as-they-come": Benchmark("Peers as they come: 210M", "training_step", (*LARGE, "--as-they-come")),
    "parallel-tiny": Benchmark("Two ranks beside one: tiny", "parallel", ("--shapes", "tiny")),
    "parallel-wide": Benchmark(
        "Two ranks beside one: wide",
        "parallel",
        ("--shapes", "wide", "--layouts", "DP2", "TP2", "PP2", "--micro-batches", "4", "--pairs", "3"),
    ),
    "sequences": Benchmark("Long rows and packed documents", "sequences", ("--pairs", "2")),
    "data": Benchmark("Data", "data", ("--pairs", "2")),
    "startup": Benchmark("Start-up and checkpoints", "startup", ("--rounds", "2")),
    "growth": Benchmark("Growth", "growth"),
}


def main() -> int:
    """Run them, and join their tables."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("build/bench"))
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    arguments = parser.parse_args()
    tables = []
    for name in arguments.only:
        benchmark, folder = BENCHMARKS[name], arguments.output_dir / name
        print(f"\n{benchmark.title} ({benchmark.command})", flush=True)
        started = time.monotonic()
        command = [sys.executable, "-m", f"benchmarks.{benchmark.module}", *benchmark.arguments, "--output-dir", str(folder)]
        done = subprocess.run(command)
        if done.returncode:
            raise UserError(f"{benchmark.command} ended with code {done.returncode}")
        print(f"{time.monotonic() - started:.0f} s", flush=True)
        tables.append(f"## {benchmark.title}\n\n    {benchmark.command}\n\n{(folder / 'summary.md').read_text()}")
        (arguments.output_dir / "summary.md").write_text("\n".join(tables))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
