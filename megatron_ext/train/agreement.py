"""What all ranks must know together before a step counts: one exchange of a few flags a step."""

from datetime import timedelta
from typing import TypeVar

import torch

T = TypeVar("T")


class Agreement:
    """Ranks raise flags; all learn which were raised by any of them.

    The flags travel between the hosts (gloo), also where the model is on GPUs: nothing waits for a device.
    """

    def __init__(self, timeout: timedelta) -> None:
        """The process groups must exist; all ranks call it together.

        Args:
            timeout: how long an exchange waits for a rank, as in the process groups.
        """
        self._group = torch.distributed.new_group(backend="gloo", timeout=timeout, group_desc="AGREEMENT")

    def any(self, *flags: bool) -> list[bool]:
        """Which of the flags some rank has raised; all ranks call it together with as many flags."""
        raised = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in raised.tolist()]

    def messages(self, message: str | None) -> list[str]:
        """The messages of all ranks that have one, in the order of the ranks; all ranks call it together."""
        return [text for text in self.gather(message) if text]

    def gather(self, own: T) -> list[T]:
        """What each rank gives, by rank; all ranks call it together. It is pickled on the way."""
        found: list[T] = [own] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, own, group=self._group)
        return found
