"""The micro-batch: what one forward pass of the model needs, and who sees whom in it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_ext.objective import Example, Objective


@dataclass(frozen=True)
class Keys:
    """The tokens that those of a part of a micro-batch look at: a stretch of the whole micro-batch's row."""

    first: int
    """Row of the first of them."""
    lengths: tuple[int, ...]
    """[k] how many each run of the part looks at, on the host."""
    cumulative_lengths: Tensor
    """[k + 1] int32: where they begin and end, counted from `first`."""


@dataclass(frozen=True)
class MicroBatch:
    """One or more samples laid in a row of t tokens, with n predictions, under one objective; or a part of that row."""

    objective: Objective
    input_ids: Tensor
    """[t] int64 token ids, corrupted if the objective says so."""
    position_ids: Tensor
    """[t] int64 rotary positions."""
    target_positions: Tensor
    """[n] int64 rows that predict something."""
    target_ids: Tensor
    """[n] int64 what they predict."""
    cumulative_lengths: Tensor
    """[k + 1] int32: where the runs of tokens that see each other begin and end."""
    segment_lengths: tuple[int, ...]
    """[k] lengths of these runs, on the host."""
    max_position: int
    """Upper bound of `position_ids`, known on the host."""
    keys: Keys | None = None
    """In a part of a micro-batch, what its runs look at; None where they look at themselves alone."""

    @property
    def causal(self) -> bool:
        """Tokens see only what came before."""
        return self.objective.causal

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on a device; the copies do not wait."""
        names = ("input_ids", "position_ids", "target_positions", "target_ids", "cumulative_lengths")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        keys = self.keys and replace(self.keys, cumulative_lengths=self.keys.cumulative_lengths.to(device, non_blocking=True))
        return replace(self, **moved, keys=keys)

    def part(self, number: int, parts: int) -> "MicroBatch":
        """One of several equal stretches of the row, for context parallelism. Parts add up: tokens, predictions, losses.

        A run that begins before the stretch or ends after it is cut; its tokens here look at the whole run, or under a causal
        objective at what comes before the stretch's end.

        Args:
            number: which one, from 0 on.
            parts: how many; must divide t.
        """
        if parts == 1:
            return self
        size = self.input_ids.numel() // parts
        first, end = number * size, (number + 1) * size
        ends = np.cumsum(self.segment_lengths)
        starts = ends - self.segment_lengths
        overlaps = (starts < end) & (ends > first)
        starts, ends = starts[overlaps], ends[overlaps]
        queries = np.minimum(ends, end) - np.maximum(starts, first)
        keys = (np.minimum(ends, end) if self.causal else ends) - starts
        own = (self.target_positions >= first) & (self.target_positions < end)
        return replace(
            self,
            input_ids=self.input_ids[first:end],
            position_ids=self.position_ids[first:end],
            target_positions=self.target_positions[own] - first,
            target_ids=self.target_ids[own],
            cumulative_lengths=_cumulate(queries),
            segment_lengths=tuple(queries.tolist()),
            keys=Keys(int(starts[0]), tuple(keys.tolist()), _cumulate(keys)),
        )


def collate(
    examples: Sequence[Example],
    segments: Sequence[np.ndarray],
    objective: Objective,
    *,
    documents_attend_across: bool,
    restart_positions: bool,
) -> MicroBatch:
    """Lay samples of s tokens each in one row.

    Args:
        examples: the b samples under the objective.
        segments: for each sample the lengths of its pieces of documents; they sum to s.
        objective: the objective of all of them.
        documents_attend_across: the documents of a sample see each other.
        restart_positions: positions count from 0 in each document, else in each sample.
    """
    sequence_length = len(examples[0].input_ids)
    documents = np.concatenate(segments)
    samples = np.full(len(examples), sequence_length)
    seen = samples if documents_attend_across else documents
    counted = documents if restart_positions else samples
    offsets = np.arange(len(examples)) * sequence_length
    positions = np.concatenate([e.target_positions + offset for e, offset in zip(examples, offsets, strict=True)])
    return MicroBatch(
        objective=objective,
        input_ids=_tensor(np.concatenate([e.input_ids for e in examples])),
        position_ids=_tensor(_count_up(counted)),
        target_positions=_tensor(positions),
        target_ids=_tensor(np.concatenate([e.target_ids for e in examples])),
        cumulative_lengths=_cumulate(seen),
        segment_lengths=tuple(int(length) for length in seen),
        max_position=sequence_length,
    )


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))


def _cumulate(lengths: np.ndarray) -> Tensor:
    """[k] -> [k + 1] int32 sums from 0 on."""
    return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))


def _count_up(lengths: np.ndarray) -> np.ndarray:
    """0 .. l-1 for each length l, one after the other."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
