"""Fine-tunes models on film reviews (positive or negative) and compares them: what the adaptation of a decoder was good for.

Mean-pooled hidden states and a linear layer, all weights trained. The learning rate is chosen on the validation split, the figures
are of the test split; films do not occur in two splits.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

LEARNING_RATES = (1e-4, 3e-4)
SEEDS = (0, 1, 2)
TRAINING_REVIEWS = 4000
EPOCHS, BATCH_SIZE, MAX_LENGTH = 1, 32, 48
LABELS = ("rotten", "fresh")


@dataclass(frozen=True)
class Result:
    """One fine-tuning run."""

    model: str
    learning_rate: float
    seed: int
    validation: float
    """Accuracy."""
    test: float
    """Accuracy."""
    seconds: float


def main() -> None:
    """Fine-tune every model at every rate and seed, then write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER", help="a Hugging Face model; repeatable")
    parser.add_argument("--reviews", type=Path, required=True, help="JSON Lines with text, label and split")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=LEARNING_RATES, help="one is chosen on validation")
    parser.add_argument("--training-reviews", type=int, default=TRAINING_REVIEWS, help=f"of each run (default: {TRAINING_REVIEWS})")
    arguments = parser.parse_args()
    models = dict(pair.split("=", 1) for pair in arguments.model)
    data = (arguments.reviews, arguments.training_reviews)
    jobs = [(*model, rate, seed, *data) for model in models.items() for rate in arguments.learning_rates for seed in SEEDS]
    with ProcessPoolExecutor(arguments.processes) as pool:
        runs = [pool.submit(finetune, *job) for job in jobs]
        results = [run.result() for run in tqdm(runs, desc="fine-tuning", unit="run")]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "runs.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    summary = summarize(results)
    (arguments.output_dir / "table.md").write_text(as_table(summary))
    plot(summary, arguments.output_dir / "accuracy.png")
    print(as_table(summary), end="")


def finetune(name: str, folder: str, learning_rate: float, seed: int, reviews: Path, count: int) -> Result:
    """Train once on `count` reviews of the training split, with a linear warmup and decay."""
    import torch
    from transformers import get_linear_schedule_with_warmup

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    started = time.perf_counter()
    classifier = _classifier(folder)
    with open(reviews, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    training = [row for row in rows if row["split"] == "train"][::2][:count]
    steps = EPOCHS * (len(training) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    for step in range(steps):
        first = step * BATCH_SIZE % (steps // EPOCHS * BATCH_SIZE)
        if first == 0:
            order = torch.randperm(len(training)).tolist()
        batch = [training[index] for index in order[first : first + BATCH_SIZE]]
        targets = torch.tensor([LABELS.index(row["label"]) for row in batch])
        torch.nn.functional.cross_entropy(classifier([row["text"] for row in batch]), targets).backward()
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    scores = [accuracy(classifier, [row for row in rows if row["split"] == split]) for split in ("validation", "test")]
    return Result(name, learning_rate, seed, *scores, time.perf_counter() - started)


def _classifier(folder: str) -> Any:
    """Texts -> [texts, labels] logits, from the mean of each text's last hidden states."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # that the language-model head is left out is meant

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self.encoder = AutoModel.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
            self.head = torch.nn.Linear(self.encoder.config.hidden_size, len(LABELS))

        def forward(self, texts: list[str]) -> torch.Tensor:
            inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
            kept = inputs["attention_mask"]
            hidden = self.encoder(input_ids=inputs["input_ids"], attention_mask=kept).last_hidden_state
            return self.head((hidden * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True))

    return Classifier()


def accuracy(classifier: Any, rows: list[dict[str, str]]) -> float:
    """Share of the rows whose label is guessed."""
    import torch

    classifier.eval()
    guesses: list[int] = []
    with torch.inference_mode():
        for first in range(0, len(rows), 4 * BATCH_SIZE):
            guesses += classifier([row["text"] for row in rows[first : first + 4 * BATCH_SIZE]]).argmax(dim=-1).tolist()
    return mean(int(LABELS[guess] == row["label"]) for guess, row in zip(guesses, rows, strict=True))


@dataclass(frozen=True)
class Summary:
    """One model at the learning rate that its validation accuracy chose."""

    model: str
    learning_rate: float
    validation: float
    test: float
    half_interval: float
    """Half the 95 % interval of the test accuracy over the seeds (Student's t)."""


def summarize(results: list[Result]) -> list[Summary]:
    """Choose each model's learning rate on validation, and average its test accuracy over the seeds."""
    import numpy as np
    from scipy.stats import t

    chosen = []
    for model in dict.fromkeys(result.model for result in results):
        own = [result for result in results if result.model == model]
        by_rate = {rate: [r for r in own if r.learning_rate == rate] for rate in dict.fromkeys(r.learning_rate for r in own)}
        rate, runs = max(by_rate.items(), key=lambda item: mean(run.validation for run in item[1]))
        tests = [run.test for run in runs]
        half = t.ppf(0.975, len(tests) - 1) * np.std(tests, ddof=1) / len(tests) ** 0.5
        chosen.append(Summary(model, rate, mean(run.validation for run in runs), mean(tests), float(half)))
    return chosen


def as_table(summary: list[Summary]) -> str:
    """Markdown, accuracies in percent."""
    lines = ["| model | learning rate | validation | test |", "|---|---|---|---|"]
    for row in summary:
        test = f"{100 * row.test:.1f} ± {100 * row.half_interval:.1f}"
        lines.append(f"| {row.model} | {row.learning_rate:g} | {100 * row.validation:.1f} | {test} |")
    return "\n".join(lines) + "\n"


def plot(summary: list[Summary], path: Path) -> None:
    """Test accuracy with its interval, one bar a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.6 * len(summary) + 1.2), layout="constrained")
    values, errors = [100 * row.test for row in summary], [100 * row.half_interval for row in summary]
    axes.barh([row.model for row in summary], values, xerr=errors, color="#4c78a8", ecolor="#333333", capsize=4)
    axes.invert_yaxis()
    lowest = min(value - error for value, error in zip(values, errors, strict=True))
    axes.set_xlim(max(0, lowest - 5), None)
    axes.set_xlabel("test accuracy, % (95 % interval over seeds)")
    axes.set_title("Film reviews, positive or negative")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
