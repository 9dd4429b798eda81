"""Validation on a fixed set of samples: under the phase's own objectives, and always under one MLM, so that phases compare."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_ext.config import MaskingConfig
from megatron_ext.data.batch import MicroBatch
from megatron_ext.data.loader import BatchBuilder
from megatron_ext.objective import OBJECTIVES, VALIDATION_STREAM, Objective, Phase
from megatron_ext.train.changes import comparison_ratio
from megatron_ext.train.preflight import RunSetup
from megatron_ext.train.step import run_schedule

COMPARISON = "validation_mlm_loss"


@dataclass(frozen=True)
class Task:
    """One loss to be measured."""

    metric: str
    objective: Objective
    masking: MaskingConfig
    ratio: float


def comparison_task(setup: RunSetup) -> Task:
    """MLM with plain mask tokens at one ratio, the same through the whole run."""
    ratio = comparison_ratio(setup)
    return Task(COMPARISON, OBJECTIVES["mlm"], MaskingConfig(ratio=ratio), ratio)


def phase_tasks(phase: Phase, step: int) -> list[Task]:
    """The phase's own objectives, masked as at this step."""
    ratio = phase.mask_ratio(step)
    return [Task(f"validation_loss/{name}", OBJECTIVES[name], phase.masking, ratio) for name in phase.weights]


def validation_builder(setup: RunSetup) -> BatchBuilder:
    """Builds validation micro-batches; their masks come from a random stream of their own and never change."""
    assert setup.validation_data is not None
    config = setup.config
    return BatchBuilder(setup.validation_data, config.data, setup.vocabulary, config.training.seed, VALIDATION_STREAM)


def validation_batches(setup: RunSetup, builder: BatchBuilder, task: Task, rank: int, ranks: int) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of the fixed set."""
    size = setup.config.training.micro_batch_size
    starts = range(rank * size, setup.config.validation.samples, ranks * size)
    return [builder.build(first, size, task.objective, task.masking, task.ratio) for first in starts]


def validate(
    setup: RunSetup, chunks: list[torch.nn.Module], phase: Phase, step: int, rank: int, mark: Callable[[], None]
) -> dict[str, float]:
    """Mean losses over the fixed set, equal on all ranks.

    Args:
        setup: the run.
        chunks: this rank's model chunks.
        phase: the phase of `step`.
        step: the last completed step.
        rank: data-parallel rank.
        mark: called before each micro-batch.

    Returns:
        Metric name -> nats per predicted token.
    """
    builder = validation_builder(setup)
    for chunk in chunks:
        chunk.eval()
    results = {}
    for task in [*phase_tasks(phase, step), comparison_task(setup)]:
        batches = validation_batches(setup, builder, task, rank, setup.layout.data)
        with torch.no_grad():
            sums = run_schedule(chunks, batches, setup.tokens_per_batch, setup.backend.device, True, mark).reduce()
        if sums.predicted[task.objective.name]:
            results[task.metric] = sums.mean_losses()[task.objective.name]
    for chunk in chunks:
        chunk.train()
    return results
