"""Is one model better than another: paired tests over seeds and over test items, corrected for their number."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_ext.evaluation.selection import TaskScore

MIN_PAIRS = 2
RANDOMIZATIONS, CHUNK = 10_000, 1_000
ROUNDING = 1e-12
"""Differences that vary by no more do not vary."""


@dataclass(frozen=True)
class Comparison:
    """Two models on one task."""

    family: str
    task: str
    first: str
    second: str
    difference: float
    """Mean test score of the first less that of the second, over the seeds that both have; of this are the tests as well."""
    over_seeds: float | None
    """p of the paired t-test; None of fewer than two seeds, or where no difference varies."""
    over_items: float | None
    """p over the test items: `item_p`."""
    corrected_seeds: float | None = None
    """Benjamini-Hochberg over all comparisons: the share of false claims among those at or below it."""
    corrected_items: float | None = None


Items = Callable[[str], np.ndarray]
"""Key of a run -> [n] scores of its test items, or [n, 3] counts: `scores.Score`."""


def compare(scores: Sequence[TaskScore], items: Items | None) -> list[Comparison]:
    """Every pair of models on every task that both have.

    Args:
        scores: of `select`.
        items: None leaves the tests over items out.
    """
    found: list[Comparison] = []
    by_task: dict[str, dict[str, TaskScore]] = {}
    for score in scores:
        by_task.setdefault(score.task, {})[score.model] = score
    for task, own in by_task.items():
        pairs = (_compare(task, own[first], own[second], items) for first, second in itertools.combinations(own, 2))
        found += [pair for pair in pairs if pair is not None]
    seeds = _correct([each.over_seeds for each in found])
    corrected = _correct([each.over_items for each in found])
    return [
        Comparison(**{**vars(each), "corrected_seeds": one, "corrected_items": other})
        for each, one, other in zip(found, seeds, corrected, strict=True)
    ]


def _compare(task: str, first: TaskScore, second: TaskScore, items: Items | None) -> Comparison | None:
    common = sorted(first.test.by_seed.keys() & second.test.by_seed.keys())
    if not common:
        return None
    one, other = ([score.test.by_seed[seed] for seed in common] for score in (first, second))
    over_items = None
    if items is not None:
        over_items = item_p(*(_mean_items(score, common, items) for score in (first, second)))
    difference = float(np.mean(one) - np.mean(other))
    return Comparison(first.family, task, first.model, second.model, difference, paired_p(one, other), over_items)


def _mean_items(score: TaskScore, seeds: Sequence[int], items: Items) -> np.ndarray:
    keys = dict(zip(score.test.by_seed, score.test.keys, strict=True))
    return np.mean([items(keys[seed]) for seed in seeds], axis=0, dtype=np.float64)


def item_p(one: np.ndarray, other: np.ndarray) -> float | None:
    """Two-sided p over test items: of the paired t-test for scores [n], by randomization for counts [n, 3].

    None where the items are not the same ones, or where there is nothing to test.
    """
    if one.shape != other.shape:
        return None
    return paired_p(one, other) if one.ndim == 1 else randomized_f1_p(one, other)


def randomized_f1_p(one: np.ndarray, other: np.ndarray) -> float | None:
    """Approximate randomization (Yeh, COLING 2000): how often the F1s of two models differ as much if sentences change sides.

    Args:
        one: [n, 3] entities found, guessed and wanted in each sentence.
        other: the same of another model.
    """
    if np.array_equal(one, other):
        return None
    generator, found = np.random.default_rng(0), 0
    gap, total = one - other, (one + other).sum(axis=0)
    observed = abs(_f1(one.sum(axis=0)) - _f1(other.sum(axis=0)))
    for _ in range(RANDOMIZATIONS // CHUNK):
        signs = generator.choice((-0.5, 0.5), size=(CHUNK, len(gap)))
        shift = signs @ gap
        found += int((np.abs(_f1(total / 2 + shift) - _f1(total / 2 - shift)) >= observed - ROUNDING).sum())
    return (found + 1) / (RANDOMIZATIONS + 1)


def _f1(counts: np.ndarray) -> np.ndarray:
    """[..., 3] -> [...]; 0 where nothing is guessed or wanted."""
    return 2 * counts[..., 0] / np.maximum(counts[..., 1] + counts[..., 2], ROUNDING)


def paired_p(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float | None:
    """Two-sided p of the paired t-test; None where there is nothing to test."""
    differences = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    if len(differences) < MIN_PAIRS or np.ptp(differences) <= ROUNDING:
        return None
    return float(stats.ttest_rel(one, other).pvalue)


def _correct(values: list[float | None]) -> list[float | None]:
    known = [value for value in values if value is not None]
    corrected = iter(stats.false_discovery_control(known, method="bh") if known else [])
    return [None if value is None else float(next(corrected)) for value in values]
