"""The loop of a fine-tuning run, and its settings."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_ext.evaluation.backbone import Attention
from megatron_ext.evaluation.encoding import Feature

Precision = Literal["fp32", "bf16"]
WARMUP_SHARE = 0.1
BATCHES_SORTED = 8
"""Rows of so many batches are sorted by length before they are cut into batches, which then hold less padding."""
WEIGHT_DECAY, CLIP = 0.1, 1.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a grid have in common; the paper's, unless said otherwise."""

    max_steps: int = 1000
    max_passes: int = 1
    """Over the training rows; a run ends with the last of them or with `max_steps`, whichever comes first."""
    batch_size: int = 32
    attention: Attention = "bidirectional"
    precision: Precision | None = None
    """Of the products; weights, sums and the optimizer are float32. None: bf16 on a GPU, fp32 on a CPU."""
    max_rows: int | None = None
    """Training rows, the first so many; None: all."""
    max_test_rows: int | None = None
    """Rows of validation and of the test, the first so many."""
    packages: str = "build/data"
    """Where the packaged sets are."""


def seed_everything(seed: int) -> None:
    """Of every generator that a run draws from: heads and the order of the rows."""
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def make_batches(lengths: Sequence[int], settings: Settings, seed: int) -> list[np.ndarray]:
    """The rows of every step: in random order, each at most once a pass, those of a batch of like length.

    Args:
        lengths: of the training rows; where all are the same, batches are at random.
        settings: batch size and steps.
        seed: of the order.
    """
    generator, size = np.random.default_rng(seed), min(settings.batch_size, len(lengths))
    whole = len(lengths) // size
    passes = [generator.permutation(len(lengths)) for _ in range(settings.max_passes)]
    batches: list[np.ndarray] = []
    for order in passes:  # no batch holds rows of two passes: a row might meet itself
        order = order[: min(whole, settings.max_steps - len(batches)) * size]
        for first in range(0, len(order), BATCHES_SORTED * size):
            stretch = order[first : first + BATCHES_SORTED * size]
            stretch = stretch[np.argsort(np.array(lengths)[stretch], kind="stable")]
            parts = [stretch[start : start + size] for start in range(0, len(stretch), size)]
            batches += [parts[number] for number in generator.permutation(len(parts))]
    return batches


def train_loop(
    model: Any,
    features: list[Feature],
    lengths: Sequence[int],
    settings: Settings,
    learning_rate: float,
    seed: int,
    device: Any,
    collate: Any,
) -> list[float]:
    """AdamW with a linear warm-up and decay over batches of `make_batches`; the loss of every step."""
    import torch
    from transformers import get_linear_schedule_with_warmup

    batches = make_batches(lengths, settings, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP_SHARE * len(batches)), len(batches))
    model.train()
    losses = []
    for chosen in batches:
        with _numbers(device, settings):
            loss = model(**_to(collate([features[index] for index in chosen]), device))["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).float().tolist()


def predict(model: Any, features: list[Feature], settings: Settings, device: Any, collate: Any) -> list[np.ndarray]:
    """Logits of every feature, without padding; rows of like length are asked together."""
    import torch

    model.eval()
    size = 4 * settings.batch_size
    order = np.argsort([len(feature["input_ids"]) for feature in features], kind="stable")
    found: list[Any] = [None] * len(features)
    with torch.inference_mode(), _numbers(device, settings):
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            batch = collate([features[index] for index in chosen])
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            logits = model(**inputs)["logits"].float().cpu().numpy()
            for index, row in zip(chosen, logits, strict=True):
                found[index] = row[: len(features[index]["input_ids"])] if row.ndim > 1 else row
    return found


def precision_on(device: Any, settings: Settings) -> Precision:
    """Of the products there."""
    return settings.precision or ("bf16" if device.type == "cuda" else "fp32")


def _numbers(device: Any, settings: Settings) -> Any:
    """Context of this precision."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision_on(device, settings) == "bf16")


def _to(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    return {name: value.to(device) for name, value in batch.items()}
