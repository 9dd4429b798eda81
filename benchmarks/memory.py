"""Peak memory of training on a CPU: predicted by `megatron_ext.plan.memory` beside what the operating system measured.

python -m benchmarks.memory --output-dir build/memory

Each row is a process of its own that trains a few steps with the trainer's builders, schedule and optimizer on made-up batches.
Measured is the largest resident memory after a process has imported everything, joined its group and multiplied two small matrices,
less what it had then. Exit code 1 when a row is off by more than --tolerance.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.alternating import environment
from benchmarks.own_run import own_groups, own_step
from megatron_ext.errors import CommandLine, run_command

STEPS = 8  # the heap has its holes by then
PROCESSES = 3
TOLERANCE = 0.10


@dataclass(frozen=True)
class Row:
    """One shape to train."""

    name: str
    preset: str
    sequence_length: int
    micro_batch_size: int
    vocab_size: int
    recipe: str = "fp32"
    predicted_share: float = 0.4
    micro_batches: int = 2
    documents: int = 4
    """Pieces of documents in a sample, of unequal lengths."""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the preset that are set otherwise."""
    is_held: bool = True
    """Held to the tolerance."""


H512 = {"hidden_size": 512, "ffn_hidden_size": 1408, "num_attention_heads": 8, "num_query_groups": 8, "head_dim": 64}
REDUCED = {"num_layers": 4}
# In bfloat16 oneDNN keeps kernels that it has compiled for every length of a document, up to 1,024: nobody can foretell how many.
# Rows in bfloat16 have one length; one shows what several do.
ROWS = (
    Row("smallest: tiny, s 256, b 8, V 8k", "tiny", 256, 8, 8_192, micro_batches=1),
    Row("tiny, s 512, b 16, V 8k", "tiny", 512, 16, 8_192),
    Row("tiny, s 512, b 4, V 8k, CLM", "tiny", 512, 4, 8_192, predicted_share=1.0),
    Row("tiny, s 512, b 16, V 8k, bf16", "tiny", 512, 16, 8_192, "bf16", documents=1),
    Row("tiny, s 512, b 16, V 8k, bf16, 64 lengths of documents", "tiny", 512, 16, 8_192, "bf16", is_held=False),
    Row("L4 h512, s 512, b 4, V 32k", "tiny", 512, 4, 32_000, changes=H512),
    Row("L4 h512, s 512, b 4, V 32k, bf16", "tiny", 512, 4, 32_000, "bf16", documents=1, changes=H512),
    Row("L4 h512 of 8 heads and 2 groups, s 1024, b 4, V 16k", "tiny", 1024, 4, 16_384, changes={**H512, "num_query_groups": 2}),
    Row("210m with 4 layers, s 512, b 4, V 32k", "210m", 512, 4, 32_000, changes=REDUCED),
    Row("210m with 4 layers, s 512, b 4, V 32k, bf16", "210m", 512, 4, 32_000, "bf16", documents=1, changes=REDUCED),
    Row("210m with 4 layers, s 512, b 1, V 128k", "210m", 512, 1, 128_256, changes=REDUCED),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("build/memory"), help="where memory.json goes")
    parser.add_argument("--rows", help="only rows with this text in their name")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"largest error of a row (default: {TOLERANCE})")
    parser.add_argument("--worker", type=int, metavar="NUMBER", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Measure all rows and compare."""
    arguments = build_parser().parse_args()
    if arguments.worker is not None:
        print(json.dumps(measure(ROWS[arguments.worker])))
        return 0
    chosen = [number for number, row in enumerate(ROWS) if (arguments.rows or "") in row.name]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    results = []
    print("| run | weights | gradients | optimizer | activations | head | workspace | predicted | measured | error |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for number in chosen:
        result = _median(number)
        results.append(result)
        parts = " | ".join(f"{value / 2**20:,.0f}" for value in result["parts"].values())
        predicted, measured, lowest, highest = (
            value / 2**20 for value in (result["predicted"], result["measured"], min(result["runs"]), max(result["runs"]))
        )
        found = f"{measured:,.0f} ({lowest:,.0f} to {highest:,.0f})"
        print(f"| {result['name']} | {parts} | {predicted:,.0f} | {found} | {result['error']:+.1%} |", flush=True)
    (arguments.output_dir / "memory.json").write_text(json.dumps(results, indent=1))
    return 1 if any(result["is_held"] and abs(result["error"]) > arguments.tolerance for result in results) else 0


def _median(number: int) -> dict[str, Any]:
    """The one in the middle of three: where the heap's holes lie depends on when its threads ran."""
    found = sorted((_in_own_process(number) for _ in range(PROCESSES)), key=lambda result: result["measured"])
    return {**found[PROCESSES // 2], "runs": [result["measured"] for result in found]}


def _in_own_process(number: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--worker", str(number)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment(), check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(row: Row) -> dict[str, Any]:
    """Train one row in this process, and compare."""
    warnings.simplefilter("ignore")
    import torch
    from megatron.core.package_info import __version__ as megatron_version

    import megatron_ext.train.build
    import megatron_ext.train.optimizer
    import megatron_ext.train.step  # noqa: F401 - what a step needs, imported before memory is counted
    from megatron_ext.config import OptimizerConfig, PrecisionConfig, TrainingConfig
    from megatron_ext.model.presets import PRESETS
    from megatron_ext.plan.memory import rank_memory
    from megatron_ext.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    dtype = torch.float32 if row.recipe == "fp32" else torch.bfloat16
    encoder = dataclasses.replace(PRESETS[row.preset](), **row.changes)
    training = TrainingConfig(micro_batch_size=row.micro_batch_size, global_batch_size=row.micro_batch_size * row.micro_batches)
    with own_groups(encoder, row.micro_batch_size, row.micro_batches) as (layout, backend):
        torch.ones(256, 256, dtype=dtype, requires_grad=True).mm(torch.ones(256, 256, dtype=dtype)).sum().backward()
        before = reset_peak()
        step = own_step(encoder, row.vocab_size, dtype, layout, backend, OptimizerConfig())
        batches = [make_batch(row, number) for number in range(row.micro_batches)]
        for _ in range(STEPS):
            step(batches)
        measured = peak() - before
    precision = PrecisionConfig(recipe=row.recipe)
    predicted = rank_memory(
        encoder, row.vocab_size, layout, training, precision, row.sequence_length, 0, row.predicted_share, on_cpu=True
    )
    return {
        **dataclasses.asdict(row),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "megatron-core": megatron_version},
        "cores": os.cpu_count(),
        "parts": dataclasses.asdict(predicted),
        "predicted": predicted.total,
        "measured": measured,
        "error": predicted.total / measured - 1,
    }


def make_batch(row: Row, seed: int) -> Any:
    """A micro-batch of random tokens in packed documents."""
    import numpy as np

    from megatron_ext.data.batch import collate
    from megatron_ext.objective import OBJECTIVES, Example

    generator = np.random.default_rng(seed)
    length, count = row.sequence_length, round(row.sequence_length * row.predicted_share)
    examples, segments = [], []
    for _ in range(row.micro_batch_size):
        positions = np.sort(generator.choice(length, count, replace=False))
        tokens, targets = generator.integers(0, row.vocab_size, length), generator.integers(0, row.vocab_size, count)
        examples.append(Example(tokens, positions, targets))
        cuts = np.sort(generator.choice(np.arange(1, length), row.documents - 1, replace=False))
        segments.append(np.diff([0, *cuts, length]))
    objective = OBJECTIVES["clm" if row.predicted_share == 1 else "mlm"]
    return collate(examples, segments, objective, documents_attend_across=False, restart_positions=True)


def reset_peak() -> int:
    """Let the kernel count this process's peak anew; returns the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Largest resident bytes since `reset_peak`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    run_command(main)
