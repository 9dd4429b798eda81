"""Is one model better than another: paired tests over seeds and over test items, corrected for their number."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_ext.evaluation.selection import TaskScore

MIN_PAIRS = 2
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
    """Mean test score of the first less that of the second."""
    over_seeds: float | None
    """p of the paired t-test over the seeds that both have; None of fewer than two, or where no difference varies."""
    over_items: float | None
    """p of the paired t-test over the test items, each the mean over the seeds."""
    corrected_seeds: float | None = None
    """Benjamini-Hochberg over all comparisons: the share of false claims among those at or below it."""
    corrected_items: float | None = None


Items = Callable[[str], np.ndarray]
"""Key of a run -> [n] scores of its test items."""


def compare(scores: Sequence[TaskScore], items: Items | None) -> list[Comparison]:
    """Every pair of models on every task that both have.

    Args:
        scores: of `select`.
        items: None leaves the tests over items out.
    """
    found = []
    by_task: dict[str, dict[str, TaskScore]] = {}
    for score in scores:
        by_task.setdefault(score.task, {})[score.model] = score
    for task, own in by_task.items():
        found += [_compare(task, own[first], own[second], items) for first, second in itertools.combinations(own, 2)]
    seeds = _correct([each.over_seeds for each in found])
    corrected = _correct([each.over_items for each in found])
    return [
        Comparison(**{**vars(each), "corrected_seeds": one, "corrected_items": other})
        for each, one, other in zip(found, seeds, corrected, strict=True)
    ]


def _compare(task: str, first: TaskScore, second: TaskScore, items: Items | None) -> Comparison:
    common = sorted(first.test.by_seed.keys() & second.test.by_seed.keys())
    one, other = ([score.test.by_seed[seed] for seed in common] for score in (first, second))
    over_items = None
    if items is not None:
        means = [np.mean([items(key) for key in score.test.keys], axis=0, dtype=np.float64) for score in (first, second)]
        over_items = paired_p(*means)
    difference = first.test.mean - second.test.mean
    return Comparison(first.family, task, first.model, second.model, difference, paired_p(one, other), over_items)


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
