"""A study's tree and its accounts, as text."""

from megatron_ext.study.accounting import Accountant, Total
from megatron_ext.study.models import Model
from megatron_ext.study.segments import Segment, all_segments

UNITS = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


def render(models: list[Model], roots: list[Segment], accountant: Accountant) -> list[str]:
    """The tree, then the accounts by family and in all."""
    segments = all_segments(roots)
    lines = [f"{accountant.study.name}: {len(models)} models, {len(segments)} segments", ""]
    for root in roots:
        lines += _draw(root, accountant, "", "")
    return [*lines, "", *_accounts(models, roots, accountant)]


def _draw(segment: Segment, accountant: Accountant, first: str, others: str) -> list[str]:
    total = accountant.part(segment.size, segment.part)
    ends = f"  = {', '.join(model.name for model in segment.models)}" if segment.models else ""
    size = f"{segment.size} " if not first else ""
    span = f"{segment.start_step:,} to {segment.end_step:,}"
    hours = "" if total.gpu_hours is None else f", {total.gpu_hours:,.0f} GPU-hours"
    lines = [
        f"{first}{size}{segment.part.label}: steps {span}, {_short(total.tokens)} tokens, {_short(total.flops)}FLOP{hours}{ends}"
    ]
    for number, child in enumerate(segment.children):
        is_last = number == len(segment.children) - 1
        lines += _draw(child, accountant, f"{others}{'└─ ' if is_last else '├─ '}", f"{others}{'   ' if is_last else '│  '}")
    return lines


def _accounts(models: list[Model], roots: list[Segment], accountant: Accountant) -> list[str]:
    with_hours = accountant.seconds_per_step is not None
    lines = [_row("", "models", "steps", "tokens", "FLOPs", *(["GPU-hours"] if with_hours else []))]
    before: list[Model] = []
    for family in dict.fromkeys(model.family for model in models):
        own = [model for model in models if model.family == family]
        alone = accountant.models(own)
        shared = accountant.below(own, roots, before)
        lines.append(_total_row(f"{family}, each model alone", len(own), alone))
        lines.append(_total_row(f"{family}, what is new", len(own), shared))
        before += own
    naive = accountant.models(models)
    once = accountant.segments(all_segments(roots))
    lines.append(_total_row("all, each model alone", len(models), naive))
    lines.append(_total_row("all, every segment once", len(models), once))
    lines.append(
        f"shared: {1 - once.steps / naive.steps:.0%} of the steps and {1 - once.flops / naive.flops:.0%} of the FLOPs are saved"
    )
    return lines


def _total_row(name: str, models: int, total: Total) -> str:
    hours = [] if total.gpu_hours is None else [f"{total.gpu_hours:,.0f}"]
    return _row(name, str(models), f"{total.steps:,}", _short(total.tokens), _short(total.flops), *hours)


def _row(name: str, *cells: str) -> str:
    return f"{name:32}" + "".join(f"{cell:>12}" for cell in cells)


def _short(value: float) -> str:
    size, unit = next(((size, unit) for size, unit in UNITS if value >= size), (1.0, ""))
    return f"{value / size:.3g}{unit}"
