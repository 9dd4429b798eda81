"""The speed model against published runs: the errors, and the fit of its few constants."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.plan.anchor import Anchor
from megatron_ext.plan.anchors import ANCHORS
from megatron_ext.plan.kernels import CALIBRATED, Constants
from megatron_ext.plan.speed import Prediction, predict
from megatron_ext.plan.targets import OWN_RUNS, SEQUENCE, OwnRun

LOWEST = Constants(operand_traffic=0.0, exposed=0.05, triton_attention=0.2)
HIGHEST = Constants(operand_traffic=6.0, exposed=0.9, triton_attention=1.0)


@dataclass(frozen=True)
class Row:
    """One published row beside its prediction."""

    anchor: Anchor
    prediction: Prediction

    @property
    def error(self) -> float:
        """Predicted over published tokens/s, less 1."""
        return self.prediction.tokens_per_second / self.anchor.tokens_per_second - 1

    @property
    def use(self) -> str:
        """What the row is for."""
        if not self.anchor.known:
            return "outside"
        return "calibrates" if self.anchor.calibrates else "held out"


def validate(constants: Constants = CALIBRATED, anchors: Sequence[Anchor] = ANCHORS) -> list[Row]:
    """Predict every published row."""
    return [Row(anchor, predict(anchor.gpu, anchor.work, anchor.run, constants)) for anchor in anchors]


def error_summary(rows: Sequence[Row], use: str) -> tuple[float, float]:
    """Median and worst absolute error of the rows of this use."""
    errors = [abs(row.error) for row in rows if row.use == use]
    return statistics.median(errors), max(errors)


def calibrate() -> Constants:
    """Fit the constants to the rows that calibrate: least squares of log(predicted / published).

    Raises:
        UserError: SciPy is missing.
    """
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise UserError("--calibrate needs SciPy: pip install -e '.[dev]'") from None
    anchors = [anchor for anchor in ANCHORS if anchor.calibrates]

    def residuals(values: Sequence[float]) -> list[float]:
        return [math.log(1 + row.error) for row in validate(Constants(*values), anchors)]

    bounds = (LOWEST.as_list(), HIGHEST.as_list())
    start = [(low + high) / 2 for low, high in zip(*bounds, strict=True)]
    return Constants(*(round(float(value), 4) for value in least_squares(residuals, start, bounds=bounds).x))


def as_dict(rows: Sequence[Row], constants: Constants) -> dict[str, Any]:
    """Rows, errors and constants as plain values."""
    summary = {use: dict(zip(("median", "worst"), error_summary(rows, use), strict=True)) for use in ("calibrates", "held out")}
    table = [
        {
            "name": row.anchor.name,
            "source": row.anchor.source,
            "published": row.anchor.published,
            "assumed": row.anchor.assumed,
            "published_tokens_per_second": row.anchor.tokens_per_second,
            "predicted_tokens_per_second": row.prediction.tokens_per_second,
            "error": row.error,
            "use": row.use,
        }
        for row in rows
    ]
    own = [_own_row(run, constants) for run in OWN_RUNS]
    return {"constants": asdict(constants), "errors": summary, "rows": table, "own": own}


def _own_row(run: OwnRun, constants: Constants) -> dict[str, Any]:
    return {**asdict(run), "predicted": run.predict(constants).tokens_per_second}


def render(rows: Sequence[Row], constants: Constants) -> list[str]:
    """A table for people."""
    lines = ["constants: " + ", ".join(f"{name} {value}" for name, value in asdict(constants).items()), ""]
    lines.append(f"{'run':34}{'published':>12}{'predicted':>12}{'error':>9}  use         (tokens/s of one GPU)")
    for row in rows:
        published, predicted = row.anchor.tokens_per_second, row.prediction.tokens_per_second
        lines.append(f"{row.anchor.name:34}{published:>12,.0f}{predicted:>12,.0f}{100 * row.error:>+8.1f}%  {row.use}")
    lines.append("")
    for use in ("calibrates", "held out"):
        median, worst = error_summary(rows, use)
        count = sum(row.use == use for row in rows)
        lines.append(f"{use}: {count} rows, median error {100 * median:.1f} %, worst {100 * worst:.1f} %")
    lines += ["", "this stack on one H100, s 2048, tokens/s (MFU against the bf16 peak): fitted to nothing", ""]
    lines.append(f"{'run':36}{'target':>12}{'measured':>20}{'predicted':>12}{'error':>9}")
    return lines + [_own_line(run, constants) for run in OWN_RUNS]


def _own_line(run: OwnRun, constants: Constants) -> str:
    prediction = run.predict(constants)
    name = f"{run.preset} {run.micro_batch_size} x {SEQUENCE} {run.objective} {run.recipe}"
    target = f"{run.target:,.0f}" if run.target else ""
    mfu = run.measured * run.work.flops_per_token() / prediction.gpu.bf16_peak
    measured = f"{run.measured:,.0f} ({100 * mfu:.1f} %)"
    error = f"{100 * (prediction.tokens_per_second / run.measured - 1):+.1f}%"
    return f"{name:36}{target:>12}{measured:>20}{prediction.tokens_per_second:>12,.0f}{error:>9}"
