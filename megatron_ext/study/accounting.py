"""What a study takes, model by model and shared: steps, tokens, FLOPs, and GPU-hours as the planner predicts them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from megatron_ext.config import DataConfig, DataSource, MaskingConfig, ModelConfig, PhaseConfig, RunConfig, TrainingConfig
from megatron_ext.plan.hardware import Gpu
from megatron_ext.plan.recommend import choose
from megatron_ext.plan.search import search
from megatron_ext.study.models import Model, Part, step_cost
from megatron_ext.study.segments import Segment, all_segments
from megatron_ext.study.study_file import Study

SecondsPerStep = Callable[[str, str, float], float]
"""(size, objective, ratio) -> seconds of an optimizer step on all GPUs."""


@dataclass(frozen=True)
class Total:
    """A sum over stretches of training."""

    steps: int = 0
    tokens: float = 0.0
    predicted_tokens: float = 0.0
    flops: float = 0.0
    gpu_hours: float | None = None

    def __add__(self, other: "Total") -> "Total":
        hours = None if self.gpu_hours is None or other.gpu_hours is None else self.gpu_hours + other.gpu_hours
        return Total(
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.predicted_tokens + other.predicted_tokens,
            self.flops + other.flops,
            hours,
        )


@dataclass(frozen=True)
class Accountant:
    """Counts stretches of one study."""

    study: Study
    gpus: int = 0
    seconds_per_step: SecondsPerStep | None = None
    """None leaves GPU-hours out."""

    def part(self, size: str, part: Part) -> Total:
        """Of one stretch of one size."""
        cost = step_cost(self.study, size, part.objective, part.ratio)
        hours = None
        if self.seconds_per_step is not None:
            hours = part.steps * self.seconds_per_step(size, part.objective, part.ratio) * self.gpus / 3600
        steps = part.steps
        return Total(steps, steps * cost.tokens, steps * cost.predicted_tokens, steps * cost.flops, hours)

    def models(self, models: Iterable[Model]) -> Total:
        """Of models, each trained alone."""
        return self._sum(self.part(model.size, part) for model in models for part in model.parts)

    def segments(self, segments: Iterable[Segment]) -> Total:
        """Of segments, each once."""
        return self._sum(self.part(segment.size, segment.part) for segment in segments)

    def below(self, models: list[Model], roots: list[Segment], others: list[Model]) -> Total:
        """Of the segments that lead to some models and to none of the others."""
        return self.segments(
            segment for segment in all_segments(roots) if _leads_to(segment, models) and not _leads_to(segment, others)
        )

    def _sum(self, totals: Iterable[Total]) -> Total:
        return sum(totals, Total(gpu_hours=None if self.seconds_per_step is None else 0.0))


def _leads_to(segment: Segment, models: list[Model]) -> bool:
    return any(model in models for below in segment.walk() for model in below.models)


def planner_seconds(study: Study, gpus: int, gpu: Gpu) -> SecondsPerStep:
    """What the planner predicts for the best layout in BF16 of each size and objective.

    Raises (when called):
        UserError: nothing fits on so many GPUs.
    """

    @lru_cache
    def seconds(size: str, objective: str, ratio: float) -> float:
        config = RunConfig(
            output_dir="study",
            data=DataConfig(tokenizer="none", train=[DataSource(prefix="none")], sequence_length=study.sequence_length),
            model=ModelConfig(preset=size),
            phases=[PhaseConfig(objective=objective, steps=1, masking=MaskingConfig(ratio=ratio))],
            training=TrainingConfig(global_batch_size=study.global_batch_size),
        )
        return choose(search(config, study.vocab_size, gpus, gpu), fp8_pays=float("inf"))[0].seconds

    return seconds
