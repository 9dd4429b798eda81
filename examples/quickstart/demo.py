"""The whole way once, on real text: what `make demo` runs. Every step is a command of this repository, printed as it runs.

text -> tokenizer -> data sets -> CLM then MLM on 2 processes, interrupted and resumed -> proof that the resume is exact ->
Hugging Face model, verified -> fill-mask -> loss curve -> summary.json
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from megatron_ext.train.line_file import read_metrics

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "examples/quickstart/biphasic.yaml"
VOCAB_SIZE = 8192
CORPORA = ("boolq_passages", "shakespeare")
STOP_AT, REPLAY_FROM = 160, 120  # the CLM phase ends at step 150, between the two
SENTENCES = (
    "The capital of the United [MASK] is Washington.",
    "The film was released in the [MASK] States.",
    "The game is played by two [MASK].",
    "To be, or [MASK] to be: that is the question.",
    "My lord, I [MASK] not what you say.",
)


def main() -> None:
    """Run every step and write build/demo/summary.json."""
    parser = argparse.ArgumentParser(description="Real text in, verified Hugging Face encoder out.")
    parser.add_argument("--output-dir", type=Path, default=Path("build/demo"), help="folder for everything that is made")
    out = parser.parse_args().output_dir
    started = time.perf_counter()
    prepare_data(out)
    train(out / "run", "--training.stop_at_step", str(STOP_AT))
    exact = replay_is_exact(out)
    train(out / "run", "--resume", "auto")
    last = sorted((out / "run/checkpoints").glob("step_*"))[-1]
    shutil.rmtree(out / "hf", ignore_errors=True)
    tool("convert_checkpoint.py", "export", str(last), str(out / "hf"), "--verify", "--report", str(out / "export.json"))
    baseline = unigram_baseline(last)
    tool("plot_run.py", str(out / "run"), str(out / "loss_curve.png"), "--baseline", f"{baseline:.4f}")
    summary = {
        **summarize(out, last),
        "unigram_baseline_loss": baseline,
        "resume_bitwise_equal": exact,
        "fill_mask": fill_mask(out / "hf"),
        "seconds": round(time.perf_counter() - started, 1),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(summary, indent=1, ensure_ascii=False))
    check(summary)


def prepare_data(out: Path) -> None:
    """Fetch the text, train the tokenizer, tokenize; what an earlier demo left is used again."""
    tool("fetch_demo_data.py", "--output-dir", "build/data")
    texts = [f"build/data/{name}.jsonl" for name in CORPORA]
    if not (out / "tokenizer.model").is_file():
        tool("train_tokenizer.py", *texts, "--output-prefix", str(out / "tokenizer"), "--vocab-size", str(VOCAB_SIZE))
    for name, text in zip(CORPORA, texts, strict=True):
        tool("preprocess_data.py", text, "--output-prefix", str(out / name), "--tokenizer", str(out / "tokenizer.model"))
    shutil.rmtree(out / "run", ignore_errors=True)
    shutil.rmtree(out / "replay", ignore_errors=True)


def tool(name: str, *arguments: str) -> None:
    """Run one of tools/."""
    run(sys.executable, f"tools/{name}", *arguments)


def train(run_dir: Path, *arguments: str) -> None:
    """Run the trainer on two data-parallel processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    data = run_dir.parent
    sources = [{"prefix": str(data / name), "weight": weight} for name, weight in zip(CORPORA, (2, 1), strict=True)]
    paths = ["--data.tokenizer", str(data / "tokenizer.model"), "--data.train", json.dumps(sources), "--output_dir", str(run_dir)]
    run(*launcher, "pretrain_encoder.py", "--config", CONFIG, *paths, *arguments)


