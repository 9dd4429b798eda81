"""One optimizer step: megatron's schedule over this rank's micro-batches, and the sums that are reported."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ext.data.batch import MicroBatch
from megatron_ext.model.flops import attended_length
from megatron_ext.objective import OBJECTIVES

Report = dict[str, torch.Tensor]


def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """megatron's forward step: the stage's output, and the function that turns the last stage's into a loss.

    The loss function returns the sum of the losses and the number of predicted tokens; megatron divides the gradients by the
    number over all micro-batches and data-parallel ranks. Zero predicted tokens are legal.
    """
    batch = next(batches)
    output = model(batch)
    count = batch.target_ids.numel()

    def sums(loss_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Report]:
        return loss_sum, torch.tensor(count, dtype=torch.int), {batch.objective.name: loss_sum.detach()}

    return output, sums


def run_schedule(
    chunks: list[torch.nn.Module],
    batches: Sequence[MicroBatch],
    tokens: int,
    device: torch.device,
    forward_only: bool,
    mark: Callable[[], None] = lambda: None,
) -> "Sums":
    """Run micro-batches forward (and backward) through the pipeline.

    Args:
        chunks: this rank's model chunks; more than one when interleaved.
        batches: the micro-batches of this data-parallel rank, whole: here they are cut for context parallelism.
        tokens: tokens in each of them.
        device: where the model is.
        forward_only: no gradients.
        mark: called before each micro-batch: the run is getting on.

    Returns:
        This rank's sums: those of its part of the tokens.
    """
    place, parts = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    batches = [batch.part(place, parts) for batch in batches]
    on_device = [batch.to(device) for batch in batches]
    iterators = [_marking(on_device, mark) for _ in chunks]
    reports: list[Report] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    sums = Sums(device)
    sums.add(batches, reports)
    return sums


def _marking(batches: Sequence[MicroBatch], mark: Callable[[], None]) -> Iterator[MicroBatch]:
    for batch in batches:
        mark()
        yield batch


@dataclass
class Sums:
    """What a number of micro-batches add up to; `reduce` sums it over the ranks."""

    device: torch.device
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    """Sum of losses by objective; only on the last pipeline stage. Stays on the device."""
    predicted: dict[str, int] = field(default_factory=dict)
    """Predicted tokens by objective."""
    tokens: int = 0
    attended: float = 0.0
    """Sum over tokens of the length each attends to."""
    batch_losses: list[torch.Tensor] = field(default_factory=list)
    """Sum of losses of each micro-batch that was added; only on the last pipeline stage. Stays on the device."""

    def add(self, batches: Sequence[MicroBatch], reports: Sequence[Report]) -> None:
        """Count micro-batches and the losses the last stage reports for them."""
        for report in reports:
            for name, loss in report.items():
                self.batch_losses.append(loss)
                self.losses[name] = self.losses.get(name, torch.zeros((), device=self.device)) + loss
        for batch in batches:
            name = batch.objective.name
            self.predicted[name] = self.predicted.get(name, 0) + batch.target_ids.numel()
            self.tokens += batch.input_ids.numel()
            self.attended += attended_length(batch.segment_lengths, batch.causal, batch.keys and batch.keys.lengths)

    def without_losses(self) -> "Sums":
        """What a skipped step adds up to: its tokens were computed, and nothing was learned from them."""
        return Sums(self.device, tokens=self.tokens, attended=self.attended)

    def merge(self, other: "Sums") -> None:
        """Add another sum of the same rank."""
        for name, loss in other.losses.items():
            self.losses[name] = self.losses.get(name, torch.zeros((), device=self.device)) + loss
        for name, count in other.predicted.items():
            self.predicted[name] = self.predicted.get(name, 0) + count
        self.tokens += other.tokens
        self.attended += other.attended

    def reduce(self) -> "GlobalSums":
        """Sum over all ranks. One collective, and the only point that waits for the device."""
        names = list(OBJECTIVES)
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        counts = first and parallel_state.is_pipeline_first_stage(ignore_virtual=True)
        losses = first and parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        host = [float(self.predicted.get(name, 0)) for name in names] + [float(self.tokens), self.attended]
        zero = torch.zeros((), device=self.device)
        values = torch.cat(
            [
                torch.stack([self.losses.get(name, zero) if losses else zero for name in names]).double(),
                torch.tensor(host, dtype=torch.float64, device=self.device) * counts,
            ]
        )
        torch.distributed.all_reduce(values)
        numbers = values.tolist()
        return GlobalSums(
            losses=dict(zip(names, numbers[:3], strict=True)),
            predicted={name: round(count) for name, count in zip(names, numbers[3:6], strict=True)},
            tokens=round(numbers[6]),
            attended=numbers[7],
        )


@dataclass(frozen=True)
class GlobalSums:
    """Sums over all ranks, as plain numbers."""

    losses: dict[str, float]
    predicted: dict[str, int]
    tokens: int
    attended: float

    def mean_losses(self) -> dict[str, float]:
        """Mean loss in nats per predicted token, for the objectives that predicted any."""
        return {name: self.losses[name] / count for name, count in self.predicted.items() if count}
