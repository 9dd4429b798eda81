"""How far a study is: its tree with a mark and the steps of each segment."""

import json
from pathlib import Path

from megatron_ext.study.segment_run import SegmentRun, trained_steps

MARKS = {"done": "x", "part": "~", "waiting": " "}


def newest_step(run: SegmentRun) -> int:
    """The last step that the run has reported, saved or not; where its checkpoints are if it has reported none."""
    file = run.folder / "metrics.jsonl"
    reported = _last_step(file) if file.exists() else 0
    return max(reported, run.segment.start_step + trained_steps(run))


def _last_step(file: Path) -> int:
    with open(file, "rb") as lines:
        lines.seek(max(0, file.stat().st_size - 65536))
        for line in reversed(lines.read().splitlines()):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):  # the first line may be cut, the last half written
                continue
    return 0


def made_steps(run: SegmentRun) -> int:
    """Of the segment."""
    return run.segment.part.steps if run.is_done else max(0, newest_step(run) - run.segment.start_step)


def render_status(runs: list[SegmentRun]) -> list[str]:
    """The tree, a line for each segment, and a sum."""
    lines, done_steps, all_steps = [], 0, 0
    for run in runs:
        steps = run.segment.part.steps
        made = made_steps(run)
        state = "done" if run.is_done else "part" if made else "waiting"
        done_steps, all_steps = done_steps + made, all_steps + steps
        ends = f"  = {', '.join(model.name for model in run.segment.models)}" if run.segment.models else ""
        head = f"{run.segment.size} " if len(run.path) == 1 else "   " * (len(run.path) - 1)
        lines.append(
            f"[{MARKS[state]}] {head}{run.segment.part.label} to {run.segment.end_step:,}: {made:,} of {steps:,} steps{ends}"
        )
    finished = sum(run.is_done for run in runs)
    share = done_steps / all_steps if all_steps else 1.0
    return [*lines, "", f"{finished} of {len(runs)} segments, {done_steps:,} of {all_steps:,} steps ({share:.0%})"]
