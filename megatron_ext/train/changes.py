"""How a run's configuration differs from that of the checkpoint it continues, and which differences are refused."""

import itertools
import re
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.config import PrecisionConfig, RunConfig
from megatron_ext.config_reading import from_dict
from megatron_ext.errors import UserError
from megatron_ext.model.presets import STORED, EncoderConfig
from megatron_ext.objective import PhasePlan
from megatron_ext.train.optimizer import learning_rate
from megatron_ext.train.preflight import RunSetup
from megatron_ext.tree import flatten

GUARDED = {
    "data.sequence_length": "the data",
    "data.split": "the data",
    "data.train": "the data",
    "data.validation": "the validation data",
    "data.tokenizer": "the data",
    "data.documents_attend_across": "what each token sees",
    "data.restart_positions": "the position of each token",
    "training.seed": "data order and masks",
    "training.global_batch_size": "which samples a step consumes",
    **{f"precision.{name}": "the numbers that the model computes with" for name in vars(PrecisionConfig())},
    "validation.mask_ratio": "the loss that phases are compared by",
    "optimizer": "the learning rate of the steps already run",
}
"""What a difference would change silently, by field. Refused unless `resume_changes` names the field."""

MIXTURE_FIELD = "training.micro_batch_size"
UNTOLD = re.compile(
    r"(output_dir|resume|resume_changes|phases|model|optimizer|data\.(train|validation|split|tokenizer)|validation\.mask_ratio)(\..*)?"
)
"""Fields that are compared by what they resolve to, or whose difference needs no word."""


@dataclass(frozen=True)
class Change:
    """A field that differs from the checkpoint's."""

    field: str
    before: Any
    now: Any
    effect: str = ""
    """What would silently change; empty if nothing would."""
    final: bool = False
    """It cannot be overridden."""

    def __str__(self) -> str:
        effect = f" (changes {self.effect})" if self.effect else ""
        return f"{self.field} was {self.before} and is {self.now}{effect}"


def check_changes(setup: RunSetup, record: dict[str, Any]) -> list[Change]:
    """Compare a run with the checkpoint that it continues.

    Args:
        setup: the run.
        record: `run.json` of the checkpoint.

    Returns:
        All differences, none of which is refused.

    Raises:
        UserError: naming every difference that would change data, masks, model or schedule and is not named in
            `resume_changes`; or the checkpoint is beyond the end of the run.
    """
    _check_end(setup, record)
    changes = find_changes(setup, record)
    allowed = set(setup.config.resume_changes)
    _check_names(allowed, setup)
    refused = [change for change in changes if change.effect and (change.final or change.field not in allowed)]
    if refused:
        fields = [change.field for change in refused if not change.final]
        hint = f"; if that is meant, name them: --resume_changes '[{', '.join(fields)}]'" if fields else ""
        if any(change.field == "optimizer" for change in refused):
            hint = "; keep the optimizer section, or start the new phases with learning_rate: rewarm" + hint
        raise UserError(f"resume: {'; '.join(map(str, refused))}, unlike the checkpoint's{hint}")
    return changes


def find_changes(setup: RunSetup, record: dict[str, Any]) -> list[Change]:
    """All differences between a run and the checkpoint that it continues, refused or not."""
    old = from_dict(record["config"])
    before, now = flatten(old.public_dict()), flatten(setup.config.public_dict())
    mixes = any(len(phase.weights) > 1 for phase in setup.plan.phases)
    effects = {**GUARDED, **({MIXTURE_FIELD: "which objective a sample is under"} if mixes else {})}
    plain = [
        Change(name, before.get(name), now.get(name), effects.get(name, ""), _changes_storage(name, before, now))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not UNTOLD.fullmatch(name)
    ]
    resolved = [*_model(setup, record), *_data(setup, record, old), *_phases(setup, record, old), *_ratio(setup, record)]
    return [*resolved, *plain]


