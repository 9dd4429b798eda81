"""Which checkpoints are kept: the newest few, some for ever, and every one that a run has branched from."""

import json
import os
import shutil
from pathlib import Path

from megatron_ext.checkpoint_files import complete_checkpoints, read_run_file, step_of
from megatron_ext.config import CheckpointConfig, RunConfig
from megatron_ext.errors import UserError, one_line, warn
from megatron_ext.objective import PhasePlan
from megatron_ext.train.publication import remove_checkpoint

KEPT = "kept"
"""Key of `run.json`: the checkpoint was saved to be kept for ever."""

BRANCHES = "branches"
"""Folder in a checkpoint with a file for each run that started from it."""


def is_saved(config: CheckpointConfig, plan: PhasePlan, step: int) -> bool:
    """Whether the run saves after `step` completed steps: at its interval, and wherever a checkpoint is kept for ever."""
    return is_due(step, config.interval) or is_kept(config, plan, step)


def is_kept(config: CheckpointConfig, plan: PhasePlan, step: int) -> bool:
    """Whether the checkpoint after `step` steps is kept for ever: phase edges, `keep_every` and `branch_points`."""
    edges = {phase.end_step for phase in plan.phases}
    return step in edges or step in config.branch_points or is_due(step, config.keep_every)


def remove_old_checkpoints(folder: Path, config: CheckpointConfig, plan: PhasePlan) -> None:
    """Keep the newest `keep_last` checkpoints besides those that are kept for ever; 0 keeps all.

    A checkpoint that was saved to be kept for ever is, whatever the configuration says by now.
    """
    if not config.keep_last:
        return
    passing = [path for path in complete_checkpoints(folder) if not is_kept(config, plan, step_of(path)) and not _branches(path)]
    for path in passing[: -config.keep_last]:
        try:
            if not read_run_file(path).get(KEPT, False):
                remove_checkpoint(path)
        except (OSError, UserError) as error:
            warn(f"{path} is not removed ({one_line(error)})")


def note_branch(checkpoint: Path, config: RunConfig) -> None:
    """Leave word in a checkpoint that a run branches from it, so that its own run keeps it."""
    output_dir = Path(config.output_dir).resolve()
    note = {"output_dir": str(output_dir)}
    folder = checkpoint / BRANCHES
    try:
        folder.mkdir(exist_ok=True)
        name = "".join(letter if letter.isalnum() else "-" for letter in str(output_dir))[-200:].strip("-")
        aside = folder / f".{name}.{os.getpid()}"
        aside.write_text(json.dumps(note))
        aside.rename(folder / f"{name}.json")
    except OSError as error:
        warn(f"{checkpoint} cannot be marked as a branch point ({error.strerror}): its own run may remove it")


def _branches(checkpoint: Path) -> list[Path]:
    return list((checkpoint / BRANCHES).glob("*.json"))


def clear_leftovers(folder: Path) -> None:
    """Remove what saves and removals that were interrupted have left; no other process may be training in this folder."""
    for pattern in (".writing-*", ".removing-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def is_due(step: int, interval: int) -> bool:
    """Whether something that is done every `interval` steps, 0 for never, is done after `step` completed steps."""
    return interval > 0 and step % interval == 0
