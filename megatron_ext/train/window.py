"""The steps since the run was last looked at: what they came to stays on the device until `settle` asks for it."""

import math
from dataclasses import dataclass, field

import torch

from megatron_ext.data.loader import StepData
from megatron_ext.train.skipped import SkippedStep, SkippedSteps
from megatron_ext.train.step import Sums

MOST_UNSETTLED = 100
"""Steps that are not looked at: what is kept of them, and how late too many skipped ones are noticed."""


@dataclass(frozen=True)
class Outcome:
    """What a step came to on this rank."""

    data: SkippedStep
    """What is to be known of it if it was skipped; its tokens themselves are not kept."""
    sums: Sums
    gradient_norm: torch.Tensor
    """Global, before clipping: float32 scalar."""
    is_bad: torch.Tensor
    """Float32 scalar, 1 where the update was left out; equal on all ranks."""


@dataclass
class Window:
    """Steps since the last logging, summed up."""

    device: torch.device
    sums: Sums = field(init=False)
    """Of the settled steps."""
    steps: int = 0
    gradient_norm: float = math.nan
    """Of the last settled step."""
    _unsettled: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sums = Sums(self.device)

    @property
    def is_full(self) -> bool:
        """Nobody has looked for so long that it is time."""
        return len(self._unsettled) >= MOST_UNSETTLED

    def add(self, data: StepData, sums: Sums, gradient_norm: torch.Tensor, is_bad: torch.Tensor) -> None:
        """One more step. Waits for nothing."""
        self._unsettled.append(Outcome(SkippedStep.of(data), sums, gradient_norm, is_bad))
        self.steps += 1

    def settle(self, skipped: SkippedSteps) -> int:
        """Learn which steps were skipped, write them down and leave their losses out; how many they were. All ranks together.

        Raises:
            UserError: too many in a row.
        """
        outcomes, self._unsettled = self._unsettled, []
        if not outcomes:
            return 0
        numbers = torch.stack([torch.stack([each.gradient_norm, each.is_bad]) for each in outcomes]).tolist()
        for outcome, (norm, is_bad) in zip(outcomes, numbers, strict=True):
            self.gradient_norm = norm
            if is_bad:
                skipped.skip(outcome.data, [float(loss) for loss in outcome.sums.batch_losses], norm)
                self.sums.merge(outcome.sums.without_losses())
            else:
                skipped.good()
                self.sums.merge(outcome.sums)
        return sum(bool(is_bad) for _, is_bad in numbers)