def _changes_storage(name: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """float32 and bfloat16 are stored differently, as shapes are; an FP8 recipe may be changed during a run."""
    return name == "precision.recipe" and "fp32" in (before.get(name), now.get(name))


def as_records(changes: list[Change], step: int) -> list[dict[str, Any]]:
    """What `run.json` keeps of the differences that a run was continued with."""
    return [{"step": step, **asdict(change)} for change in changes]


def _model(setup: RunSetup, record: dict[str, Any]) -> list[Change]:
    new, old = vars(setup.encoder), vars(EncoderConfig(**record["encoder"]))
    effects = {name: "the model" for name in new if name != "init_std"}  # which only new weights are drawn with
    changes = [
        Change(f"model.{name}", old.get(name), value, effects.get(name, ""), name in STORED)
        for name, value in new.items()
        if old.get(name) != value
    ]
    if record["vocab_size"] != setup.vocab_size:
        changes.append(Change("model.vocab_size", record["vocab_size"], setup.vocab_size, "the model", True))
    return changes


def _data(setup: RunSetup, record: dict[str, Any], old: RunConfig) -> list[Change]:
    """The same tokens, wherever they lie."""
    changes = []
    if record["tokenizer"]["fingerprint"] != setup.tokenizer.fingerprint:
        prints = (record["tokenizer"]["fingerprint"][:12], setup.tokenizer.fingerprint[:12])
        changes.append(Change("data.tokenizer", *prints, GUARDED["data.tokenizer"]))
    if old.data.split != setup.config.data.split:
        changes.append(Change("data.split", old.data.split, setup.config.data.split, GUARDED["data.split"]))
    for split, field in (("train", "data.train"), ("validation", "data.validation")):
        sets = [[_set(source) for source in sources if source["split"] == split] for sources in (record["data"], setup.data_record)]
        if sets[0] != sets[1]:
            changes.append(Change(field, *[", ".join(items) or "none" for items in sets], GUARDED[field]))
    return changes


def _set(source: dict[str, Any]) -> str:
    return f"data set {source['fingerprint'][:12]} with weight {source['weight']:g}"


def _phases(setup: RunSetup, record: dict[str, Any], old: RunConfig) -> list[Change]:
    """Phases that have run, and the learning rate of the last step."""
    changes, step = [], record["step"]
    starts = [phase.start_step for phase in setup.plan.phases]
    for index, (before, now) in enumerate(itertools.zip_longest(old.phases, setup.config.phases)):
        if before != now:
            effect = "steps that have been run" if now and starts[index] < step else ""
            changes.append(Change(f"phases.{index}", before, now, effect))
    rates = [learning_rate(config.optimizer, PhasePlan.from_config(config), step - 1) for config in (old, setup.config)]
    if rates[0] != rates[1]:
        effect = f"{GUARDED['optimizer']}: that of step {step} was {rates[0]:g} and would be {rates[1]:g}"
        changes.append(Change("optimizer", old.optimizer, setup.config.optimizer, effect))
    elif old.optimizer != setup.config.optimizer:
        changes.append(Change("optimizer", old.optimizer, setup.config.optimizer))
    return changes


def _ratio(setup: RunSetup, record: dict[str, Any]) -> list[Change]:
    ratios = (record["comparison_mask_ratio"], comparison_ratio(setup))
    return [Change("validation.mask_ratio", *ratios, GUARDED["validation.mask_ratio"])] if ratios[0] != ratios[1] else []


def _check_names(names: set[str], setup: RunSetup) -> None:
    model = {f"model.{name}" for name in vars(setup.encoder) if name not in STORED}
    known = {*GUARDED, MIXTURE_FIELD, *model, *(f"phases.{phase.index}" for phase in setup.plan.phases)}
    for name in sorted(names - known):
        raise UserError(f"resume_changes names '{name}': allowed are {', '.join(sorted(known))}")


def _check_end(setup: RunSetup, record: dict[str, Any]) -> None:
    step, stop = record["step"], setup.config.training.stop_at_step
    if step > setup.plan.total_steps:
        raise UserError(f"resume: the checkpoint is at step {step}, but the plan has {setup.plan.total_steps} steps")
    planned = PhasePlan.from_config(from_dict(record["config"])).total_steps
    if step > planned:
        raise UserError(f"resume: the checkpoint is at step {step}, but the plan in its run.json has {planned} steps")
    if stop is not None and stop < step:
        raise UserError(f"training.stop_at_step is {stop}, but the checkpoint is at step {step} already")


def comparison_ratio(setup: RunSetup) -> float:
    """Mask ratio of the MLM that phases are compared by, the same through the whole run."""
    return setup.config.validation.mask_ratio or setup.plan.comparison_mask_ratio()
