"""From the search to advice: the best few, the block for the YAML, and for each road not taken the reason."""

from collections.abc import Callable
from typing import Any

from megatron_ext.plan.search import Candidate, Search

PAYS = 1.15
"""FP8 must be predicted this much faster than bfloat16 to be recommended: about twice the model's median error."""
TIE = 0.03
HOURS = 3600.0


def choose(result: Search, fp8_pays: float = PAYS) -> list[Candidate]:
    """The candidates from best to worst.

    FP8 ones stand behind bfloat16 unless the fastest of them gains enough. Of those within `TIE` of the fastest, which the model
    cannot tell apart, the simplest comes first: least model parallelism, then the faster.
    """
    in_fp8 = fp8_gain(result) >= fp8_pays
    ordered = sorted(result.found, key=lambda c: (c.precision.is_fp8 is not in_fp8, c.seconds))
    tied = [c for c in ordered if c.precision.is_fp8 is in_fp8 and c.seconds <= ordered[0].seconds * (1 + TIE)]
    first = min(tied, key=lambda c: (c.layout.world_size // c.layout.data, c.seconds))
    return [first, *(c for c in ordered if c is not first)]


def fp8_gain(result: Search) -> float:
    """Speed of the fastest FP8 candidate over that of the fastest bfloat16 one; 0 without FP8, infinite if only FP8 fits."""
    fp8, bf16 = (_fastest(result, lambda c, wanted=wanted: c.precision.is_fp8 is wanted) for wanted in (True, False))
    if fp8 is None:
        return 0.0
    return float("inf") if bf16 is None else bf16.seconds / fp8.seconds


def _fastest(result: Search, condition: Callable[[Candidate], bool]) -> Candidate | None:
    return next((candidate for candidate in result.found if condition(candidate)), None)


def reasons(result: Search, best: Candidate) -> list[str]:
    """Why each other kind of layout loses, one line a kind."""
    lines = [_about_fp8(result, best)] if result.gpu.fp8_peak else [f"FP8: {result.gpu.name} has none"]
    same = best.precision.recipe
    for name, field, parts in (
        ("tensor parallelism", "tensor", ("tensor",)),
        ("pipeline parallelism", "pipeline", ("bubble", "pipeline")),
        ("context parallelism", "context", ("context",)),
    ):
        lines.append(_about_size(result, best, name, field, parts, same))
    lines.append(_about_batches(result, best, same))
    lines.append(_about_room(result))
    lines += [f"refused: {count} layouts, e.g. {words}" for count, words in result.refused.values()]
    return [line for line in lines if line]


def _about_fp8(result: Search, best: Candidate) -> str:
    gain = fp8_gain(result)
    hidden = best.predictions[0][1].work.shape.hidden
    fp8 = _fastest(result, lambda c: c.precision.is_fp8)
    if fp8 is None:
        return "FP8: no layout has sizes that FP8 products take, or none fits"
    if best.precision.is_fp8:
        return f"BF16: {gain:.2f}x slower; FP8 pays at hidden size {hidden}" if gain < float("inf") else "BF16: does not fit"
    return (
        f"FP8 ({fp8.precision.recipe}): predicted {gain:.2f}x, below {PAYS}: does not pay at hidden size {hidden} and sequence "
        f"length {result.config.data.sequence_length} (casts and attention stay; the model errs by as much)"
    )


def _about_size(result: Search, best: Candidate, name: str, field: str, parts: tuple[str, ...], recipe: str) -> str:
    """Of candidates that use one more kind of parallelism than the best one, or less of it."""
    size = getattr(best.parallel, field)
    more = _fastest(result, lambda c: getattr(c.parallel, field) > size and c.precision.recipe == recipe)
    less = _fastest(result, lambda c: getattr(c.parallel, field) < size and c.precision.recipe == recipe)
    words = []
    if more is not None:
        detail = f"{100 * more.share(*parts):.1f} % of its time is exposed or idle"
        words.append(f"{getattr(more.parallel, field)} is {_compare(more, best)} ({detail})")
    if less is not None:
        words.append(f"{getattr(less.parallel, field)} is {_compare(less, best)}")
    return f"{name}: {', '.join(words)}" if words else ""


def _compare(other: Candidate, best: Candidate) -> str:
    slower = 100 * (other.seconds / best.seconds - 1)
    return f"{slower:.1f} % slower" if slower >= 0 else f"{-slower:.1f} % faster, a tie: the simpler one is taken"


def _about_batches(result: Search, best: Candidate, recipe: str) -> str:
    def same(candidate: Candidate) -> bool:
        return candidate.layout == best.layout and candidate.precision.recipe == recipe

    micro = best.training.micro_batch_size
    words = []
    smaller = _fastest(result, lambda c: same(c) and c.training.micro_batch_size < micro)
    if smaller is not None:
        words.append(f"{smaller.training.micro_batch_size} is {_compare(smaller, best)}")
    larger = _fastest(result, lambda c: same(c) and c.training.micro_batch_size > micro)
    if larger is not None:
        again = f", recomputing ({larger.training.recompute})" if larger.training.recompute != "none" else ""
        words.append(f"{larger.training.micro_batch_size} is {_compare(larger, best)}{again}")
    return f"micro-batch: {', '.join(words)}" if words else ""


def _about_room(result: Search) -> str:
    if not result.too_large:
        return ""
    nearest = min(result.too_large, key=lambda candidate: candidate.memory.total)
    return (
        f"does not fit: {len(result.too_large)} of {len(result.too_large) + len(result.found)}; the nearest, {nearest.layout} with "
        f"micro-batch {nearest.training.micro_batch_size} and recompute {nearest.training.recompute}, needs "
        f"{nearest.memory.total / 2**30:.1f} of {result.room / 2**30:.1f} GiB"
    )


def as_dict(result: Search, best: list[Candidate]) -> dict[str, Any]:
    """The recommendation as plain values."""
    return {
        "gpu": result.gpu.name,
        "calibrated": result.gpu.calibrated,
        "measured": False,
        "gpus": result.gpus,
        "best": [figures_of(result, candidate) for candidate in best],
        "reasons": reasons(result, best[0]),
    }


def figures_of(result: Search, candidate: Candidate) -> dict[str, Any]:
    """A candidate's figures: seconds, tokens/s of one GPU, bytes, and the fields to set."""
    return {
        "layout": str(candidate.layout),
        "set": settings(result, candidate),
        "tokens_per_second_per_gpu": candidate.tokens_per_second,
        "tokens_per_second": candidate.tokens_per_second * result.gpus,
        "mfu": candidate.mfu,
        "memory_bytes": candidate.memory.total,
        "days": candidate.seconds / HOURS / 24,
        "gpu_hours": candidate.seconds / HOURS * result.gpus,
        "phases": [
            {
                "phase": work.phase,
                "objective": work.objective,
                "steps": work.steps,
                "seconds_per_step": prediction.seconds,
                "tokens_per_second_per_gpu": prediction.tokens_per_second,
                "mfu": prediction.mfu,
                "seconds_by_part": vars(prediction.parts),
            }
            for work, prediction in candidate.predictions
        ],
    }


def settings(result: Search, candidate: Candidate) -> dict[str, dict[str, Any]]:
    """The sections of the configuration that a candidate decides."""
    training = {"micro_batch_size": candidate.training.micro_batch_size, "recompute": candidate.training.recompute}
    precision = {"recipe": candidate.precision.recipe}
    for name in ("emulation", "fp8_parameters"):  # what the configuration says of another recipe may not hold for this one
        if getattr(result.config.precision, name) != getattr(candidate.precision, name):
            precision[name] = getattr(candidate.precision, name)
    sections = {"parallel": dict(vars(candidate.parallel)), "precision": precision, "training": training}
    validation = result.config.validation
    layout = candidate.layout
    multiple = candidate.training.micro_batch_size * layout.data * (layout.pipeline if layout.virtual_pipeline > 1 else 1)
    if validation.interval and validation.samples % multiple:
        sections["validation"] = {"samples": -(-validation.samples // multiple) * multiple}
    return sections


def yaml_block(sections: dict[str, dict[str, Any]]) -> list[str]:
    """The sections as lines of YAML."""
    lines = []
    for name, fields in sections.items():
        lines.append(f"{name}:")
        for field, value in fields.items():
            lines.append(f"  {field}: {str(value).lower() if isinstance(value, bool) else value}")
    return lines


def render(result: Search, best: list[Candidate]) -> list[str]:
    """The recommendation for people."""
    state = "calibrated on published H100 runs" if result.gpu.calibrated else "by its data sheet, NOT calibrated"
    lines = [
        f"{result.gpus} x {result.gpu.name} ({state}), global batch {result.config.training.global_batch_size} x "
        f"{result.config.data.sequence_length}, {best[0].tokens / 1e9:.1f}B tokens; predicted, not measured",
        "",
        f"{'':3}{'layout':28}{'micro':>6}{'recompute':>11}{'recipe':>16}{'tokens/s/GPU':>14}{'MFU':>7}{'GiB':>7}{'days':>9}"
        f"{'GPU-hours':>11}",
    ]
    for number, candidate in enumerate(best, start=1):
        figures = figures_of(result, candidate)
        lines.append(
            f"{number:<3}{figures['layout']:28}{candidate.training.micro_batch_size:>6}{candidate.training.recompute:>11}"
            f"{candidate.precision.recipe:>16}{candidate.tokens_per_second:>14,.0f}{100 * candidate.mfu:>6.1f}%"
            f"{candidate.memory.total / 2**30:>7.1f}{figures['days']:>9.2f}{figures['gpu_hours']:>11,.0f}"
        )
    lines += ["", "steps of the first:"]
    for work, prediction in best[0].predictions:
        total = prediction.seconds
        parts = ", ".join(
            f"{name.replace('_', ' ')} {100 * s / total:.0f} %" for name, s in vars(prediction.parts).items() if s > total / 200
        )
        lines.append(f"  {work.phase} {work.objective}: {work.steps:,.0f} steps of {total:.3f} s: {parts}")
    lines += ["", "why not the others:", *(f"  {reason}" for reason in reasons(result, best[0]))]
    return [*lines, "", "for the YAML:", "", *yaml_block(settings(result, best[0]))]
