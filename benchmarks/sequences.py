"""Rows of 512 to 8,192 tokens: documents that see themselves alone, rows that see all of themselves, and padding.

python -m benchmarks.sequences --output-dir build/bench/sequences

The same 8,192 tokens of short documents are a step at every length. Packed documents cost their own squares, whatever the row's
length; a row that sees all of itself costs the row's; transformers pads each document to the longest of its sixteen.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.alternating import Contender, Ratio
from benchmarks.contenders import SHAPES
from benchmarks.documents import TOKENS, encoder, make_rows
from benchmarks.machine import machine
from megatron_ext.errors import CommandLine, run_command
from megatron_ext.model.flops import training_flops

WARM_UP = 1
KINDS = ("packed", "across", "padded")


def main() -> int:
    """Measure, write JSON and a table."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("build/bench/sequences"))
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--pairs", type=int, default=5, help="steps of each after the warm-up (default: 5)")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for length in arguments.lengths:
        results.append(measure(length, arguments.pairs))
        (arguments.output_dir / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.output_dir / "summary.md").write_text(describe(results))
    print(describe(results))
    return 0


def measure(length: int, rounds: int) -> dict[str, Any]:
    """The three in turns at one length."""
    contenders = {kind: Contender("benchmarks.documents", kind, "--sequence-length", str(length)) for kind in KINDS}
    for contender in contenders.values():
        contender.ready()
    steps: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number in tqdm(range(WARM_UP + rounds), desc=f"rows of {length}"):
        for kind, contender in contenders.items():
            found = contender.step()
            if number >= WARM_UP:
                steps[kind].append(found)
    for contender in contenders.values():
        contender.end()
    seconds = {kind: [step["seconds"] for step in found] for kind, found in steps.items()}
    return {
        "length": length,
        "machine": machine(),
        "steps": steps,
        "gflops": {kind: step_flops(length, kind) / 1e9 for kind in ("packed", "across")},
        "tokens_per_second": {kind: TOKENS / statistics.median(found) for kind, found in seconds.items()},
        "peak_bytes": {kind: max(step["peak_bytes"] for step in found) for kind, found in steps.items()},
        "speed_against_padding": asdict(Ratio.of(seconds["packed"], seconds["padded"])),
        "speed_against_across": asdict(Ratio.of(seconds["packed"], seconds["across"])),
    }


def step_flops(length: int, kind: str) -> float:
    """Counted FLOPs of a step: over packed documents the squares are theirs, else the rows'."""
    vocab_size = SHAPES["tiny"].vocab_size
    rows = make_rows(length, vocab_size)
    lengths = [int(piece) for row in rows for piece in row.lengths] if kind == "packed" else [length] * len(rows)
    predicted = sum(int((row.labels >= 0).sum()) for row in rows)
    squares = sum(piece**2 for piece in lengths)
    return training_flops(encoder(length), vocab_size, tokens=TOKENS, attended=squares, predicted=predicted)


def describe(results: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"{results[0]['machine']}; 2 threads, float32, MLM; L4 h256, V 8,192; {TOKENS:,} tokens a step.",
        "",
        "| tokens in a row | packed, tokens/s | row sees all of itself | transformers, padded | packed against padded, times | "
        "packed against whole rows, times (by counted FLOPs) | peak memory, MiB: packed, whole rows, padded |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        speed, memory = result["tokens_per_second"], result["peak_bytes"]
        padded, across = result["speed_against_padding"], result["speed_against_across"]
        counted = result["gflops"]["across"] / result["gflops"]["packed"]
        cells = (
            f"{result['length']:,}",
            *(f"{speed[kind]:,.0f}" for kind in KINDS),
            f"{padded['median']:.2f} ({padded['lowest']:.2f} to {padded['highest']:.2f})",
            f"{across['median']:.2f} ({counted:.2f})",
            ", ".join(f"{memory[kind] / 2**20:,.0f}" for kind in KINDS),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run_command(main))
