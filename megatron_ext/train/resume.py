"""Which checkpoint a run continues from, and whether it may."""

from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint_files import complete_checkpoints, step_of
from megatron_ext.config import RunConfig, from_dict
from megatron_ext.errors import UserError
from megatron_ext.objective import PhasePlan
from megatron_ext.train.optimizer import learning_rate
from megatron_ext.train.preflight import RunSetup

FIXED = (
    "data.sequence_length",
    "data.split",
    "data.documents_attend_across",
    "data.restart_positions",
    "training.seed",
    "training.global_batch_size",
    "training.precision",
)
MIXTURE_ONLY = "training.micro_batch_size"


def checkpoint_folder(config: RunConfig) -> Path:
    """Where the run's checkpoints are."""
    return Path(config.output_dir) / "checkpoints"


def find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint to continue from; None starts anew.

    Raises:
        UserError: `resume` names no checkpoint, or the run would mix its checkpoints with those of another.
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
    if existing and (not is_same_run(config, checkpoint) or step_of(existing[-1]) > step_of(checkpoint)):
        raise UserError(
            f"resume is '{config.resume}', but output_dir {config.output_dir} holds checkpoints up to {existing[-1].name}, which "
            "the run would mix with its own: choose another output_dir"
        )
    return checkpoint


def is_same_run(config: RunConfig, checkpoint: Path) -> bool:
    """Whether the checkpoint is one of this output_dir's own; otherwise the run is a branch of another."""
    return checkpoint.resolve().parent == checkpoint_folder(config).resolve()


def check_agreement(checkpoint: Path | None) -> None:
    """All ranks must continue from the same step; the process groups must exist.

    Raises:
        UserError: they see different checkpoints: output_dir is not shared between the machines.
    """
    names: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, checkpoint.name if checkpoint else "none")
    if len(set(names)) > 1:
        raise UserError(f"the ranks see different newest checkpoints ({', '.join(sorted(set(names)))}): output_dir must be shared")


def check_continues(setup: RunSetup, record: dict[str, Any]) -> None:
    """Refuse to continue under a configuration that would change the model, the data, the masks or what was already run.

    Raises:
        UserError: naming the first thing that differs.
    """
    if record["tokenizer"]["fingerprint"] != setup.tokenizer.fingerprint:
        raise UserError(
            f"resume: data.tokenizer {setup.tokenizer.source} is not the tokenizer that the checkpoint was trained with"
        )
    if record["encoder"] != vars(setup.encoder):
        raise UserError(f"resume: model is {vars(setup.encoder)}, but the checkpoint was trained with {record['encoder']}")
    _check_data(setup, record)
    old, new = from_dict(record["config"]).as_dict(), setup.config.as_dict()
    mixes = any(len(phase.weights) > 1 for phase in setup.plan.phases)
    for key in [*FIXED, *([MIXTURE_ONLY] if mixes else [])]:
        before, now = _get(old, key), _get(new, key)
        if before != now:
            raise UserError(f"resume: {key} is {now}, but the checkpoint was trained with {before}")
    _check_plan(setup, record)


def _check_data(setup: RunSetup, record: dict[str, Any]) -> None:
    """The same tokens, wherever they lie."""
    before, now = (
        [(source["split"], source["fingerprint"], source["weight"]) for source in sources]
        for sources in (record["data"], setup.data_record)
    )
    if before != now:
        names = ", ".join(source["prefix"] for source in record["data"])
        raise UserError(f"resume: the data sets or their weights are not those that the checkpoint was trained with ({names})")


def _check_plan(setup: RunSetup, record: dict[str, Any]) -> None:
    """The phases and the learning rate of the steps already run, and the loss that phases are compared by."""
    step, new = record["step"], setup.config
    if step > setup.plan.total_steps:
        raise UserError(f"resume: the checkpoint is at step {step}, but the plan has {setup.plan.total_steps} steps")
    stop = new.training.stop_at_step
    if stop is not None and stop < step:
        raise UserError(f"training.stop_at_step is {stop}, but the checkpoint is at step {step} already")
    old = from_dict(record["config"])
    for phase in setup.plan.phases:
        before = old.phases[phase.index] if phase.index < len(old.phases) else None
        if phase.start_step < step and new.phases[phase.index] != before:
            raise UserError(f"resume: phase {phase.index} is {new.phases[phase.index]}, but it has already run as {before}")
    rates = [learning_rate(config.optimizer, PhasePlan.from_config(config), step - 1) for config in (old, new)]
    if rates[0] != rates[1]:
        raise UserError(
            f"resume: the learning rate of step {step} was {rates[0]:g} and would now be {rates[1]:g}: keep the optimizer section, "
            "or start the new phases with learning_rate: rewarm"
        )
    ratio = comparison_ratio(setup)
    if record["comparison_mask_ratio"] != ratio:
        raise UserError(
            f"resume: validation_mlm_loss was measured at the mask ratio {record['comparison_mask_ratio']} and would now be at "
            f"{ratio}: set validation.mask_ratio {record['comparison_mask_ratio']}"
        )


def comparison_ratio(setup: RunSetup) -> float:
    """Mask ratio of the MLM that phases are compared by, the same through the whole run."""
    return setup.config.validation.mask_ratio or setup.plan.comparison_mask_ratio()


def _get(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
