"""What a study knows of its models: plan, budget and cost, under the names that their exports have."""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_ext.study.models import Model, Part, models_of, step_cost
from megatron_ext.study.segment_run import at_step_name, evaluated_steps
from megatron_ext.study.segments import Segment, all_paths, build_tree
from megatron_ext.study.study_file import Study


@dataclass(frozen=True)
class Facts:
    """One model, finished or on its way."""

    name: str
    size: str
    family: str
    """Of the study file; `on the way` of a checkpoint in the middle."""
    plan: str
    """Objectives in order: `clm`, `mlm0.4`, `clm > mlm0.4`."""
    ratio: float | None
    """Of the last masked stretch."""
    causal_share: float | None
    """Of the steps before the (first) decay, for plans of CLM and one MLM ratio; None for others."""
    steps: int
    added_steps: int
    """Of continued pretraining; 0 without it."""
    flops: float
    is_finished: bool
    """It has decayed."""
    leads_to: tuple[str, ...] = ()
    """Of a checkpoint on the way: the finished models that it is on the way to."""

    @property
    def objective(self) -> str:
        """clm, masked (mlm or mntp) or both."""
        return "clm" if self.plan == "clm" else "masked" if "clm" not in self.plan else "both"


def facts_of(study: Study) -> list[Facts]:
    """Every model of the study, then every checkpoint on the way that it evaluates."""
    models = models_of(study)
    found = [_of_model(study, model) for model in models]
    for path in all_paths(build_tree(models)):
        found += [_on_the_way(study, path, step) for step in evaluated_steps(study, path[-1])]
    return found


def _of_model(study: Study, model: Model) -> Facts:
    start = next((number for number, part in enumerate(model.parts) if part.rewarms), len(model.parts))
    before, added = model.parts[:start], sum(part.steps for part in model.parts[start:])
    return Facts(
        name=model.name,
        size=model.size,
        family=model.family,
        plan=_plan(model.parts),
        ratio=_ratio(model.parts),
        causal_share=_causal_share(before),
        steps=model.steps,
        added_steps=added,
        flops=_flops(study, model.size, model.parts),
        is_finished=True,
    )


def _on_the_way(study: Study, path: tuple[Segment, ...], step: int) -> Facts:
    parts = [segment.part for segment in path]
    last = parts[-1]
    parts[-1] = Part(last.objective, last.ratio, False, step - path[-1].start_step, last.rewarms)
    return Facts(
        name=at_step_name(path, step),
        size=path[0].size,
        family="on the way",
        plan=_plan(parts),
        ratio=_ratio(parts),
        causal_share=_causal_share(parts),
        steps=step,
        added_steps=0,
        flops=_flops(study, path[0].size, parts),
        is_finished=False,
        leads_to=tuple(_models_below(path[-1])),
    )


def _models_below(segment: Segment) -> list[str]:
    return [model.name for model in segment.models] + [name for child in segment.children for name in _models_below(child)]


def _plan(parts: Iterable[Part]) -> str:
    words: list[str] = []
    for part in parts:
        word = f"+ {part.objective_label}" if part.rewarms else part.objective_label
        if not words or words[-1].removeprefix("+ ") != word:
            words.append(word)
    return " > ".join(words).replace(" > + ", " + ")


def _ratio(parts: Iterable[Part]) -> float | None:
    masked = [part.ratio for part in parts if part.objective != "clm"]
    return masked[-1] if masked else None


def _causal_share(parts: Iterable[Part]) -> float | None:
    parts = list(parts)
    stable = [part for part in parts if not part.is_decay]
    if any(part.objective not in ("clm", "mlm") for part in parts) or len({part.objective_label for part in parts} - {"clm"}) > 1:
        return None
    total = sum(part.steps for part in stable)
    return sum(part.steps for part in stable if part.objective == "clm") / total if total else None


def _flops(study: Study, size: str, parts: Iterable[Part]) -> float:
    return sum(part.steps * step_cost(study, size, part.objective, part.ratio).flops for part in parts)
