"""The demo's biphasic plan in float32, bfloat16 and every FP8 recipe, emulated: do the losses differ?

    python -m benchmarks.fp8_study --output-dir build/fp8_study

The same data, masks, initial weights and steps each time; only the numbers differ. A last run in bfloat16 with other weights,
data order and masks shows how far two runs lie apart that differ in nothing that matters. All layers are in FP8, none is left in
bfloat16. A study that was interrupted goes on where it was.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_ext.train.line_file import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "examples/quickstart/biphasic.yaml"
CORPORA = ("boolq_passages", "shakespeare")
VOCAB_SIZE = 8192
REFERENCE, OTHER_SEED = "bf16", "bf16, other seed"
FP8 = ("fp8-delayed", "fp8-tensorwise", "fp8-blockwise", "mxfp8")
COLORS = {
    "fp32": "#000000",
    "bf16": "#7b3294",
    "fp8-delayed": "#b2182b",
    "fp8-tensorwise": "#e08214",
    "fp8-blockwise": "#2166ac",
    "mxfp8": "#1b7837",
    OTHER_SEED: "#c2a5cf",
}
LAST = 20
"""Steps at the end of a phase whose mean training loss is reported: single steps scatter."""


FIRST = 10
"""Steps whose largest distance from bfloat16 is reported: later on, runs have drifted apart and every difference has grown."""


def main() -> None:
    """Train each recipe, then write results.json, table.md and the picture."""
    parser = argparse.ArgumentParser(description="The demo's plan under every precision recipe, FP8 emulated.")
    parser.add_argument("--output-dir", type=Path, default=Path("build/fp8_study"), help="folder for runs and results")
    parser.add_argument("--picture", type=Path, help="where the picture goes (default: in --output-dir)")
    parser.add_argument("--clm-steps", type=int, default=150, help="steps of the first phase")
    parser.add_argument("--mlm-steps", type=int, default=210, help="steps of the second phase")
    parser.add_argument("--sequence-length", type=int, default=64, help="tokens in a sample")
    parser.add_argument("--batch", type=int, default=8, help="samples in a step")
    arguments = parser.parse_args()
    arguments.output_dir = arguments.output_dir.resolve()
    prepare_data(Path("build/demo"))
    runs = {name: train(name, arguments) for name in ("fp32", REFERENCE, *FP8, OTHER_SEED)}
    results = {"arguments": vars(arguments), "versions": versions(), "runs": runs}
    (arguments.output_dir / "results.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
    text = table(runs)
    (arguments.output_dir / "table.md").write_text(text)
    print(text)
    draw(runs, arguments.clm_steps, arguments.picture or arguments.output_dir / "fp8_study.png")


def prepare_data(out: Path) -> None:
    """The demo's tokenizer and data sets; what is there is used again."""
    if all((out / f"{name}.idx").is_file() for name in CORPORA):
        return
    tool("fetch_demo_data.py", "--output-dir", "build/data")
    texts = [f"build/data/{name}.jsonl" for name in CORPORA]
    tool("train_tokenizer.py", *texts, "--output-prefix", str(out / "tokenizer"), "--vocab-size", str(VOCAB_SIZE))
    for name, text in zip(CORPORA, texts, strict=True):
        tool("preprocess_data.py", text, "--output-prefix", str(out / name), "--tokenizer", str(out / "tokenizer.model"))


def tool(name: str, *arguments: str) -> None:
    """Run one of tools/."""
    run([sys.executable, f"tools/{name}", *arguments])


