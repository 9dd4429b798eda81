"""What a study file says: sizes, phase plans and budgets, as data."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_ext.config import (
    OBJECTIVE_NAMES,
    CheckpointConfig,
    DataConfig,
    MaskingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrackingConfig,
    TrainingConfig,
    ValidationConfig,
    require,
)
from megatron_ext.config_tree import build
from megatron_ext.config_yaml import read_file

BudgetUnit = Literal["steps", "tokens", "predicted_tokens", "flops"]
SHARES_SUM = 1e-9


@dataclass(kw_only=True)
class Stretch:
    """A part of a plan under one objective."""

    objective: str
    """clm, mlm or mntp."""
    ratio: float = 0.4
    """Share of the tokens that a masked objective predicts."""
    share: float | None = None
    """Of the budget's steps before the decay; what is left where null (for one stretch of a plan)."""

    def __post_init__(self) -> None:
        require(
            self.objective in OBJECTIVE_NAMES,
            f"a plan's objective is '{self.objective}': allowed are {', '.join(OBJECTIVE_NAMES)}",
        )
        require(0 < self.ratio < 1, f"a plan's ratio is {self.ratio}: it must lie between 0 and 1")
        require(self.share is None or 0 <= self.share <= 1, f"a plan's share is {self.share}: it must lie between 0 and 1")

    @property
    def label(self) -> str:
        """What tells it from others: the objective, and the ratio of a masked one."""
        return self.objective if self.objective == "clm" else f"{self.objective}{self.ratio:g}"


@dataclass(kw_only=True)
class Plan:
    """The objectives of a model, in order."""

    stretches: list[Stretch]

    def __post_init__(self) -> None:
        require(bool(self.stretches), "a plan has no stretches: name at least one")
        open_ones = [stretch for stretch in self.stretches if stretch.share is None]
        require(len(open_ones) <= 1, "a plan has several stretches without a share: one may take what is left")
        total = sum(stretch.share or 0 for stretch in self.stretches)
        require(total <= 1 + SHARES_SUM, f"a plan's shares sum to {total:g}: at most 1")
        require(bool(open_ones) or abs(total - 1) <= SHARES_SUM, f"a plan's shares sum to {total:g}: they must sum to 1")

    def shares(self) -> list[tuple[Stretch, float]]:
        """Each stretch with its share; those of nothing are left out."""
        rest = 1 - sum(stretch.share or 0 for stretch in self.stretches)
        found = [(stretch, rest if stretch.share is None else stretch.share) for stretch in self.stretches]
        return [(stretch, share) for stretch, share in found if share > SHARES_SUM]


@dataclass(kw_only=True)
class Family:
    """Models of every size, plan and budget named."""

    name: str
    sizes: list[str]
    """Presets of the model section."""
    budgets: list[float]
    """Of a model, the decay included; of continued pretraining, of what is added."""
    plans: list[Plan]
    budget_unit: BudgetUnit = "steps"
    """What the budgets are matched by: steps, tokens, predicted_tokens or flops."""
    continues: list[Plan] = field(default_factory=list)
    """Continued pretraining: it begins with the decayed models of these plans ..."""
    continues_budget: float | None = None
    """... of this many steps."""

    def __post_init__(self) -> None:
        require(bool(self.sizes and self.budgets and self.plans), f"family {self.name} has no sizes, budgets or plans")
        require(all(budget > 0 for budget in self.budgets), f"family {self.name} has a budget of 0 or less")
        require(
            bool(self.continues) == (self.continues_budget is not None),
            f"family {self.name}: continues and continues_budget belong together",
        )
        require(
            self.budget_unit in get_args(BudgetUnit),
            f"family {self.name} has the budget_unit '{self.budget_unit}': allowed are {', '.join(get_args(BudgetUnit))}",
        )


@dataclass(kw_only=True)
class Sections:
    """What all segments' configurations have in common: the sections of a run's, but for what the study decides."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(kw_only=True)
class Study:
    """All of it."""

    name: str
    families: list[Family]
    global_batch_size: int
    """Samples in a step."""
    sequence_length: int
    vocab_size: int
    warmup_steps: int
    decay_steps: int
    """Steps of linear decay at the end of every budget; before them a model shares the stable trunk with longer ones."""
    evaluation_steps: list[int] = field(default_factory=list)
    """Steps at which every model's checkpoint is kept and exported, besides its last."""
    run: Sections | None = None
    """Needed to run it: data, optimizer, tracking and whatever else a run's configuration says."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "sequence_length", "vocab_size", "decay_steps"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: it must be greater than 0")
        require(all(step > 0 for step in self.evaluation_steps), "evaluation_steps has a step of 0 or less")
        require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}: it must not be negative")
        names = [family.name for family in self.families]
        require(len(set(names)) == len(names), f"families are called {', '.join(names)}: each needs a name of its own")

        if self.run is not None:
            self._check_sections(self.run)

    def _check_sections(self, run: Sections) -> None:
        """A section may repeat what the study decides, and not contradict it."""
        decided: list[tuple[str, object, object, object]] = [
            ("data.sequence_length", run.data.sequence_length, 2048, self.sequence_length),
            ("training.global_batch_size", run.training.global_batch_size, 8, self.global_batch_size),
            ("optimizer.warmup_steps", run.optimizer.warmup_steps, 0, self.warmup_steps),
            ("optimizer.decay_steps", run.optimizer.decay_steps, 0, self.decay_steps),
            ("optimizer.schedule", run.optimizer.schedule, "wsd", "wsd"),
            ("model.preset", run.model.preset, None, None),
            ("model.checkpoint", run.model.checkpoint, None, None),
            ("training.stop_at_step", run.training.stop_at_step, None, None),
        ]
        for name, value, default, wanted in decided:
            require(value in (default, wanted), f"run.{name} is {value}: the study decides it, leave it out")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.global_batch_size * self.sequence_length


def read_study(path: str) -> Study:
    """Read a study file.

    Raises:
        UserError: it is missing, or says something that is not allowed; the line is named.
    """
    return build(Study, read_file(path, path))
