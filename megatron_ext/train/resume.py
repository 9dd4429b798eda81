"""Which checkpoint a run continues from, and whether every byte of it is as it was written."""

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_ext.checkpoint_files import complete_checkpoints, find_damage, step_of
from megatron_ext.config import RunConfig
from megatron_ext.errors import UserError, warn
from megatron_ext.train.retention import DAMAGED, clear_leftovers, set_aside


def checkpoint_folder(config: RunConfig) -> Path:
    """Where the run's checkpoints are."""
    return Path(config.output_dir) / "checkpoints"


def check_resume(config: RunConfig) -> None:
    """Look at what `resume` asks for, before any process group exists.

    Raises:
        UserError: it names no checkpoint, or the run would mix its checkpoints with those of another.
    """
    existing = complete_checkpoints(checkpoint_folder(config))
    if config.resume == "never" and existing:
        raise UserError(
            f"output_dir {config.output_dir} holds checkpoints up to {existing[-1].name}: continue them with --resume auto, "
            "or choose another output_dir"
        )
    if config.resume in ("auto", "never"):
        return
    checkpoint = Path(config.resume)
    if not checkpoint.is_dir():
        raise UserError(
            f"resume is '{config.resume}': allowed are never, auto, or the path of a checkpoint, and there is no such path"
        )
    if existing and (not is_same_run(config, checkpoint) or step_of(existing[-1]) > step_of(checkpoint)):
        raise UserError(
            f"resume is '{config.resume}', but output_dir {config.output_dir} holds checkpoints up to {existing[-1].name}, which "
            "the run would mix with its own: choose another output_dir"
        )


def is_same_run(config: RunConfig, checkpoint: Path) -> bool:
    """Whether the checkpoint is one of this output_dir's own; otherwise the run is a branch of another."""
    return checkpoint.resolve().parent == checkpoint_folder(config).resolve()


def choose_checkpoint(config: RunConfig, mark: Callable[[str], None]) -> Path | None:
    """The newest sound checkpoint, or the one that `resume` names; None starts anew. All ranks call it together.

    With `resume: auto` a damaged checkpoint is renamed, so that it is never taken for whole, and the one before is looked at.

    Args:
        config: of the run.
        mark: called before each checkpoint is read, which may take long.

    Raises:
        UserError: the one that was asked for is damaged, or all are; or the ranks do not see the same folder.
    """
    folder = checkpoint_folder(config)
    if torch.distributed.get_rank() == 0:
        clear_leftovers(folder)
    if config.resume == "never":
        return None
    if config.resume != "auto":
        checkpoint = Path(config.resume)
        mark(f"reading {checkpoint}")
        damage = check_files(checkpoint)
        if damage:
            raise UserError(f"checkpoint {checkpoint} is damaged: {damage}")
        return checkpoint
    return _newest_sound(folder, mark)


def _newest_sound(folder: Path, mark: Callable[[str], None]) -> Path | None:
    candidates = complete_checkpoints(folder)
    _check_agreement(candidates)
    last_damage = ""
    for checkpoint in reversed(candidates):
        mark(f"reading {checkpoint}")
        damage = check_files(checkpoint)
        if not damage:
            return checkpoint
        if torch.distributed.get_rank() == 0:
            aside = set_aside(checkpoint)
            warn(f"checkpoint {checkpoint} is damaged and is now called {aside.name}: {damage}")
        last_damage = f", the oldest is {checkpoint.name}: {damage}"
    damaged = [sorted(path.name for path in folder.glob(f"{DAMAGED}*"))]
    torch.distributed.broadcast_object_list(damaged)  # as rank 0 sees it, which has renamed them
    if damaged[0]:  # just now, or by an attempt before this one: torchrun starts a run that failed again
        raise UserError(
            f"resume: every checkpoint in {folder} is damaged (now called {', '.join(damaged[0])}){last_damage}; to start anew, "
            "choose another output_dir"
        )
    return None


def check_files(checkpoint: Path) -> str:
    """What is damaged in a checkpoint, empty if nothing is; the ranks divide its files and call this together."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: list[list[str]] = [[]] * ranks
    torch.distributed.all_gather_object(found, find_damage(checkpoint, rank, ranks))
    return "; ".join(dict.fromkeys(line for lines in found for line in lines))


def _check_agreement(candidates: list[Path]) -> None:
    names: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, candidates[-1].name if candidates else "none")
    if len(set(names)) > 1:
        raise UserError(f"the ranks see different newest checkpoints ({', '.join(sorted(set(names)))}): output_dir must be shared")