def run(*command: str) -> None:
    """Print and run a command; stop the demo if it fails."""
    print("\n$", shlex.join(["python" if word == sys.executable else word for word in command]), flush=True)
    # The trainer shares the cores among its ranks by itself; naming torchrun's default keeps torchrun from warning of it.
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def replay_is_exact(out: Path) -> bool:
    """Train again from the checkpoint at step 120, across the phase edge: is every number at step 160 the same to the bit?"""
    start = out / f"run/checkpoints/step_{REPLAY_FROM:08d}"
    train(out / "replay", "--resume", str(start), "--training.stop_at_step", str(STOP_AT), "--tracking.mlflow", "false")
    first, again = (shard_sums(out / f"{name}/checkpoints/step_{STOP_AT:08d}") for name in ("run", "replay"))
    return bool(first) and first == again


def shard_sums(checkpoint: Path) -> dict[str, str]:
    """Sums of the files that hold a checkpoint's weights and optimizer moments."""
    files = json.loads((checkpoint / "run.json").read_text())["files"]
    return {name: file["blake3"] for name, file in files.items() if name.endswith(".distcp")}


def unigram_baseline(checkpoint: Path) -> float:
    """Loss of a unigram model, in nats, on the very positions of the MLM validation.

    Its probabilities are the frequencies (plus one) of the tokens in the samples that the run was trained on.
    """
    import numpy as np

    from megatron_ext.config_reading import from_dict
    from megatron_ext.train.preflight import prepare
    from megatron_ext.train.validation import comparison_task, validation_batches, validation_builder

    record = json.loads((checkpoint / "run.json").read_text())
    setup = prepare(from_dict({**record["config"], "resume": "never"}), world_size=1)
    counts = np.ones(setup.vocab_size)
    for index in range(record["samples"]):
        counts += np.bincount(setup.training_data.sample(index).tokens, minlength=setup.vocab_size)
    losses = -np.log(counts / counts.sum())
    batches = validation_batches(setup, validation_builder(setup), comparison_task(setup), rank=0, ranks=1)
    return float(np.mean(np.concatenate([losses[batch.target_ids.numpy()] for batch in batches])))


def summarize(out: Path, checkpoint: Path) -> dict[str, Any]:
    """What the run's own records say."""
    record = json.loads((checkpoint / "run.json").read_text())
    lines = read_metrics(out / "run")
    training = [line for line in lines if "loss" in line]
    sets = [json.loads((out / f"{name}.json").read_text()) for name in CORPORA]
    return {
        "documents": sum(info["documents"] for info in sets),
        "tokens": sum(info["tokens"] for info in sets),
        "vocab_size": record["vocab_size"],
        "phases": record["phases"],
        "train_loss_by_phase": {line["phase"]: line["loss"] for line in training},
        "validation_mlm_loss": [line["validation_mlm_loss"] for line in lines if "validation_mlm_loss" in line][-1],
        "parity_max_abs_diff": json.loads((out / "export.json").read_text())["max_abs_diff"],
        "hf_dir": str(out / "hf"),
        "mlflow_run_id": record["mlflow_run_id"],
        "tokens_per_second": median(line["tokens_per_second"] for line in training),
        "mfu": median(line["mfu"] for line in training),
        "trained_tokens": record["tokens"],
        "predicted_tokens": record["predicted_tokens"],
        "flops": record["flops"],
    }


def fill_mask(folder: Path) -> dict[str, list[str]]:
    """The five likeliest fillings of each sentence."""
    from transformers import pipeline

    unmasker = pipeline("fill-mask", model=str(folder), tokenizer=str(folder), device="cpu")
    return {sentence: [guess["token_str"].strip() for guess in unmasker(sentence, top_k=5)] for sentence in SENTENCES}


def check(summary: dict[str, Any]) -> None:
    """Fail loudly if the demo did not show what it is to show."""
    gain = summary["unigram_baseline_loss"] - summary["validation_mlm_loss"]
    if gain < 1.0:
        sys.exit(f"the validation MLM loss is only {gain:.2f} nats below the unigram model: 1.0 was expected")
    if not summary["resume_bitwise_equal"]:
        sys.exit("the resumed run differs from the uninterrupted one")


if __name__ == "__main__":
    main()
