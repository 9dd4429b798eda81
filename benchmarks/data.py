"""Data: tokenizing beside raw SentencePiece, the sample index of 10 million documents, a far resume, and what the loader costs.

python -m benchmarks.data --output-dir build/bench/data

The text is the demo's (`tools/fetch_demo_data.py`). The index is timed on a made-up data set whose token file is a hole.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.alternating import environment
from benchmarks.contenders import SHAPES, contending_step, encoder_of
from benchmarks.machine import machine
from benchmarks.memory import peak, reset_peak
from megatron_ext.errors import CommandLine, run_command

PROCESSES = 2
CORPUS = "boolq_passages"
COPIES = 96
"""Files with the corpus (7.9 MB): enough work to hide how long two processes take to start."""
VOCAB_SIZE = 8192
DOCUMENTS, LONGEST = 10_000_000, 400
"""Of the made-up data set: lengths are uniform."""
FAR_SAMPLE = 10**9
SEQUENCE_LENGTH, BATCH_SIZE = 256, 8
STEPS = 30


def main() -> int:
    """Measure, write JSON and a table."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("build/bench/data"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](arguments.output_dir)))
        return 0
    prepare(arguments.output_dir)
    rounds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in WORKERS}
    for _ in tqdm(range(arguments.pairs), desc="rounds"):
        for kind, found in rounds.items():
            found.append(_in_own_process(kind, arguments.output_dir))
    result = {"machine": machine(("torch", "sentencepiece", "megatron-core", "numpy")), "rounds": rounds}
    (arguments.output_dir / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output_dir / "summary.md").write_text(describe(result))
    print(describe(result))
    return 0


