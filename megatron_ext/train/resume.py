"""Which checkpoint a run continues from, and whether every byte of it is as it was written."""

from collections.abc import Callable, Collection
from pathlib import Path

import torch

from megatron_ext.checkpoint_files import complete_checkpoints, find_damage, published_checkpoints, read_run_file, step_of
from megatron_ext.config import RunConfig
from megatron_ext.errors import UnreadableError, UserError, warn
from megatron_ext.train.publication import DAMAGED, set_aside
from megatron_ext.train.retention import clear_leftovers


def checkpoint_folder(config: RunConfig) -> Path:
    """Where the run's checkpoints are."""
    return Path(config.output_dir) / "checkpoints"


def check_resume(config: RunConfig) -> None:
    """Look at what `resume` asks for, before any process group exists.

    Raises:
        UserError: it names no checkpoint, or the run would mix its checkpoints with those of another.
    """
    existing = published_checkpoints(checkpoint_folder(config))
    if config.resume == "never" and existing:
        raise UserError(
            f"output_dir {config.output_dir} holds checkpoints up to {existing[-1].name}: continue them with --resume auto, "
            "or choose another output_dir"
        )
    if config.resume == "never" or goes_on(config):
        return
    checkpoint = Path(config.resume)
    if not checkpoint.is_dir():
        raise UserError(
            f"resume is '{config.resume}': allowed are never, auto, or the path of a checkpoint, and there is no such path"
        )
    if not read_run_file(checkpoint)["phases"]:
        raise UserError(f"resume is '{config.resume}', which was imported, not trained: begin with its weights (model.checkpoint)")
    if existing and (not is_same_run(config, checkpoint) or step_of(existing[-1]) > step_of(checkpoint)):
        raise UserError(
            f"resume is '{config.resume}', but output_dir {config.output_dir} holds checkpoints up to {existing[-1].name}, which "
            "the run would mix with its own: choose another output_dir"
        )


def is_same_run(config: RunConfig, checkpoint: Path) -> bool:
    """Whether the checkpoint is one of this output_dir's own; otherwise the run is a branch of another."""
    return checkpoint.resolve().parent == checkpoint_folder(config).resolve()


def goes_on(config: RunConfig) -> bool:
    """Whether the run continues what is in its output_dir: it is told to, or has begun the branch that `resume` starts."""
    existing = complete_checkpoints(checkpoint_folder(config))
    if config.resume in ("auto", "never") or not existing:
        return config.resume == "auto"
    try:
        parent = read_run_file(existing[-1])["parent"]
    except UserError:
        return False
    return parent is not None and Path(parent["checkpoint"]).resolve() == Path(config.resume).resolve()


def choose_checkpoint(config: RunConfig, mark: Callable[[str], None]) -> Path | None:
    """The newest sound checkpoint, or the one that `resume` names; None starts anew. All ranks call it together.

    Where a run goes on by itself a damaged checkpoint is renamed, so that it is never taken for whole, and the one before is
    looked at.

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
    if not goes_on(config):
        checkpoint = Path(config.resume)
        require_sound(checkpoint, mark)
        return checkpoint
    return _newest_sound(folder, mark)


def require_sound(checkpoint: Path, mark: Callable[[str], None]) -> None:
    """Read every byte of a checkpoint that a run cannot do without; all ranks call it together.

    Raises:
        UserError: it is damaged.
    """
    mark(f"reading {checkpoint}")
    damage = check_files(checkpoint)
    if damage:
        raise UserError(f"checkpoint {checkpoint} is damaged: {damage}")


def _newest_sound(folder: Path, mark: Callable[[str], None]) -> Path | None:
    candidates = published_checkpoints(folder)
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
    """What is damaged in a checkpoint, empty if nothing is; the ranks divide its files and call this together.

    Raises:
        UserError: on all ranks, if some rank cannot say, or sees other files than rank 0.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: list[tuple[dict[str, str], str]] = [({}, "")] * ranks
    torch.distributed.all_gather_object(found, _look(checkpoint, rank, ranks))
    _refuse_unreadable(found)
    damage = {name: line for lines, _ in found for name, line in lines.items()}
    if not damage:
        return ""
    # A file that one machine does not see, or sees otherwise, is no damage: rank 0 looks again.
    seen = [_look(checkpoint, only=damage.keys()) if rank == 0 else ({}, "")]
    torch.distributed.broadcast_object_list(seen)
    _refuse_unreadable(seen)
    if not seen[0][0]:
        raise UserError(f"the ranks see different files in {checkpoint} ({'; '.join(damage.values())}): it must be shared")
    return "; ".join(seen[0][0].values())


def _look(checkpoint: Path, *share: int, **only: Collection[str]) -> tuple[dict[str, str], str]:
    """Damage, and why it cannot be said."""
    try:
        return find_damage(checkpoint, *share, **only), ""
    except UnreadableError as error:
        return {}, str(error)


def _refuse_unreadable(found: list[tuple[dict[str, str], str]]) -> None:
    reasons = [reason for _, reason in found if reason]
    if reasons:
        raise UserError(f"resume: {reasons[0]}; no checkpoint was renamed for it")


def _check_agreement(candidates: list[Path]) -> None:
    seen: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(seen, [path.name for path in candidates])
    if any(names != seen[0] for names in seen):
        newest = sorted({names[-1] if names else "none" for names in seen})
        raise UserError(f"the ranks see different checkpoints (the newest: {', '.join(newest)}): output_dir must be shared")
