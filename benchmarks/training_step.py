"""An optimizer step of this project beside transformers and plain megatron-core: the same sizes, the same batch, taking turns.

python -m benchmarks.training_step --output-dir build/bench/training_step --shapes tiny --objectives mlm clm

Each contender has a process of its own. After the warm-up they make a step each, in turns; ratios are those of neighbours. Peak
memory is the largest resident size since the libraries were imported. FLOPs are counted as in `megatron_ext.model.flops`: the share
of the measured rate of a float32 product of 2048^3 is that of useful work, for all contenders alike.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.alternating import Contender, Ratio
from benchmarks.contenders import CONTENDERS, SHAPES, step_flops
from megatron_ext.errors import CommandLine, run_command

OURS = "megatron_ext"
PEERS = [name for name in CONTENDERS if name != OURS]
WARM_UP = 1


def main() -> int:
    """Measure, write JSON and a table."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("build/bench/training_step"))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "210m"])
    parser.add_argument("--objectives", nargs="+", choices=("mlm", "clm"), default=["mlm", "clm"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--pairs", type=int, default=5, help="steps of each after the warm-up (default: 5)")
    parser.add_argument("--as-they-come", action="store_true", help="peers without this project's setting for freed memory")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for shape, objective, peer in itertools.product(arguments.shapes, arguments.objectives, arguments.peers):
        results.append(measure(shape, objective, peer, arguments.pairs, arguments.as_they_come))
        (arguments.output_dir / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.output_dir / "summary.md").write_text(describe(results))
    print(describe(results))
    return 0


def measure(shape: str, objective: str, peer: str, pairs: int, as_it_comes: bool) -> dict[str, Any]:
    """This project and a peer on one shape and objective; two processes, for three would not fit into small machines.

    Args:
        shape: of the model and batch.
        objective: `mlm` or `clm`.
        peer: a contender.
        pairs: steps of each.
        as_it_comes: the peer handles freed memory as the C library does; else both keep it, as this project's runs do.
    """
    arguments = ("--shape", shape, "--objective", objective)
    names = (OURS, peer)
    options = {OURS: (), peer: ("--as-it-comes",) if as_it_comes else ()}
    contenders = {name: Contender("benchmarks.contenders", name, *arguments, *options[name]) for name in names}
    about = {name: contender.ready() for name, contender in contenders.items()}
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in tqdm(range(WARM_UP + pairs), desc=f"{shape} {objective} {peer}"):
        for name, contender in contenders.items():
            found = contender.step()
            if number >= WARM_UP:
                steps[name].append(found)
    for contender in contenders.values():
        contender.end()
    flops = step_flops(SHAPES[shape], objective)
    seconds = {name: [step["seconds"] for step in found] for name, found in steps.items()}
    useful = {name: statistics.median(flops / step["seconds"] / step["gemm"] for step in found) for name, found in steps.items()}
    return {
        "shape": {"name": shape, **asdict(SHAPES[shape])},
        "objective": objective,
        "peer": f"{peer}, as it comes" if as_it_comes else peer,
        "about": about[OURS],
        "python": platform.python_version(),
        "steps": steps,
        "tokens_per_second": {name: SHAPES[shape].tokens / statistics.median(found) for name, found in seconds.items()},
        "share_of_gemm": useful,
        "peak_bytes": {name: max(step["peak_bytes"] for step in found) for name, found in steps.items()},
        "names": names,
        "speed_ratio": asdict(Ratio.of(seconds[OURS], seconds[peer])),
    }


def describe(results: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table; of this project and the peer in each pair of figures."""
    about = results[0]["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['cores']} cores, {about['threads']} threads, float32; Python {results[0]['python']}, {versions}.",
        "",
        "| shape | objective | peer | our speed, times | tokens/s | share of GEMM rate | peak memory, MiB | our memory, times |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        peer, ratio = result["peer"], result["speed_ratio"]
        pairs = {
            key: [result[key][name] for name in result["names"]] for key in ("tokens_per_second", "share_of_gemm", "peak_bytes")
        }
        cells = (
            *(result["shape"]["name"], result["objective"], peer),
            f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})",
            "{:,.0f}, {:,.0f}".format(*pairs["tokens_per_second"]),
            "{:.2f}, {:.2f}".format(*pairs["share_of_gemm"]),
            "{:,.0f}, {:,.0f}".format(*(size / 2**20 for size in pairs["peak_bytes"])),
            f"{pairs['peak_bytes'][0] / pairs['peak_bytes'][1]:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run_command(main))
