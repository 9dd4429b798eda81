"""How speed and memory grow with the model and with the sequence: one picture.

python -m benchmarks.growth --output-dir build/bench/growth

Each point is a process of its own that trains a few steps of MLM; V is 8,192, so that 1B with AdamW's state fits into 24 GiB.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.alternating import Contender, take_turns
from benchmarks.contenders import Shape, contending_step, own_micro_batch
from benchmarks.machine import machine
from benchmarks.memory import peak, reset_peak
from benchmarks.own_run import own_groups
from megatron_ext.errors import CommandLine, run_command
from megatron_ext.model.flops import count_parameters, training_flops
from megatron_ext.model.presets import PRESETS

VOCAB_SIZE = 8_192
SIZES = ("tiny", "210m", "610m", "1b")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
LENGTH_OF_SIZES, SIZE_OF_LENGTHS = 512, "tiny"
MASK_RATIO = 0.4


def main() -> int:
    """Measure, write JSON, a table and the picture; or be one point."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("build/bench/growth"))
    parser.add_argument("--steps", type=int, default=3, help="of each point after a warm-up (default: 3)")
    parser.add_argument("--point", nargs=2, metavar=("PRESET", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        return _be(arguments.point[0], int(arguments.point[1]))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    points = [(name, LENGTH_OF_SIZES) for name in SIZES] + [(SIZE_OF_LENGTHS, length) for length in LENGTHS]
    results = [measure(name, length, arguments.steps) for name, length in tqdm(list(dict.fromkeys(points)), desc="points")]
    figures = {"machine": machine(), "points": results}
    (arguments.output_dir / "summary.json").write_text(json.dumps(figures, indent=1) + "\n")
    (arguments.output_dir / "summary.md").write_text(describe(figures))
    draw(results, arguments.output_dir / "growth.png")
    print(describe(figures))
    return 0


def measure(preset: str, length: int, steps: int) -> dict[str, Any]:
    """One point, in a process of its own."""
    contender = Contender("benchmarks.growth", "--point", preset, str(length))
    contender.ready()
    contender.step()
    found = [contender.step() for _ in range(steps)]
    contender.end()
    encoder = PRESETS[preset]()
    flops = training_flops(encoder, VOCAB_SIZE, tokens=length, attended=length**2, predicted=MASK_RATIO * length)
    seconds = statistics.median(step["seconds"] for step in found)
    return {
        "preset": preset,
        "parameters": count_parameters(encoder, VOCAB_SIZE).total,
        "length": length,
        "tokens_per_second": length / seconds,
        "share_of_gemm": statistics.median(flops / step["seconds"] / step["gemm"] for step in found),
        "peak_bytes": max(step["peak_bytes"] for step in found),
        "steps": found,
    }


def _be(preset: str, length: int) -> int:
    import torch

    import megatron_ext.train.trainer  # noqa: F401 - before memory is counted
    from megatron_ext.runtime.allocator import keep_freed_memory
    from megatron_ext.train.metrics import peak_flops

    keep_freed_memory()
    encoder = dataclasses.replace(PRESETS[preset](), max_position_embeddings=max(2048, length))
    batch = own_micro_batch(Shape(preset, None, VOCAB_SIZE, 1, length), "mlm")
    peak_flops(torch.device("cpu"))
    before = reset_peak()
    with ExitStack() as stack:
        layout, backend = stack.enter_context(own_groups(encoder, 1))
        step = contending_step(encoder, VOCAB_SIZE, layout, backend)

        def timed() -> dict[str, float]:
            rate = peak_flops(torch.device("cpu"))
            start = time.perf_counter()
            step([batch])
            return {"seconds": time.perf_counter() - start, "gemm": rate, "peak_bytes": peak() - before}

        take_turns({"threads": torch.get_num_threads()}, timed)
    return 0


def describe(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"{figures['machine']}; 2 threads, float32, MLM, V {VOCAB_SIZE:,}, one sample a step.",
        "",
        "| model | parameters | tokens in the sample | tokens/s | share of GEMM rate | peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for point in figures["points"]:
        cells = (
            *(point["preset"], f"{point['parameters'] / 1e6:,.1f}M", f"{point['length']:,}"),
            *(f"{point['tokens_per_second']:,.0f}", f"{point['share_of_gemm']:.2f}", f"{point['peak_bytes'] / 2**20:,.0f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Speed and memory over the model's size, and over the sequence's length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted((p for p in points if p["length"] == LENGTH_OF_SIZES), key=lambda p: p["parameters"])
    lengths = sorted((p for p in points if p["preset"] == SIZE_OF_LENGTHS), key=lambda p: p["length"])
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), constrained_layout=True)
    panels = (
        (axes[:, 0], sizes, "parameters", f"parameters (rows of {LENGTH_OF_SIZES} tokens)"),
        (axes[:, 1], lengths, "length", f"tokens in a row ({SIZE_OF_LENGTHS}: L4 h256)"),
    )
    for (speed, memory), found, key, label in panels:
        across = [point[key] for point in found]
        speed.loglog(across, [point["tokens_per_second"] for point in found], "o-", color="#1f5fa8")
        memory.loglog(across, [point["peak_bytes"] / 2**30 for point in found], "s-", color="#b0501e")
        speed.set_ylabel("tokens/s")
        memory.set_ylabel("peak memory, GiB")
        memory.set_xlabel(label)
        for point in found:
            note = f"{point['share_of_gemm']:.0%}"
            at = (point[key], point["tokens_per_second"])
            speed.annotate(note, at, xytext=(7, 4), textcoords="offset points", fontsize=8)
        for axis in (speed, memory):
            axis.grid(visible=True, which="both", alpha=0.25)
            axis.margins(0.12, 0.2)
    figure.suptitle("A training step on 2 cores: speed (with its share of the GEMM rate) and memory", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_command(main))
