"""One fine-tuning run: a model, a task, a learning rate and a seed; scored on validation, and once on the test split."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.errors import UserError
from megatron_ext.evaluation.backbone import load_backbone, load_tokenizer
from megatron_ext.evaluation.encoding import Feature, encode_questions, encode_texts, encode_words, pad
from megatron_ext.evaluation.retrieval import train_retriever
from megatron_ext.evaluation.scores import Score, score_answers, score_labels, score_tags
from megatron_ext.evaluation.sources import Examples, Row, load
from megatron_ext.evaluation.tasks import Task, find_task
from megatron_ext.evaluation.training import Precision, Settings, precision_on, predict, seed_everything, train_loop


@dataclass(frozen=True, kw_only=True)
class FinetuneRun:
    """One of them."""

    model: str
    """Folder."""
    task: str
    learning_rate: float
    seed: int
    data: str | None = None
    """Local copy of the task's data; see `sources.load`."""
    source_data: str | None = None
    """Of a transfer: that of the task it is trained on."""
    settings: Settings = Settings()

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    validation: float
    test: float
    test_items: np.ndarray
    """Of `scores.Score`."""
    train_loss: float
    """Mean over the last tenth of the steps."""
    steps: int
    seconds: float
    precision: Precision
    """Of the products: where none was asked for, that of the device."""

    def figures(self) -> dict[str, Any]:
        """All but the items."""
        return {name: value for name, value in vars(self).items() if name != "test_items"}


@lru_cache(maxsize=4)
def _examples(task: Task, data: str | None, source_data: str | None, settings: Settings) -> Examples:
    places = [Path(place) if place else None for place in (data, source_data)]
    found = load(task, places[0], Path(settings.packages), places[1])
    limit, test = settings.max_rows, settings.max_test_rows
    return Examples(found.train[:limit], found.validation[:test], found.test[:test], found.labels)


def finetune(run: FinetuneRun) -> Outcome:
    """Train and score.

    Raises:
        UserError: the model or the data cannot be used.
    """
    import torch

    started = time.perf_counter()
    task = find_task(run.task)
    examples = _examples(task, run.data, run.source_data, run.settings)
    seed_everything(run.seed)
    tokenizer = load_tokenizer(Path(run.model))
    backbone = load_backbone(Path(run.model), run.settings.attention)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = train_retriever if task.family == "ir" else train_head
    (validation, test), losses = train(run, task, examples, tokenizer, backbone, device)
    tail = losses[-max(1, len(losses) // 10) :]
    if not np.isfinite(tail).all():
        raise UserError(f"the loss of {run.task} at learning rate {run.learning_rate:g} is not finite any more")
    seconds = time.perf_counter() - started
    precision = precision_on(device, run.settings)
    return Outcome(validation.value, test.value, test.items, float(np.mean(tail)), len(losses), seconds, precision)


def train_head(
    run: FinetuneRun, task: Task, examples: Examples, tokenizer: Any, backbone: Any, device: Any
) -> tuple[tuple[Score, Score], list[float]]:
    """sc, tc and qa: a head on every token or on their mean."""
    from megatron_ext.evaluation.heads import SequenceClassifier, SpanFinder, TokenClassifier

    encode = {
        "sc": partial(_encode_plain, examples.labels),
        "tc": partial(_encode_tagged, examples.labels),
        "qa": _encode_windows,
    }[task.family]
    classes: dict[str, Callable[[], Any]] = {
        "sc": lambda: SequenceClassifier(backbone, len(examples.labels)),
        "tc": lambda: TokenClassifier(backbone, len(examples.labels)),
        "qa": lambda: SpanFinder(backbone),
    }
    model = classes[task.family]().to(device)
    features = encode(tokenizer, examples.train, task.max_length)[0]
    collate = partial(pad, pad_id=tokenizer.pad_token_id)
    lengths = [len(feature["input_ids"]) for feature in features]
    losses = train_loop(model, features, lengths, run.settings, run.learning_rate, run.seed, device, collate)
    scores = []
    for rows in (examples.validation, examples.test):
        asked, places = encode(tokenizer, rows, task.max_length)
        logits = predict(model, asked, run.settings, device, collate)
        scores.append(_score(task, logits, asked, places, rows, examples.labels))
    return (scores[0], scores[1]), losses


def _encode_tagged(labels: tuple[str, ...], tokenizer: Any, rows: list[Row], length: int) -> tuple[list[Feature], Any]:
    return encode_words(tokenizer, rows, labels, length)


def _encode_plain(labels: tuple[str, ...], tokenizer: Any, rows: list[Row], length: int) -> tuple[list[Feature], Any]:
    return encode_texts(tokenizer, rows, labels, length), None


def _encode_windows(tokenizer: Any, rows: list[Row], length: int) -> tuple[list[Feature], Any]:
    windows = encode_questions(tokenizer, rows, length)
    return [window.feature for window in windows], windows


def _score(
    task: Task, logits: list[np.ndarray], asked: list[Feature], places: Any, rows: list[Row], labels: tuple[str, ...]
) -> Score:
    if task.family == "sc":
        return score_labels(np.stack(logits), asked)
    if task.family == "tc":
        return score_tags(logits, places, rows, labels)
    return score_answers(logits, places, rows)


def use_threads(count: int) -> None:
    """Of torch on a CPU, from here on."""
    import torch

    torch.set_num_threads(count)
