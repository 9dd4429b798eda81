"""An optimizer step on one GPU: this project in bfloat16 and FP8 beside transformers and plain megatron-core, and predictions.

python -m benchmarks.gpu --output-dir build/bench_gpu

Contenders are built one after the other, round by round, so that what else the machine does falls on all alike; each makes its
steps without waiting for the device, and the time is that of all of them. The best round is given; the JSON has all of them.
MFU is counted FLOPs over the data sheet's bfloat16 rate, for FP8 too. Peak memory is what torch's allocator had in use at most.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import sys
import time
import traceback
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Shape, encoder_of, step_flops
from benchmarks.gpu_contenders import BUILDERS, build_ours
from benchmarks.machine import machine
from benchmarks.own_run import own_groups
from megatron_ext.errors import CommandLine, UserError, run_command
from megatron_ext.plan.hardware import GPUS
from megatron_ext.plan.targets import SEQUENCE, VOCABULARY, OwnRun

WARM_UP, STEPS = 4, 10


@dataclass(frozen=True)
class Case:
    """One contender at one shape."""

    preset: str
    batch_size: int
    objective: str
    contender: str
    """`megatron_ext`, or a peer."""
    recipe: str = "bf16"

    @property
    def shape(self) -> Shape:
        """For the batch and the FLOPs."""
        return Shape(self.preset, None, VOCABULARY, self.batch_size, SEQUENCE)


PEERS = (("megatron_ext", "bf16"), ("transformers", "bf16"), ("megatron_core", "bf16"))
RECIPES = ("bf16", "fp8-delayed", "fp8-tensorwise", "fp8-blockwise")
CASES = {
    "peers": [Case("210m", 8, objective, *peer) for objective in ("mlm", "clm") for peer in PEERS],
    "recipes": [Case("210m", 32, "mlm", "megatron_ext", recipe) for recipe in RECIPES],
    "sizes": [
        Case(preset, batch, "mlm", "megatron_ext", recipe)
        for (preset, batch), recipe in itertools.product((("610m", 16), ("1b", 8), ("2b", 4)), ("bf16", "fp8-tensorwise"))
    ],
}
"""What is measured, by what it shows."""


def main() -> int:
    """Measure, write JSON and a table after every figure."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("build/bench_gpu"))
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("this benchmark is for a GPU, and there is no CUDA device")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[Case, list[dict[str, Any]]] = {}
    rate = product_rate()
    for group in arguments.only:
        for _, case in itertools.product(range(arguments.rounds), CASES[group]):
            results.setdefault(case, []).append(measure(case))
            print(f"{case}: {results[case][-1]}", flush=True)
            write(results, rate, arguments.output_dir)
    print((arguments.output_dir / "summary.md").read_text())
    return 0


def product_rate(size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a bfloat16 product of size^3, of random numbers."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        left @ right
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - started)


def measure(case: Case) -> dict[str, Any]:
    """Build the contender, run it, let it go. What goes wrong is the result: the other figures are worth having without it."""
    try:
        with ExitStack() as stack:
            return _measure(case, stack)
    except Exception as error:  # a peer that runs out of memory, a recipe that the installed versions cannot run
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _measure(case: Case, stack: ExitStack) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    layout, backend = stack.enter_context(own_groups(encoder_of(case.shape), case.batch_size))
    if case.contender == "megatron_ext":
        step = build_ours(case.shape, case.objective, case.recipe, layout, backend)
    else:
        step = BUILDERS[case.contender](case.shape, case.objective)
    first = float(step())
    for _ in range(WARM_UP - 1):
        step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(STEPS):
        loss = step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / STEPS
    peak = torch.cuda.max_memory_allocated()
    return {"seconds": seconds, "first_loss": first, "last_loss": float(loss), "peak_bytes": peak, "backend": backend.name}


def predicted(case: Case) -> tuple[float, float]:
    """Seconds and bytes that `tools/plan.py` says of this case on an H100."""
    from megatron_ext.config import ParallelConfig, PrecisionConfig, TrainingConfig
    from megatron_ext.plan.kernels import CALIBRATED
    from megatron_ext.plan.memory import rank_memory
    from megatron_ext.runtime.topology import check_layout

    recipe: Any = case.recipe
    run, encoder = OwnRun(case.preset, case.batch_size, case.objective, recipe), encoder_of(case.shape)
    training = TrainingConfig(micro_batch_size=case.batch_size, global_batch_size=case.batch_size)
    layout, precision = check_layout(ParallelConfig(), training, encoder.num_layers, {}, 1), PrecisionConfig(recipe=recipe)
    memory = rank_memory(encoder, VOCABULARY, layout, training, precision, SEQUENCE, 0, run.work.predicted_share)
    return run.predict(CALIBRATED).seconds, float(memory.total)


def write(results: dict[Case, list[dict[str, Any]]], rate: float, folder: Path) -> None:
    """`summary.json` and `summary.md`."""
    rows = [{**dataclasses.asdict(case), "rounds": rounds} for case, rounds in results.items()]
    about = f"{torch.cuda.get_device_name()}; {machine()}"
    (folder / "summary.json").write_text(json.dumps({"about": about, "product_rate": rate, "cases": rows}, indent=1) + "\n")
    lines = [
        f"{about}. A bfloat16 product of 8192^3 runs at {rate / 1e12:,.0f} TFLOP/s.",
        "",
        "| model | micro-batch | objective | contender | recipe | tokens/s | MFU | predicted | memory, GiB | predicted |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(_cells(case, rounds))} |" for case, rounds in results.items()),
    ]
    (folder / "summary.md").write_text("\n".join(lines) + "\n")


def _cells(case: Case, rounds: list[dict[str, Any]]) -> list[str]:
    about = [case.preset, f"{case.batch_size} x {SEQUENCE}", case.objective, case.contender, case.recipe]
    found = [each for each in rounds if "error" not in each]
    if not found:
        return [*about, rounds[0]["error"].replace("|", "/").replace("\n", " ")[:80], "", "", "", ""]
    best = min(found, key=lambda each: each["seconds"])
    tokens = case.shape.tokens / best["seconds"]
    mfu = step_flops(case.shape, case.objective) / best["seconds"] / GPUS["h100"].bf16_peak
    figures = [f"{tokens:,.0f}", f"{100 * mfu:.1f} %", "", f"{best['peak_bytes'] / 2**30:.1f}", ""]
    if case.contender == "megatron_ext":
        seconds, memory = predicted(case)
        figures[2], figures[4] = (
            f"{case.shape.tokens / seconds:,.0f} ({100 * (best['seconds'] / seconds - 1):+.0f} %)",
            f"{memory / 2**30:.1f}",
        )
    return [*about, *figures]


if __name__ == "__main__":
    sys.exit(run_command(main))
