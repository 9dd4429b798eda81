"""From a grid's results to the report of a study: what was scored, how sure it is, and which runs every number is of."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError, one_line
from megatron_ext.evaluation.comparison import Comparison, compare
from megatron_ext.evaluation.results import PLANNED
from megatron_ext.evaluation.selection import Score, TaskScore, family_scores, ranking, select
from megatron_ext.evaluation.tasks import FAMILIES, METRICS
from megatron_ext.study.facts import Facts
from megatron_ext.study.figures import DPI, Evidence, draw_all
from megatron_ext.study.report_page import Picture, Report, Table

SHOWN = 6
"""Models and tasks with missing runs that are named."""
NEEDED = ("key", "model", "family", "task", "learning_rate", "seed", "validation", "test")


def read_results(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of one or more grids.

    Raises:
        UserError: one has no table, or no rows in it; or two have runs of one model on one task: a score is of one grid.
    """
    rows: list[dict[str, Any]] = []
    before: dict[tuple[str, str], Path] = {}
    for folder in folders:
        for row in _read_table(folder / "results.parquet"):
            pair = row["model"], row["task"]
            if before.setdefault(pair, folder) is not folder:
                raise UserError(f"{before[pair]} and {folder} both have runs of {pair[0]} on {pair[1]}: a score is of one grid")
            rows.append(row)
    return rows


def read_missing(folders: Sequence[Path], rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, float, int]]:
    """Model, task, learning rate and seed of the runs of these grids that have no row: they failed, or were not made yet.

    Raises:
        UserError: a grid's list of its runs cannot be read.
    """
    done = {row["key"] for row in rows}
    missing = []
    for folder in folders:
        try:
            planned = json.loads((folder / PLANNED).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / PLANNED} cannot be read: {one_line(error)}; tools/run_grid.py writes it") from None
        missing += [tuple(run) for key, run in planned.items() if key not in done]
    return missing


