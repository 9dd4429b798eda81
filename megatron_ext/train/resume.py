"""Which checkpoint a run continues from, and whether it may."""

from pathlib import Path
from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.train.checkpoint import complete_checkpoints
from megatron_ext.train.preflight import RunSetup

FIXED = ("model", "data.sequence_length", "data.train", "data.split", "data.documents_attend_across", "data.restart_positions")
FIXED_TRAINING = ("training.seed", "training.global_batch_size", "training.precision")
MIXTURE_ONLY = "training.micro_batch_size"


def checkpoint_folder(config: RunConfig) -> Path:
    """Where the run's checkpoints are."""
    return Path(config.output_dir) / "checkpoints"


def find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint to continue from; None starts anew.

    Raises:
        UserError: `resume` names no checkpoint, or a new run would write over the checkpoints of another.
    """
    existing = complete_checkpoints(checkpoint_folder(config))
    if config.resume == "auto":
        return existing[-1] if existing else None
    if config.resume == "never":
        if existing:
            raise UserError(
                f"output_dir {config.output_dir} holds checkpoints up to {existing[-1].name}: continue them with --resume auto, "
                "or choose another output_dir"
            )
        return None
    checkpoint = Path(config.resume)
    if not checkpoint.is_dir():
        raise UserError(
            f"resume is '{config.resume}': allowed are never, auto, or the path of a checkpoint, and there is no such path"
        )
    return checkpoint


def check_continues(setup: RunSetup, record: dict[str, Any]) -> None:
    """Refuse to continue under a configuration that would change the model, the data, the masks or the phases already run.

    Raises:
        UserError: naming the first key that differs.
    """
    if record["tokenizer"]["fingerprint"] != setup.tokenizer.fingerprint:
        raise UserError(
            f"resume: data.tokenizer {setup.tokenizer.source} is not the tokenizer that the checkpoint was trained with"
        )
    old, new = record["config"], setup.config.as_dict()
    mixes = any(len(phase.weights) > 1 for phase in setup.plan.phases)
    for key in [*FIXED, *FIXED_TRAINING, *([MIXTURE_ONLY] if mixes else [])]:
        before, now = _get(old, key), _get(new, key)
        if key == "model":
            before, now = record["encoder"], vars(setup.encoder)
        if before != now:
            raise UserError(f"resume: {key} is {now}, but the checkpoint was trained with {before}")
    step = record["step"]
    if step > setup.plan.total_steps:
        raise UserError(f"resume: the checkpoint is at step {step}, but the plan has {setup.plan.total_steps} steps")
    for phase in setup.plan.phases:
        if phase.start_step < step and new["phases"][phase.index] != _phase(old, phase.index):
            raise UserError(
                f"resume: phase {phase.index} is {new['phases'][phase.index]}, but it has already run as {_phase(old, phase.index)}"
            )


def _phase(tree: dict[str, Any], index: int) -> dict[str, Any] | None:
    return tree["phases"][index] if index < len(tree["phases"]) else None


def _get(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
