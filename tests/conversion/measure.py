"""`make bench-conversion`: time and memory of a conversion beside a plain copy of the same bytes, and parity for each family.

A random model of at least 1B parameters is written, imported and exported, each step in a process of its own and each just after
a plain copy (`cp`, then `sync` of the copy: conversions end on the disk too). Figures are medians over the rounds.
Verification, which loads the whole model, is off here. Then each of the small models of the tests is converted with verification
on. `summary.json` and `summary.md` in the output folder say what was found.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_ext.errors import UserError
from megatron_ext.hf.weight_source import WeightSource
from tests.conversion.large_model import Shape, write_large_model

ROOT = Path(__file__).parents[2]
ALLOWANCE = 500_000_000
"""Bytes beyond three times the largest tensor, for Python and the libraries."""
LIMIT = 2.0
"""Times the duration of a plain copy."""
# Linux counts the memory of the process that starts another one in its peak: a small one must stand in between.
LAUNCHER = """
import json, os, resource, subprocess, sys, time
load, start = os.getloadavg()[0], time.monotonic()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
seconds, used = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
cpu = used.ru_utime + used.ru_stime
print(json.dumps(dict(code=code, seconds=seconds, cpu_seconds=cpu, peak_bytes=used.ru_maxrss * 1024, load=load)))
"""


@dataclass(frozen=True)
class Step:
    """What one process took."""

    code: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Largest resident memory, pages of mapped files among it."""
    load: float
    """Processes that were running or waiting on the machine, averaged over the minute before."""


