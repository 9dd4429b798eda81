"""Does AdamW's own count of its steps agree with the run's? It decides how much the first moments are corrected after a resume."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_ext.doctor.report import Report
from megatron_ext.objective import PhasePlan


def check_optimizer_steps(checkpoint: Path, record: dict[str, Any], plan: PhasePlan, found: Report) -> None:
    """AdamW counts its steps since the last phase that reset it, but not the skipped ones, whose places nobody kept."""
    from megatron_ext.unpickling import COMMON_FILE, read_common

    if COMMON_FILE not in record["files"] and not (checkpoint / COMMON_FILE).exists():
        found.notes.append(f"there is no {COMMON_FILE}, as megatron-core 0.19 writes none: AdamW's step count was not checked")
        return
    step, skipped = record["step"], record.get("skipped_steps", 0)
    resets = [phase.start_step for phase in plan.phases if phase.resets_optimizer and phase.start_step < step]
    expected = step - max(resets, default=0)
    counted = _step_counts(read_common(checkpoint))
    # One number in all groups; none if there was no step to count.
    if len(counted) > 1 or not expected - skipped <= next(iter(counted), 0) <= expected:
        has = ", ".join(map(str, sorted(counted))) or "nothing"
        less = f" (or up to {skipped} less, for {skipped} skipped in the whole run)" if skipped else ""
        found.problems.append(f"AdamW has counted {has} as its steps, {expected}{less} since its last reset are expected")


def _step_counts(common: dict[Any, Any]) -> set[int]:
    """The `step` of every parameter group in a nested state, which may be of any form and even hold itself."""
    counts, seen, waiting = set(), set(), [common]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        waiting += [inner for inner in _inner(value) if isinstance(inner, dict | list | tuple)]
        groups = value.get("param_groups") if isinstance(value, dict) else None
        counts |= {_number(group["step"]) for group in _inner(groups) if isinstance(group, dict) and "step" in group}
    return counts


def _inner(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()


def _number(count: Any) -> int:
    """A whole number, also one in a tensor; -1 for what counts nothing."""
    try:
        return int(count)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return -1
