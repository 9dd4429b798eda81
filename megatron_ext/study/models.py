"""The models of a study: each a path of stretches with their lengths in steps."""

from dataclasses import dataclass

from megatron_ext.errors import UserError
from megatron_ext.model.flops import training_flops
from megatron_ext.model.presets import PRESETS
from megatron_ext.study.study_file import Family, Plan, Stretch, Study


@dataclass(frozen=True)
class Part:
    """A stretch of training under one objective at a stable or decaying learning rate."""

    objective: str
    ratio: float
    is_decay: bool
    steps: int
    rewarms: bool = False
    """The learning-rate schedule begins anew: the first part of continued pretraining."""

    @property
    def kind(self) -> tuple[str, float, bool, bool]:
        """All but its length: parts that begin alike may share their first steps, decays only whole."""
        return self.objective, self.ratio if self.objective != "clm" else 0.0, self.is_decay, self.rewarms

    @property
    def objective_label(self) -> str:
        """The objective, and the ratio of a masked one."""
        return Stretch(objective=self.objective, ratio=self.ratio).label

    @property
    def label(self) -> str:
        """For people."""
        name = self.objective_label
        return f"{name} decay" if self.is_decay else f"{name} from a warm-up" if self.rewarms else name


@dataclass(frozen=True)
class Model:
    """One model of the grid."""

    family: str
    size: str
    name: str
    parts: tuple[Part, ...]

    @property
    def steps(self) -> int:
        """All of them."""
        return sum(part.steps for part in self.parts)


@dataclass(frozen=True)
class StepCost:
    """What a step under an objective takes."""

    tokens: float
    predicted_tokens: float
    flops: float


def step_cost(study: Study, size: str, objective: str, ratio: float) -> StepCost:
    """Of one optimizer step: expected predicted tokens, and FLOPs with every document as long as its sample."""
    tokens, length = study.tokens_per_step, study.sequence_length
    is_causal = objective == "clm"
    predicted = tokens * (1 - 1 / length) if is_causal else tokens * ratio
    attended = tokens * length / (2 if is_causal else 1)
    flops = training_flops(PRESETS[size](), study.vocab_size, tokens=tokens, attended=attended, predicted=predicted)
    return StepCost(tokens, predicted, flops)


def models_of(study: Study) -> list[Model]:
    """Every model of every family; one that two families name belongs to the first.

    Raises:
        UserError: a size that is no preset, or a budget that its decay does not fit into.
    """
    found: dict[tuple[str, tuple[Part, ...]], Model] = {}
    for family in study.families:
        for size in family.sizes:
            if size not in PRESETS:
                raise UserError(f"family {family.name} has the size '{size}': allowed are {', '.join(PRESETS)}")
            for model in _of_family(study, family, size):
                found.setdefault((model.size, model.parts), model)
    _check_names(list(found.values()))
    return list(found.values())


def _check_names(models: list[Model]) -> None:
    """Names are of folders and of rows: two models of one name would be taken for each other."""
    by_name: dict[str, Model] = {}
    for model in models:
        other = by_name.setdefault(model.name, model)
        if other is not model:
            raise UserError(
                f"families {other.family} and {model.family} have two models called {model.name}: their shares or budgets differ "
                "by too little, or their units differ"
            )


def _of_family(study: Study, family: Family, size: str) -> list[Model]:
    starts: list[tuple[str, tuple[Part, ...]]] = [("", ())]
    if family.continues:
        steps = family.continues_budget
        starts = [(f"{plan_name(plan)}-{steps:g}+", parts_of(study, size, plan, steps, "steps")) for plan in family.continues]
    return [
        Model(
            family.name,
            size,
            f"{size}-{start}{plan_name(plan)}-{budget:g}",
            (*before, *parts_of(study, size, plan, budget, family.budget_unit, rewarms=bool(before))),
        )
        for start, before in starts
        for plan in family.plans
        for budget in family.budgets
    ]


def plan_name(plan: Plan) -> str:
    """`clm`, `mlm0.4`, `clm25%+mlm0.4`."""
    shares = plan.shares()
    return "+".join(
        f"{stretch.label}{'' if number == len(shares) - 1 else f'{share:.0%}'}" for number, (stretch, share) in enumerate(shares)
    )


def parts_of(study: Study, size: str, plan: Plan, budget: float, unit: str, *, rewarms: bool = False) -> tuple[Part, ...]:
    """A plan's stretches in steps, and the decay, which is under the last objective.

    Shares apply to the steps before the decay, so that models of different budgets share their trunks.

    Raises:
        UserError: the budget is less than the decay.
    """
    shares = plan.shares()
    costs = [_cost(study, size, stretch, unit) for stretch, _ in shares]
    mean = sum(share * cost for (_, share), cost in zip(shares, costs, strict=True))
    stable = round((budget - study.decay_steps * costs[-1]) / mean)
    if stable < 0:
        raise UserError(f"a budget of {budget:g} {unit} is less than the {study.decay_steps} decay_steps of {size} take")
    parts, done, share_done = [], 0, 0.0
    for stretch, share in shares:
        share_done += share
        end = round(share_done * stable)
        if end > done:
            parts.append(Part(stretch.objective, stretch.ratio, False, end - done, rewarms and not parts))
        done = end
    last = shares[-1][0]
    parts.append(Part(last.objective, last.ratio, True, study.decay_steps, rewarms and not parts))
    return tuple(parts)


def _cost(study: Study, size: str, stretch: Stretch, unit: str) -> float:
    return 1.0 if unit == "steps" else getattr(step_cost(study, size, stretch.objective, stretch.ratio), unit)
