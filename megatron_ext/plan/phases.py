"""The phase plan as work: how many steps run under which attention and with how many predictions."""

from dataclasses import dataclass

from megatron_ext.config import RunConfig
from megatron_ext.model.presets import EncoderConfig
from megatron_ext.objective import OBJECTIVES, PhasePlan
from megatron_ext.plan.workload import Shape, Workload


@dataclass(frozen=True)
class PhaseWork:
    """Steps of one objective in one phase."""

    phase: str
    objective: str
    steps: float
    """A mixture's steps are shared out by weight: its micro-batches are."""
    workload: Workload

    @property
    def predicted_share(self) -> float:
        """Tokens with logits."""
        return self.workload.predicted_share


def phase_works(config: RunConfig, encoder: EncoderConfig, vocab_size: int, document: float | None = None) -> list[PhaseWork]:
    """Resolve the plan of a run.

    Args:
        config: the run.
        encoder: its model's shape.
        vocab_size: ids that belong to tokens.
        document: mean length of the run of tokens that a token belongs to; None, or documents that attend across: whole samples.
    """
    shape = Shape.of(encoder, vocab_size)
    works = []
    for phase in PhasePlan.from_config(config).phases:
        steps = phase.end_step - phase.start_step
        ratio = (phase.mask_ratio(phase.start_step) + phase.mask_ratio(phase.end_step - 1)) / 2
        for name, weight in phase.weights.items():
            objective = OBJECTIVES[name]
            workload = Workload(
                shape=shape,
                sequence=config.data.sequence_length,
                causal=objective.causal,
                predicted_share=ratio if objective.corrupts else 1.0,
                document=None if config.data.documents_attend_across else document,
            )
            works.append(PhaseWork(phase.name, name, steps * weight / sum(phase.weights.values()), workload))
    return works
