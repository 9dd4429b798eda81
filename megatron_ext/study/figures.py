"""The figures of a study: scores with their intervals, each made where the results have something to show."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ext.evaluation.selection import Score, TaskScore
from megatron_ext.evaluation.tasks import FAMILIES, METRICS
from megatron_ext.study.facts import Facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#1f5fa8", "#b0501e", "#2d7d46", "#7a3f98", "#8a6d1d", "#c2185b", "#00838f", "#5d4037")
COLOR_OF = {"masked": COLORS[0], "clm": COLORS[1], "both": COLORS[2]}
CALLED = {"masked": "masked alone", "clm": "CLM alone", "both": "CLM and masked"}
STYLES = ("-", "--", ":", "-.")
WIDTH, HEIGHT, DPI = 4.2, 3.2, 120
LEGEND_COLUMN = 5
"""Names below each other in a legend."""
FEW = 6
"""So many places at most are written below an axis of their own."""
MANY = 8
"""So many models or more are told apart by their objective, not by name."""


@dataclass(frozen=True)
class Evidence:
    """What the figures are drawn from."""

    facts: dict[str, Facts]
    """By model; those without are drawn in the comparison alone."""
    families: dict[tuple[str, str], Score]
    tasks: list[TaskScore]

    @property
    def shown(self) -> list[str]:
        """Task families with scores."""
        return [family for family in FAMILIES if any(other == family for _, other in self.families)]

    def finished(self) -> list[str]:
        """Models that are no checkpoints on the way."""
        models = dict.fromkeys(model for model, _ in self.families)
        return [model for model in models if model not in self.facts or self.facts[model].is_finished]


@dataclass(frozen=True)
class Named:
    """A figure with what it says."""

    name: str
    title: str
    caption: str
    figure: "Figure"


Point = tuple[float, Score]


def draw_all(evidence: Evidence) -> Iterator[Named]:
    """Every figure that the results have something for. The caller closes them."""
    makers: tuple[tuple[str, str, str, Callable[[Evidence], Any]], ...] = (
        ("objectives", "Models", "Mean over a family's tasks; the bar is the 95 % interval over seeds.", _objectives),
        ("mask_ratio", "Mask ratio", "Models trained with MLM alone.", _mask_ratio),
        (
            "data_efficiency",
            "Data efficiency",
            "Finished models, and the checkpoints on their way (not decayed), over steps.",
            _data_efficiency,
        ),
        (
            "learning_rate",
            "Sensitivity to the learning rate",
            "Test score at each learning rate; a flat line is a stable model.",
            _rates,
        ),
        ("split", "CLM first, MLM after", "Share of the steps before the decay that were CLM, at each budget.", _split),
        ("continued", "Continued pretraining", "Steps added to a finished model.", _continued),
        ("cost", "Cost against quality", "Training FLOPs of each finished model.", _cost),
    )
    for name, title, caption, maker in makers:
        figure = maker(evidence)
        if figure is not None:
            yield Named(name, title, caption, figure)


def _panels(families: Sequence[str], height: float = HEIGHT) -> tuple[Any, list["Axes"]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(families))
    rows = -(-len(families) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(WIDTH * columns, height * rows), squeeze=False, layout="constrained")
    flat = list(axes.flat)
    for unused in flat[len(families) :]:
        unused.set_axis_off()
    for axis, family in zip(flat, families, strict=False):
        axis.set_title(FAMILIES[family], fontsize=10)
        axis.grid(visible=True, alpha=0.25)
    return figure, flat


def _objectives(evidence: Evidence) -> Any:
    models = evidence.finished()
    if not models:
        return None
    figure, axes = _panels(evidence.shown, max(HEIGHT, 0.3 * len(models) + 0.8))
    for axis, family in zip(axes, evidence.shown, strict=False):
        own = [model for model in models if (model, family) in evidence.families]
        for place, model in enumerate(reversed(own)):
            score, known = evidence.families[model, family], evidence.facts.get(model)
            color = COLOR_OF[known.objective] if known else "#555555"
            axis.errorbar(100 * score.mean, place, xerr=_width(score), fmt="o", color=color, capsize=3)
        axis.set_yticks(range(len(own)), list(reversed(own)), fontsize=8)
        axis.set_xlabel(f"{METRICS[family]}, %")
    return figure


def _width(score: Score) -> float:
    return 100 * (score.half_width or 0.0)


def _lines(evidence: Evidence, series: dict[str, dict[str, list[Point]]], label: str, logarithmic: bool = False) -> Any:
    """One panel for each family, one line for each series: {family: {series: points}}."""
    series = {family: {name: points for name, points in own.items() if len(points) > 1} for family, own in series.items()}
    families = [family for family in evidence.shown if series.get(family)]
    if not families:
        return None
    names = list(dict.fromkeys(name for family in families for name in series[family]))
    figure, axes = _panels(families)
    for axis, family in zip(axes, families, strict=False):
        for number, name in enumerate(names):
            points = series[family].get(name, [])
            points = sorted(points, key=lambda point: point[0])
            means, widths = [100 * score.mean for _, score in points], [_width(score) for _, score in points]
            across = [place for place, _ in points]
            color = COLORS[number % len(COLORS)]
            style = STYLES[number // len(COLORS) % len(STYLES)]
            axis.errorbar(across, means, yerr=widths, fmt=f"o{style}", color=color, capsize=3, label=name, markersize=4)
        if logarithmic:
            _logarithmic(axis, (place for points in series[family].values() for place, _ in points))
        axis.set_xlabel(label)
        axis.set_ylabel(f"{METRICS[family]}, %")
    _legend(figure, axes[0])
    return figure


def _legend(figure: Any, axis: "Axes") -> None:
    """One for all panels, below them."""
    handles, labels = axis.get_legend_handles_labels()
    columns = min(3, -(-len(labels) // LEGEND_COLUMN))
    rows = -(-len(labels) // columns) if labels else 0
    figure.set_figheight(figure.get_figheight() + 0.17 * rows + 0.2)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7)


def _logarithmic(axis: "Axes", places: Iterable[float]) -> None:
    """Named are the places themselves where they are few, else the powers of ten alone if there are two of them to be seen."""
    from matplotlib.ticker import NullFormatter

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    if len(own := sorted(set(places))) <= FEW:
        axis.set_xticks(own, [f"{place:,.0f}" if place >= 1 else f"{place:.0e}".replace("e-0", "e-") for place in own])
        axis.minorticks_off()
    elif high / low > 10:  # noqa: PLR2004
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", which="both", labelsize=7)


Place = Callable[[Facts], tuple[str, float] | None]
"""Series and place of a model in a figure; None leaves it out."""


def _series(evidence: Evidence, place: Place) -> dict[str, dict[str, list[Point]]]:
    found: dict[str, dict[str, list[Point]]] = {}
    for (model, family), score in evidence.families.items():
        where = place(evidence.facts[model]) if model in evidence.facts else None
        if where is not None:
            found.setdefault(family, {}).setdefault(where[0], []).append((where[1], score))
    return found


def _mask_ratio(evidence: Evidence) -> Any:
    def place(facts: Facts) -> tuple[str, float] | None:
        if not facts.is_finished or facts.added_steps or not facts.plan.startswith("mlm") or " " in facts.plan:
            return None
        assert facts.ratio is not None, "MLM has one"
        return f"{facts.size}, {facts.steps:,} steps", facts.ratio

    return _lines(evidence, _series(evidence, place), "share of the tokens that is masked")


def _data_efficiency(evidence: Evidence) -> Any:
    if all(facts.is_finished for facts in evidence.facts.values()):
        return None

    series: dict[str, dict[str, list[Point]]] = {}
    for family in evidence.shown:
        scores = {model: score for (model, other), score in evidence.families.items() if other == family}
        lines: dict[str, dict[str, Point]] = {}
        for end in evidence.facts.values():
            if end.is_finished and not end.added_steps:
                way = [known for known in evidence.facts.values() if known is end or end.name in known.leads_to]
                points = {known.name: (float(known.steps), scores[known.name]) for known in way if known.name in scores}
                lines.setdefault(_line_of(end), {}).update(points)
        series[family] = {name: list(points.values()) for name, points in lines.items()}
    return _lines(evidence, series, "steps", logarithmic=True)


def _line_of(end: Facts) -> str:
    """Models of one objective share a trunk whatever their budget; of two, the step at which the second begins is their own."""
    share = "" if end.causal_share is None else f", {end.causal_share:.0%} CLM"
    return f"{end.size} {end.plan}" + (f"{share}, {end.steps:,} steps" if end.objective == "both" else "")


def _split(evidence: Evidence) -> Any:
    both = {
        (known.size, known.steps, known.ratio)
        for known in evidence.facts.values()
        if known.is_finished and not known.added_steps and known.causal_share and known.objective == "both"
    }
    series: dict[str, dict[str, list[Point]]] = {}
    for size, steps, ratio in sorted(both):

        def place(facts: Facts) -> tuple[str, float] | None:
            plans = ("clm", f"mlm{ratio:g}", f"clm > mlm{ratio:g}")  # noqa: B023
            fits = (facts.size, facts.steps) == (size, steps) and facts.plan in plans  # noqa: B023
            if not fits or facts.causal_share is None or not facts.is_finished or facts.added_steps:
                return None
            return f"{size}, {steps:,} steps, MLM {ratio:g}", facts.causal_share  # noqa: B023

        for family, own in _series(evidence, place).items():
            series.setdefault(family, {}).update(own)
    return _lines(evidence, series, "share of the steps that is CLM")


def _continued(evidence: Evidence) -> Any:
    pairs = {(_start(facts), facts.plan.split(" + ")[1]) for facts in evidence.facts.values() if facts.added_steps}
    series: dict[str, dict[str, list[Point]]] = {}
    for start, added in sorted(pairs, key=str):

        def place(facts: Facts) -> tuple[str, float] | None:
            goes_on = not facts.added_steps or facts.plan.split(" + ")[1] == added  # noqa: B023
            if not facts.is_finished or _start(facts) != start or not goes_on:  # noqa: B023
                return None
            size, plan, steps, share = start  # noqa: B023
            first = f", {share:.0%} CLM" if share and share < 1 else ""
            return f"{size} {plan}{first} of {steps:,} steps, then {added}", facts.added_steps  # noqa: B023

        for family, own in _series(evidence, place).items():
            series.setdefault(family, {}).update(own)
    return _lines(evidence, series, "steps added")


def _start(facts: Facts) -> tuple[str, str, int, float | None]:
    """Size, plan, steps and share of CLM of the finished model that it goes on from; of one that does not, its own."""
    return facts.size, facts.plan.split(" + ")[0], facts.steps - facts.added_steps, facts.causal_share


def _cost(evidence: Evidence) -> Any:
    finished = [model for model in evidence.finished() if model in evidence.facts]
    if len(finished) < 2:  # noqa: PLR2004 - a point alone says nothing
        return None
    figure, axes = _panels(evidence.shown)
    for axis, family in zip(axes, evidence.shown, strict=False):
        for objective, color in COLOR_OF.items():
            own = [m for m in finished if evidence.facts[m].objective == objective and (m, family) in evidence.families]
            if own:
                scores = [evidence.families[model, family] for model in own]
                costs = [evidence.facts[model].flops for model in own]
                means, widths = [100 * score.mean for score in scores], [_width(score) for score in scores]
                name = CALLED[objective]
                axis.errorbar(costs, means, yerr=widths, fmt="o", color=color, capsize=3, label=name)
        _logarithmic(axis, (evidence.facts[model].flops for model in finished))
        axis.set_xlabel("training FLOPs")
        axis.set_ylabel(f"{METRICS[family]}, %")
    _legend(figure, axes[0])
    return figure


def _rates(evidence: Evidence) -> Any:
    tasks = [score for score in evidence.tasks if len(score.by_rate) > 1 and score.model in evidence.finished()]
    families = [family for family in evidence.shown if any(score.family == family for score in tasks)]
    if not families:
        return None
    models = list(dict.fromkeys(score.model for score in tasks))
    figure, axes = _panels(families)
    for axis, family in zip(axes, families, strict=False):
        told: set[str] = set()
        for number, model in enumerate(models):
            mine = [score for score in tasks if (score.family, score.model) == (family, model)]
            rates = sorted(set.intersection(*(set(score.by_rate) for score in mine))) if mine else []
            means = [100 * sum(score.by_rate[rate] for score in mine) / len(mine) for rate in rates]
            name, color = _called(evidence, model, number, len(models))
            axis.plot(rates, means, "o-", color=color, label=None if name in told else name, markersize=3, linewidth=1)
            told.add(name)
        _logarithmic(axis, (rate for score in tasks for rate in score.by_rate if score.family == family))
        axis.set_xlabel("learning rate of the fine-tuning")
        axis.set_ylabel(f"{METRICS[family]}, %")
    _legend(figure, axes[0])
    return figure


def _called(evidence: Evidence, model: str, number: int, models: int) -> tuple[str, str]:
    """Name and color of a line: the model's own, or where there are many that of its objective."""
    known = evidence.facts.get(model)
    if models < MANY or known is None:
        return model, COLORS[number % len(COLORS)]
    return CALLED[known.objective], COLOR_OF[known.objective]
