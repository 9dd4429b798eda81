"""What an optimizer step does, counted: operator calls, logits, bytes handed out, waits for the device. No clock is read.

The limits are a little above what was counted when they were written: who makes a step longer finds out here, and raises a limit
only with a reason. Logits and matrix products are held against the formula.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contenders import MASK_RATIO, Shape, encoder_of, own_micro_batch
from benchmarks.own_run import own_groups, own_step
from megatron_ext.config import OptimizerConfig
from megatron_ext.model.flops import training_flops
from megatron_ext.runtime.launch import run_on_ranks

SHAPE = Shape("tiny", 2, 1_000, 2, 64)
MICRO_BATCHES = 3
OBJECTIVES = ("mlm", "clm")
CALLS_PER_MICRO_BATCH, CALLS_PER_STEP = 490, 45
BYTES_PER_MICRO_BATCH = 25 * 10**6
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique"}
"""Operators whose result the host must wait for."""
VIEWS = {"view", "slice", "transpose", "t", "detach", "alias", "split", "unsqueeze", "squeeze", "expand", "select", "_unsafe_view"}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}


class Counting(TorchDispatchMode):
    """Counts what reaches torch's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.product_flops = 0
        self.logits = 0
        self.bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.calls[name] += 1
        if name in WAITS or _waits_unseen(name, args, result):
            self.waits[name] += 1
        if name in PRODUCTS:
            left, right = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            self.product_flops += 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]
            if left.shape[-1] == encoder_of(SHAPE).hidden_size and right.shape[-1] == SHAPE.vocab_size:
                self.logits += left.shape[-2] * right.shape[-1]
        if name not in VIEWS and not name.endswith("_") and "out" not in (kwargs or {}):
            outputs = result if isinstance(result, tuple | list) else (result,)
            self.bytes += sum(_bytes(tensor) for tensor in outputs if isinstance(tensor, torch.Tensor))
        return result


def _bytes(tensor: torch.Tensor) -> int:
    return tensor._values().nbytes + tensor._indices().nbytes if tensor.is_sparse else tensor.nbytes


def _waits_unseen(name: str, args: Any, result: Any) -> bool:
    """An index of flags asks how many there are, and a copy to the host for its numbers. `numpy()` on a CPU cannot be seen here."""
    if name in ("index", "index_put", "index_put_"):
        return any(isinstance(index, torch.Tensor) and index.dtype is torch.bool for index in args[1])
    return name == "_to_copy" and args[0].device.type != "cpu" and result.device.type == "cpu"


@dataclass(frozen=True)
class Counts:
    """Of one step."""

    calls: dict[str, int]
    product_flops: int
    logits: int
    bytes: int
    predicted: int
    waits: dict[str, int]

    @property
    def calls_in_all(self) -> int:
        """Views among them: they cost the host as much as others."""
        return sum(self.calls.values())


def count_steps(objective: str) -> tuple[Counts, Counts]:
    """A step of one micro-batch and a step of several, after one that makes the optimizer's state."""
    found = []
    with ExitStack() as stack:
        layout, backend = stack.enter_context(own_groups(encoder_of(SHAPE), SHAPE.batch_size))
        step = own_step(encoder_of(SHAPE), SHAPE.vocab_size, torch.float32, layout, backend, OptimizerConfig())
        batches = [own_micro_batch(SHAPE, objective, seed) for seed in range(MICRO_BATCHES)]
        step(batches)
        for chosen in (batches[:1], batches):
            with Counting() as counting:
                sums = step(chosen)
            predicted = sums.predicted[objective]
            found.append(
                Counts(
                    dict(counting.calls), counting.product_flops, counting.logits, counting.bytes, predicted, dict(counting.waits)
                )
            )
    return found[0], found[1]


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[Counts, Counts]]:
    return {objective: run_on_ranks(count_steps, 1, objective)[0] for objective in OBJECTIVES}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_predicted_tokens_get_logits_and_each_once(counted: dict[str, tuple[Counts, Counts]], objective: str) -> None:
    tokens = SHAPE.batch_size * SHAPE.sequence_length
    share = MASK_RATIO if objective == "mlm" else 1 - 1 / SHAPE.sequence_length
    for counts, micro_batches in zip(counted[objective], (1, MICRO_BATCHES), strict=True):
        predicted = micro_batches * round(share * tokens)
        assert counts.predicted == pytest.approx(predicted, abs=2 * micro_batches)
        assert counts.logits == counts.predicted * SHAPE.vocab_size


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_products_are_those_of_the_formula(counted: dict[str, tuple[Counts, Counts]], objective: str) -> None:
    tokens = SHAPE.batch_size * SHAPE.sequence_length
    for counts, micro_batches in zip(counted[objective], (1, MICRO_BATCHES), strict=True):
        # Attention is a kernel of its own; norms are a few matrix-vector products more.
        useful = training_flops(
            encoder_of(SHAPE), SHAPE.vocab_size, tokens=micro_batches * tokens, attended=0, predicted=counts.predicted
        )
        assert useful <= counts.product_flops <= 1.001 * useful


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_is_not_longer_than_it_was(counted: dict[str, tuple[Counts, Counts]], objective: str) -> None:
    one, several = counted[objective]
    calls, handed_out = ((getattr(several, name) - getattr(one, name)) / (MICRO_BATCHES - 1) for name in ("calls_in_all", "bytes"))
    assert calls <= CALLS_PER_MICRO_BATCH
    assert one.calls_in_all - calls <= CALLS_PER_STEP
    assert handed_out <= BYTES_PER_MICRO_BATCH


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_host_never_waits_for_the_device_in_a_step(counted: dict[str, tuple[Counts, Counts]], objective: str) -> None:
    _, several = counted[objective]
    assert not several.waits