def prepare_text(folder: Path) -> None:
    """The demo's text, a tokenizer of it, and its tokens; what is there already is used again."""
    root = Path(__file__).parents[1]

    def tool(name: str, *arguments: object) -> None:
        command = [sys.executable, str(root / "tools" / name), *map(str, arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    tool("fetch_demo_data.py", "--output-dir", folder, "--corpus", CORPUS)
    text = folder / f"{CORPUS}.jsonl"
    if not (folder / "tokenizer.model").is_file():
        tool("train_tokenizer.py", text, "--output-prefix", folder / "tokenizer", "--vocab-size", VOCAB_SIZE)
    tool("preprocess_data.py", text, "--output-prefix", folder / "tokens", "--tokenizer", folder / "tokenizer.model")


def prepare(folder: Path) -> None:
    """Text, tokenizer, tokens, copies of the text, and the made-up data set."""
    prepare_text(folder)
    text = folder / f"{CORPUS}.jsonl"
    for number in range(COPIES):
        (folder / f"copy{number}.jsonl").write_bytes(text.read_bytes())
    write_documents(folder / "many", DOCUMENTS)


def write_documents(prefix: Path, documents: int) -> None:
    """A Megatron data set of made-up documents: its index is real, its tokens are a hole in a file, all zero."""
    from megatron_ext.data.index_file import token_dtype, write_index

    lengths, dtype = np.random.default_rng(0).integers(1, LONGEST, documents, dtype=np.int32), token_dtype(VOCAB_SIZE)
    write_index(f"{prefix}.idx", lengths, dtype)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(int(lengths.sum(dtype=np.int64)) * dtype.itemsize)


def _in_own_process(kind: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.data", "--worker", kind, "--output-dir", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment(), check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def raw_tokenizing(folder: Path) -> dict[str, Any]:
    """SentencePiece alone on texts in memory, in this one process: lists of ids, as it comes, and its faster arrays."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [json.loads(line)["text"] for line in (folder / f"{CORPUS}.jsonl").read_text().splitlines()]
    seconds = {}
    for kind in (int, "numpy", int, "numpy"):  # the first ones warm up
        start = time.perf_counter()
        tokens = sum(len(processor.encode(text, return_type=kind)) for text in texts)
        seconds["lists" if kind is int else "arrays"] = time.perf_counter() - start
    return {"seconds": seconds, "tokens": tokens}


def whole_tokenizing(folder: Path) -> dict[str, Any]:
    """Files in, a data set out: what `tools/preprocess_data.py` does, from its call to its end."""
    from megatron_ext.data.corpus import preprocess

    for left in folder.glob("speed.*"):
        left.unlink()
    inputs = [folder / f"copy{number}.jsonl" for number in range(COPIES)]
    start = time.perf_counter()
    counts = preprocess(inputs, folder / "speed", folder / "tokenizer.model", append_eos=False, workers=PROCESSES, progress=False)
    return {"seconds": time.perf_counter() - start, "tokens": counts.tokens}


def sample_index(folder: Path) -> dict[str, Any]:
    """Open 10 million documents and give the first sample."""
    open_blend, source = _imported()
    before, start = reset_peak(), time.perf_counter()
    open_blend([source(str(folder / "many"))], 0, (1.0, 0.0, 0.0), SEQUENCE_LENGTH, 0).sample(0)
    return {"seconds": time.perf_counter() - start, "bytes": peak() - before}


def far_resume(folder: Path) -> dict[str, Any]:
    """The first batch after a resume at sample 10^9, of the demo's text and of 10 million documents that are open."""
    open_blend, source = _imported()
    seconds = {}
    for name in ("tokens", "many"):
        blend = open_blend([source(str(folder / name))], 0, (1.0, 0.0, 0.0), SEQUENCE_LENGTH, 0)
        start = time.perf_counter()
        for number in range(BATCH_SIZE):
            blend.sample(FAR_SAMPLE + number)
        seconds[name] = time.perf_counter() - start
    return {"seconds": seconds}


def _imported() -> tuple[Callable[..., Any], Callable[..., Any]]:
    import megatron.core.datasets.indexed_dataset  # noqa: F401 - before anything is timed

    from megatron_ext.config import DataSource
    from megatron_ext.data.dataset import open_blend

    return open_blend, lambda prefix: DataSource(prefix=prefix)


def loader_share(folder: Path) -> dict[str, Any]:
    """How long a training step of the tiny shape waits for its data."""

    from benchmarks.own_run import own_groups
    from megatron_ext.config import DataConfig, DataSource, PhaseConfig, TrainingConfig
    from megatron_ext.data.dataset import open_blend
    from megatron_ext.data.loader import BatchBuilder, TrainingLoader
    from megatron_ext.data.tokenizer import load_tokenizer
    from megatron_ext.objective import PhasePlan, Vocabulary

    tokenizer = load_tokenizer(folder / "tokenizer.model")
    sources = [DataSource(prefix=str(folder / "tokens"))]
    data = DataConfig(tokenizer=str(folder / "tokenizer.model"), train=sources, sequence_length=SEQUENCE_LENGTH)
    training = TrainingConfig(micro_batch_size=BATCH_SIZE, global_batch_size=BATCH_SIZE)
    blend = open_blend(sources, 0, (1.0, 0.0, 0.0), SEQUENCE_LENGTH, 0)
    is_special = np.isin(np.arange(tokenizer.vocab_size), list(tokenizer.special_ids))
    builder = BatchBuilder(blend, data, Vocabulary(tokenizer.mask_id, is_special, tokenizer.pieces_start_word), training.seed)
    plan = PhasePlan([PhaseConfig(objective="mlm", steps=STEPS)], BATCH_SIZE * SEQUENCE_LENGTH)
    loader = TrainingLoader(builder, plan, training, 0, 1)
    encoder = encoder_of(SHAPES["tiny"])
    waited = 0.0
    with own_groups(encoder, BATCH_SIZE) as (layout, backend):
        step = contending_step(encoder, tokenizer.vocab_size, layout, backend)
        step(loader.load(0).micro_batches)
        batches = loader.prefetch(0, STEPS)
        first = next(batches)
        started = time.perf_counter()
        step(first.micro_batches)
        for _ in range(STEPS - 1):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            step(batch.micro_batches)
        total = time.perf_counter() - started
    return {"seconds": total, "waited": waited, "share": waited / total}


WORKERS = {
    "raw": raw_tokenizing,
    "whole": whole_tokenizing,
    "index": sample_index,
    "far": far_resume,
    "loader": loader_share,
}


def describe(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rounds = result["rounds"]
    ratios = {
        kind: [
            whole["tokens"] / whole["seconds"] / (raw["tokens"] / raw["seconds"][kind]) / PROCESSES
            for raw, whole in zip(rounds["raw"], rounds["whole"], strict=True)
        ]
        for kind in ("lists", "arrays")
    }

    def spread(values: list[float], form: str) -> str:
        return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    opening, waiting = ([found[key] for found in rounds[kind]] for kind, key in (("index", "seconds"), ("loader", "share")))
    memory = max(found["bytes"] for found in rounds["index"]) / 2**20
    far = {name: spread([found["seconds"][name] for found in rounds["far"]], ".3f") for name in ("tokens", "many")}
    lines = [
        f"{result['machine']}.",
        "",
        "| what | seen | goal |",
        "|---|---|---|",
        f"| tokenizing on {PROCESSES} processes, of {PROCESSES} times raw SentencePiece | {spread(ratios['lists'], '.2f')} | 0.9 |",
        f"| the same, of SentencePiece that gives arrays | {spread(ratios['arrays'], '.2f')} | - |",
        f"| open {DOCUMENTS:,} documents and give a sample | {spread(opening, '.1f')} s, {memory:,.0f} MiB | seconds |",
        f"| first batch at sample {FAR_SAMPLE:,}, the demo's text | {far['tokens']} s | 1 s |",
        f"| first batch at sample {FAR_SAMPLE:,}, {DOCUMENTS:,} documents | {far['many']} s | 1 s |",
        f"| share of a step of L4 h256 that waits for data | {spread(waiting, '.2%')} | 2 % |",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run_command(main))