def run(*command: object) -> Step:
    """Run a command to its end.

    Raises:
        UserError: it failed.
    """
    launch = [sys.executable, "-S", "-c", LAUNCHER, *map(str, command)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    step = Step(**json.loads(subprocess.run(launch, stdout=subprocess.PIPE, env=environment, check=True).stdout))
    if step.code:
        raise UserError(f"the command {' '.join(map(str, command))} ended with code {step.code}")
    return step


def convert(kind: str, source: Path, target: Path) -> Step:
    """Import or export without verification."""
    return run(sys.executable, ROOT / "tools/convert_checkpoint.py", kind, source, target, "--no-verify")


def copy(source: Path, target: Path) -> Step:
    """A plain copy that has reached the disk."""
    try:
        return run("sh", "-c", 'cp -r --reflink=never "$0" "$1" && sync -f "$1"', source, target)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def measure_large(folder: Path, shape: Shape, rounds: int) -> dict[str, Any]:
    """Time and memory of both directions on a large model; the folder is left empty."""
    model, checkpoint, out = folder / "model", folder / "checkpoint", folder / "out"
    model.mkdir()
    largest = write_large_model(model, shape)
    total = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    steps: dict[str, list[Step]] = {"copy before import": [], "import": [], "copy before export": [], "export": []}
    for _ in tqdm(range(rounds), desc="rounds"):
        for kind, source, target in (("import", model, checkpoint), ("export", checkpoint, out)):
            # Memory that was freed just before takes a file several times as fast as other memory: each step begins with some.
            copy(model, folder / "copy")
            steps[f"copy before {kind}"].append(copy(model, folder / "copy"))
            steps[kind].append(convert(kind, source, target))
        same = same_bits(model, out)
        for path in (checkpoint, out):
            shutil.rmtree(path)
    floor = run(sys.executable, "-c", "import torch, torch.distributed.checkpoint, transformers.modeling_utils")
    shutil.rmtree(model)
    return {
        "parameters": sum(torch.Size(size).numel() for tensors in shape.tensors() for size in tensors.values()),
        "bytes": total,
        "largest_tensor_bytes": largest,
        "allowed_peak_bytes": 3 * largest + ALLOWANCE,
        "peak_of_importing_libraries_bytes": floor.peak_bytes,
        "same_bits_after_both": same,
        "ratio": {kind: _median(steps[kind]) / _median(steps[f"copy before {kind}"]) for kind in ("import", "export")},
        "steps": {name: [asdict(step) for step in found] for name, found in steps.items()},
    }


def same_bits(before: Path, after: Path) -> bool:
    """Whether two folders hold the same tensors."""
    first, second = WeightSource(before), WeightSource(after)
    return (first.shapes, first.dtypes) == (second.shapes, second.dtypes) and all(
        torch.equal(first.read(name).view(torch.int16), second.read(name).view(torch.int16)) for name in first.shapes
    )


def measure_parity(folder: Path) -> dict[str, dict[str, Any]]:
    """For each small model of the tests: the largest difference of a logit after import and after export, or what failed."""
    from megatron_ext.hf.export import export_checkpoint
    from megatron_ext.hf.import_model import import_model
    from megatron_ext.hf.verify import VerificationError
    from megatron_ext.train.checkpoint_logits import checkpoint_logits
    from tests.unit.hf_models import RECIPES, write_model

    figures = {}
    for number, (name, recipe) in enumerate(tqdm(RECIPES.items(), desc="families")):
        model, checkpoint, out = (folder / f"{kind}{number}" for kind in ("model", "checkpoint", "out"))
        try:
            write_model(model, recipe)
            imported = import_model(model, checkpoint, reference_logits=checkpoint_logits).verification
            exported = export_checkpoint(checkpoint, out, reference_logits=checkpoint_logits).verifications[-1]
            figures[name] = {"class": recipe.model_class, "import": imported.max_abs_diff, "export": exported.max_abs_diff}
        except (UserError, VerificationError) as error:
            figures[name] = {"class": recipe.model_class, "failed": str(error).replace(str(folder), "...")}
    return figures


def describe(figures: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    large = figures["large"]
    lines = [
        f"{large['parameters']:,} parameters, {large['bytes'] / 1e9:.2f} GB in bfloat16, largest tensor "
        f"{large['largest_tensor_bytes'] / 1e6:.0f} MB; {figures['machine']}; {figures['versions']}.",
        "",
        "| | time, median | of the copy's | each round | processor time | peak memory | load before |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, steps in large["steps"].items():
        found = [Step(**step) for step in steps]
        ratio = f"{large['ratio'][name]:.2f}" if name in large["ratio"] else ""
        each = ", ".join(f"{step.seconds:.1f}" for step in found)
        processor = statistics.median(step.cpu_seconds for step in found)
        peak = max(step.peak_bytes for step in found) / 1e6
        loads = ", ".join(f"{step.load:.1f}" for step in found)
        lines.append(f"| {name} | {_median(found):.1f} s | {ratio} | {each} | {processor:.1f} s | {peak:.0f} MB | {loads} |")
    lines += [
        "",
        f"Allowed: {LIMIT:g} times the copy, {large['allowed_peak_bytes'] / 1e6:.0f} MB. Python with the libraries alone takes "
        f"{large['peak_of_importing_libraries_bytes'] / 1e6:.0f} MB. Same bits after import and export: "
        f"{'yes' if large['same_bits_after_both'] else 'NO'}.",
        "",
        "| model | class | import | export |",
        "|---|---|---|---|",
    ]
    for name, found in figures["parity"].items():
        result = f"failed: {found['failed']} | " if "failed" in found else f"{found['import']:.1e} | {found['export']:.1e}"
        lines.append(f"| {name} | {found['class']} | {result} |")
    return "\n".join(lines) + "\n"


def _median(steps: list[Step]) -> float:
    return statistics.median(step.seconds for step in steps)


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GiB"


def main() -> int:
    """Measure, and write what was found; 1 if a limit was missed or bits differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("build/conversion"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=Shape.layers, help="of the large model")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    shape = Shape(layers=arguments.layers)
    needed = 5 * sum(2 * torch.Size(size).numel() for tensors in shape.tensors() for size in tensors.values())
    if shutil.disk_usage(arguments.output_dir).free < needed:
        raise UserError(f"{arguments.output_dir} has less than {needed / 1e9:.0f} GB of free space")
    with tempfile.TemporaryDirectory(dir=arguments.output_dir) as name:
        large = measure_large(Path(name), shape, arguments.rounds)
        (arguments.output_dir / "large.json").write_text(json.dumps(large, indent=1) + "\n")  # in case the second half fails
        parity = measure_parity(Path(name))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "safetensors", "transformers"))
    figures = {
        "machine": _machine(),
        "versions": f"Python {platform.python_version()}, {versions}",
        "large": large,
        "parity": parity,
    }
    (arguments.output_dir / "summary.json").write_text(json.dumps(figures, indent=1) + "\n")
    (arguments.output_dir / "summary.md").write_text(describe(figures))
    print(describe(figures))
    peak = max(step["peak_bytes"] for kind in ("import", "export") for step in large["steps"][kind])
    fast = max(large["ratio"].values()) <= LIMIT
    return 0 if large["same_bits_after_both"] and fast and peak <= large["allowed_peak_bytes"] else 1


if __name__ == "__main__":
    sys.exit(main())