def _read_table(file: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from None
    if not rows:
        raise UserError(f"{file} has no rows: run the grid first")
    if missing := [name for name in NEEDED if name not in rows[0]]:
        raise UserError(f"{file} lacks the columns {', '.join(missing)}: it is no table of a grid")
    return rows


def items_of(folders: Sequence[Path]) -> Callable[[str], Any]:
    """Key of a run -> the scores of its test items."""
    import numpy as np

    def read(key: str) -> Any:
        files = [folder / "items" / f"{key}.npy" for folder in folders]
        file = next((file for file in files if file.exists()), files[0])
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {one_line(error)}") from None

    return read


def make_report(
    title: str,
    rows: Sequence[dict[str, Any]],
    facts: Sequence[Facts],
    items: Callable[[str], Any] | None,
    missing: Sequence[tuple[str, str, float, int]] = (),
) -> Report:
    """Everything that the results say.

    Args:
        title: of the page.
        rows: of a grid.
        facts: of the study's models; models without are compared, and in no curve.
        items: None leaves the tests over items out.
        missing: of `read_missing`.
    """
    from matplotlib import pyplot

    tasks = select(rows)
    families = family_scores(tasks)
    known = {each.name: each for each in facts}
    pictures = []
    for named in draw_all(Evidence(known, families, tasks)):
        data = io.BytesIO()
        named.figure.savefig(data, format="png", dpi=DPI)
        pyplot.close(named.figure)
        pictures.append(Picture(named.name, named.title, named.caption, data.getvalue()))
    finished = [score for score in tasks if score.model not in known or known[score.model].is_finished]
    tables = [
        _overview(families, known),
        _tests(compare(finished, items)),
        _task_table(tasks),
        _run_table(rows),
    ]
    return Report(title, [*_gaps(rows, facts, missing), *_notes(rows, tasks)], pictures, tables)


def _gaps(rows: Sequence[dict[str, Any]], facts: Sequence[Facts], missing: Sequence[tuple[str, str, float, int]]) -> list[str]:
    """What is not there, in words."""
    told = []
    if missing:
        pairs = list(dict.fromkeys(f"{model} on {task}" for model, task, _, _ in missing))
        shown = ", ".join(pairs[:SHOWN]) + (f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else "")
        told.append(f"Runs that are missing, because they failed or were not made yet: {len(missing):,}, of {shown}.")
    models = {row["model"] for row in rows}
    if without := [each.name for each in facts if each.name not in models]:
        told.append(f"Models of the study without a run: {len(without)} ({', '.join(without)}).")
    return told


def _notes(rows: Sequence[dict[str, Any]], tasks: Sequence[TaskScore]) -> list[str]:
    models, seeds = {row["model"] for row in rows}, {row["seed"] for row in rows}
    names = sorted({score.task for score in tasks})
    rates = sorted({row["learning_rate"] for row in rows})
    hours = sum(row.get("seconds", 0.0) for row in rows) / 3600
    return [
        f"{len(rows):,} fine-tuning runs: {len(models)} models, {len(names)} tasks ({', '.join(names)}), {len(rates)} "
        f"learning rates, {len(seeds)} seeds; {hours:.1f} hours of workers.",
        "The learning rate is chosen on validation, for each model and task. Scores are of the test split: means over seeds, "
        "± half of the 95 % interval by Student's t. A family's score is the mean over its tasks.",
    ]


def _number(score: Score) -> str:
    return f"{100 * score.mean:.2f}" + ("" if score.half_width is None else f" ± {100 * score.half_width:.2f}")


def _overview(families: dict[tuple[str, str], Score], facts: dict[str, Facts]) -> Table:
    shown = [family for family in FAMILIES if any(other == family for _, other in families)]
    models = list(dict.fromkeys(model for model, _ in families))
    rows, best = [], set()
    tops = {family: ranking(families, family)[0] for family in shown}
    for number, model in enumerate(models):
        known = facts.get(model)
        about = [f"{known.plan}", f"{known.steps:,}", f"{known.flops:.2e}"] if known else ["", "", ""]
        cells = [_number(families[model, family]) if (model, family) in families else "" for family in shown]
        rows.append([model, *cells, *about])
        best |= {(number, 1 + column) for column, family in enumerate(shown) if tops[family] == model}
    head = ["model", *(f"{family.upper()}, {METRICS[family]}, %" for family in shown), "plan", "steps", "FLOPs"]
    return Table("models", "Models", head, rows, "The best of each column is bold.", best=frozenset(best))


def _tests(found: Sequence[Comparison]) -> Table:
    head = ["task", "model", "other", "difference, points", "p over seeds", "corrected", "p over items", "corrected"]
    rows = [
        [
            *(each.task, each.first, each.second, f"{100 * each.difference:+.2f}"),
            *map(_p, (each.over_seeds, each.corrected_seeds, each.over_items, each.corrected_items)),
        ]
        for each in found
    ]
    caption = (
        "Paired tests over seeds (which say whether another seed would decide the same) and over test items (whether other "
        "examples would): t-tests, over the items of token classification randomization of sentences; corrected by Benjamini and "
        "Hochberg over all comparisons of this table."
    )
    return Table("tests", "Every pair of models", head, rows, caption, folded=True)


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"  # noqa: PLR2004


def _task_table(tasks: Sequence[TaskScore]) -> Table:
    head = ["model", "family", "task", "learning rate", "test, %", "spread over learning rates, points", "runs"]
    rows = [
        [
            *(score.model, score.family, score.task, f"{score.learning_rate:g}"),
            *(_number(score.test), f"{100 * score.spread:.2f}", " ".join(score.test.keys)),
        ]
        for score in tasks
    ]
    return Table("tasks", "Every model on every task", head, rows, "The runs are the files runs/KEY.json of the grid.", folded=True)


def _run_table(rows: Sequence[dict[str, Any]]) -> Table:
    names = ["key", "model", "task", "learning_rate", "seed", "validation", "test", "train_loss", "steps", "seconds"]
    cells = [[_cell(row[name]) if name in row else "" for name in names] for row in rows]
    return Table("runs", "Every run", names, cells, folded=True)


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
