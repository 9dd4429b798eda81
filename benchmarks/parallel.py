"""Two ranks of one thread beside one rank of two threads: what is lost to communication, bubbles and work done twice.

python -m benchmarks.parallel --output-dir build/bench/parallel

Both make the same optimizer step on the same micro-batches and take turns; efficiency is the one rank's time over the two ranks'.
`wide` is the 210M with two layers and 8,192 ids. The losses must agree, or the figure is refused: a layout that computes something
else is not faster.
"""

import argparse
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.alternating import Contender, Ratio
from benchmarks.contenders import SHAPES
from benchmarks.machine import machine
from megatron_ext.errors import CommandLine, UserError, run_command

WARM_UP = 2
TOLERANCE = 1e-4
"""Relative difference of the losses, which drift apart by rounding from step to step."""


@dataclass(frozen=True)
class Layout:
    """Two ranks, and what is wanted of them."""

    options: tuple[str, ...]
    goal: float


LAYOUTS = {
    "DP2": Layout((), 0.9),
    "TP2": Layout(("--tensor", "2"), 0.8),
    "PP2": Layout(("--pipeline", "2"), 0.8),
    "CP2": Layout(("--context", "2"), 0.8),
}


def main() -> int:
    """Measure, write JSON and a table."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("build/bench/parallel"))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "wide"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--micro-batches", type=int, default=8, help="in a step, of all ranks together (default: 8)")
    parser.add_argument("--pairs", type=int, default=5, help="steps of each after the warm-up (default: 5)")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for shape, name in itertools.product(arguments.shapes, arguments.layouts):
        results.append(measure(shape, name, arguments.micro_batches, arguments.pairs))
        (arguments.output_dir / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.output_dir / "summary.md").write_text(describe(results))
    print(describe(results))
    return 0


def measure(shape: str, name: str, micro_batches: int, pairs: int) -> dict[str, Any]:
    """One layout beside one rank.

    Raises:
        UserError: the losses differ.
    """
    common = ("--shape", shape, "--objective", "mlm", "--micro-batches", str(micro_batches))
    one = Contender("benchmarks.rank", *common, threads=2)
    two = Contender("benchmarks.rank", *common, *LAYOUTS[name].options, threads=1, ranks=2)
    about = {"one": one.ready(), "two": two.ready()}
    steps: dict[str, list[dict[str, Any]]] = {"one": [], "two": []}
    for _ in tqdm(range(WARM_UP + pairs), desc=f"{shape} {name}"):
        steps["one"].append(one.step())
        steps["two"].append(two.step())
    one.end()
    two.end()
    losses = [(first["loss"], second["loss"]) for first, second in zip(steps["one"], steps["two"], strict=True)]
    for first, second in losses:
        if abs(first - second) > TOLERANCE * first:
            raise UserError(f"{shape} {name}: the loss is {second} on two ranks, {first} on one: the layouts do not do the same")
    seconds = {kind: [step["seconds"] for step in found[WARM_UP:]] for kind, found in steps.items()}
    return {
        "shape": shape,
        "layout": name,
        "goal": LAYOUTS[name].goal,
        "micro_batches": micro_batches,
        "machine": machine(),
        "about": about,
        "losses": losses,
        "seconds": seconds,
        "efficiency": asdict(Ratio.of(seconds["two"], seconds["one"])),
    }


def describe(results: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"{results[0]['machine']}; float32, MLM, {results[0]['micro_batches']} micro-batches a step.",
        "",
        "| shape | layout, 2 ranks of 1 thread | of 1 rank of 2 threads | goal |",
        "|---|---|---|---|",
    ]
    for result in results:
        found = result["efficiency"]
        efficiency = f"{found['median']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})"
        lines.append(f"| {result['shape']} | {result['layout']} | {efficiency} | {result['goal']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run_command(main))
