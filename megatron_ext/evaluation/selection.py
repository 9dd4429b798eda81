"""From a grid's rows to scores of models: the learning rate is chosen on validation, the test split is looked at once.

A score is a mean over seeds with a 95 % interval by Student's t.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Row = dict[str, Any]
LEVEL = 0.95


@dataclass(frozen=True)
class Score:
    """A mean over seeds."""

    mean: float
    half_width: float | None
    """Half of the interval; None of a single seed."""
    by_seed: dict[int, float]
    keys: tuple[str, ...]
    """Of the runs that it was made of."""

    @classmethod
    def of(cls, by_seed: dict[int, float], keys: Iterable[str]) -> "Score":
        """From the seeds' values."""
        values = np.array(list(by_seed.values()), dtype=np.float64)
        half = None
        if len(values) > 1:
            half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
        return cls(float(values.mean()), half, by_seed, tuple(keys))


@dataclass(frozen=True)
class TaskScore:
    """A model on a task."""

    model: str
    family: str
    task: str
    learning_rate: float
    """The one with the best mean on validation."""
    test: Score
    by_rate: dict[float, float]
    """Learning rate -> mean of the test score: for the spread, not for a choice."""

    @property
    def spread(self) -> float:
        """Between the best and the worst learning rate."""
        return max(self.by_rate.values()) - min(self.by_rate.values())


def select(rows: Sequence[Row]) -> list[TaskScore]:
    """Each model on each task, in the order of the rows. Of two equally good learning rates the smaller one is taken.

    Only learning rates at which no run is missing can be chosen: one that diverges on two seeds must not win by the third.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["task"]), []).append(row)
    found = []
    for (model, task), own in groups.items():
        by_rate: dict[float, list[Row]] = {}
        for row in sorted(own, key=lambda row: (row["learning_rate"], row["seed"])):
            by_rate.setdefault(row["learning_rate"], []).append(row)
        most = max(len(group) for group in by_rate.values())
        whole = {rate: group for rate, group in by_rate.items() if len(group) == most}
        chosen = max(whole, key=lambda rate: float(np.mean([row["validation"] for row in by_rate[rate]])))
        best = by_rate[chosen]
        test = Score.of({row["seed"]: row["test"] for row in best}, (row["key"] for row in best))
        means = {rate: float(np.mean([row["test"] for row in group])) for rate, group in by_rate.items()}
        found.append(TaskScore(model, own[0]["family"], task, chosen, test, means))
    return found


def family_scores(scores: Sequence[TaskScore]) -> dict[tuple[str, str], Score]:
    """(model, family) -> the mean over the family's tasks, seed by seed; of the seeds that all of them have.

    A model that lacks a task which another model of the family has is left out: its mean would be of something else.
    """
    tasks: dict[str, set[str]] = {}
    groups: dict[tuple[str, str], list[TaskScore]] = {}
    for score in scores:
        tasks.setdefault(score.family, set()).add(score.task)
        groups.setdefault((score.model, score.family), []).append(score)
    found = {}
    for (model, family), group in groups.items():
        if {score.task for score in group} != tasks[family]:
            continue
        seeds = set.intersection(*(set(score.test.by_seed) for score in group))
        if seeds:
            by_seed = {seed: float(np.mean([score.test.by_seed[seed] for score in group])) for seed in sorted(seeds)}
            found[model, family] = Score.of(by_seed, (key for score in group for key in score.test.keys))
    return found


def ranking(scores: dict[tuple[str, str], Score], family: str) -> list[str]:
    """The models of a family, the best first."""
    own = {model: score.mean for (model, other), score in scores.items() if other == family}
    return sorted(own, key=lambda model: -own[model])