def run(command: list[str]) -> None:
    """Print and run a command; stop if it fails."""
    print("\n$", shlex.join(["python" if word == sys.executable else word for word in command]), flush=True)
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def train(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run, unless it is there and complete; what its records say."""
    folder = arguments.output_dir / name.replace(", ", "-").replace(" ", "-")
    total = arguments.clm_steps + arguments.mlm_steps
    if not (folder / f"checkpoints/step_{total:08d}/run.json").is_file():
        run([sys.executable, "pretrain_encoder.py", "--config", CONFIG, *options(name, folder, arguments)])
    lines = read_metrics(folder)
    training = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return {
        "precision": json.loads((folder / f"checkpoints/step_{total:08d}/run.json").read_text())["precision"],
        "training": training,
        "validation": {line["step"]: line["validation_mlm_loss"] for line in lines if "validation_mlm_loss" in line},
        "clm_loss": mean(training[step] for step in range(arguments.clm_steps - LAST + 1, arguments.clm_steps + 1)),
        "mlm_loss": mean(training[step] for step in range(total - LAST + 1, total + 1)),
        "skipped_steps": max(line.get("total/skipped_steps", 0) for line in lines),
    }


def options(name: str, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """The command line's changes to the demo's configuration."""
    phases = [
        {"objective": "clm", "steps": arguments.clm_steps},
        {"objective": "mlm", "steps": arguments.mlm_steps, "masking": {"ratio": 0.3}},
    ]
    emulated = {"emulation": "true", "bf16_first_layers": 0, "bf16_last_layers": 0} if name in FP8 else {}
    values = {
        "output_dir": folder,
        "data.sequence_length": arguments.sequence_length,
        "model.ffn_hidden_size": 768,  # the preset's 704 does not divide by the 128 of fp8-blockwise
        "phases": json.dumps(phases),
        "optimizer.decay_steps": arguments.mlm_steps // 3,
        "training.micro_batch_size": arguments.batch,
        "training.global_batch_size": arguments.batch,
        "training.log_interval": 1,
        "training.seed": 1 if name == OTHER_SEED else 0,
        "validation.interval": arguments.clm_steps // 3,
        "validation.samples": 64,
        "checkpoint.interval": 0,
        "tracking.mlflow": "false",
        "resume": "auto",
        "precision.recipe": "bf16" if name == OTHER_SEED else name,
        **{f"precision.{key}": value for key, value in emulated.items()},
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def mean(values: Any) -> float:
    """Of numbers."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


def running_means(values: list[float]) -> list[float]:
    """Of the last steps, as soon as there are so many."""
    return [mean(values[end - LAST : end]) for end in range(LAST, len(values) + 1)]


def versions() -> dict[str, str]:
    """What it was run with."""
    names = {name: metadata.version(name) for name in ("torch", "megatron-core", "numpy")}
    return {"python": platform.python_version(), **names, "cores": str(len(os.sched_getaffinity(0))), "date": time.strftime("%F")}


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Losses in nats, and how far each lies from bfloat16's."""
    heads = ("precision", "first steps", "CLM loss", "MLM loss", "validation MLM loss", "minus bf16", "skipped steps")
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    base = last(runs[REFERENCE])
    for name, found in runs.items():
        label = name if name == OTHER_SEED else found["precision"]
        early = max(abs(loss - runs[REFERENCE]["training"][step]) for step, loss in found["training"].items() if step <= FIRST)
        values = f"{early:.4f} | {found['clm_loss']:.4f} | {found['mlm_loss']:.4f} | {last(found):.4f} | {last(found) - base:+.4f}"
        rows.append(f"| {label} | {values} | {found['skipped_steps']} |")
    return "\n".join(rows) + "\n"


def last(found: dict[str, Any]) -> float:
    """The last validation loss."""
    return list(found["validation"].values())[-1]


def draw(runs: dict[str, dict[str, Any]], edge: int, picture: Path) -> None:
    """Validation losses, and how far each run's training loss lies from bfloat16's at the same steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), dpi=130, sharex=True, height_ratios=[3, 2])
    base = runs[REFERENCE]
    above.plot(list(base["training"]), list(base["training"].values()), color="#bbbbbb", linewidth=0.7, label="training, bf16")
    for name, found in runs.items():
        style = {"color": COLORS[name], "linewidth": 1.3, "label": name if name == OTHER_SEED else found["precision"]}
        dashes = "--" if name == OTHER_SEED else "-"
        above.plot(list(found["validation"]), list(found["validation"].values()), "o", ls=dashes, markersize=3.5, **style)
        if name not in (REFERENCE, OTHER_SEED):
            differences = [loss - base["training"][step] for step, loss in found["training"].items()]
            below.plot(list(found["training"])[LAST - 1 :], running_means(differences), **style)
    below.axhline(0, color=COLORS[REFERENCE], linewidth=1)
    for axes in (above, below):
        axes.axvspan(0, edge, color="#f4d9b8", alpha=0.5, zorder=0)
        axes.axvspan(edge, max(base["training"]), color="#c7dcef", alpha=0.5, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    above.set(ylabel="loss (nats per predicted token)", xlim=(0, max(base["training"])))
    above.set_title("CLM, then MLM; FP8 emulated: validation MLM loss", fontsize=10)
    above.legend(fontsize=8, framealpha=0.9)
    below.set(xlabel="optimizer step", ylabel=f"training loss minus bf16's,\nmean of {LAST} steps")
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


if __name__ == "__main__":
    main()
