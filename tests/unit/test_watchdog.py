"""Calls that never return hold up neither a watchdog nor the end of its process."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_ext.runtime import watchdog
from megatron_ext.runtime.patience import Patience
from megatron_ext.runtime.watchdog import Watchdog


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Closed until the test opens it, and opened at its end."""
    event = threading.Event()
    yield event
    event.set()


def test_a_call_that_does_not_return_is_given_up_and_the_next_one_waits_for_it(gate: threading.Event) -> None:
    patience, calls = Patience(0.2), []
    assert patience.call(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        patience.call(lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            patience.call(lambda: calls.append(gate.wait()))
    gate.set()
    assert patience.call(lambda: 2) == 2
    assert calls == [True]  # the second was never made: threads do not pile up behind a store that is gone


def test_a_store_that_never_answers_does_not_hold_up_the_end(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        """As that of a rank 0 that is stopped."""

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: gate.wait()

    monkeypatch.setattr(watchdog, "_make_store", lambda rank: Store())
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with Watchdog(0.4, 3) as guard:
        end = time.monotonic() + 1
        while time.monotonic() < end:  # it reports, in vain
            guard.mark("training")
            time.sleep(0.01)
        start = time.monotonic()
    assert time.monotonic() - start < 3
