"""Calls that never return hold up neither a watchdog nor the end of its process."""

import json
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


def test_a_rank_that_looks_for_the_culprit_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks may look at the same time: neither may take the other's looking for silence."""
    beats: list[int] = []

    class Store:
        """Keeps what this rank says of itself; another rank says nothing."""

        content: dict[str, str] = {}

        def set(self, key: str, value: str) -> None:
            self.content[key] = value
            beats.append(json.loads(value)["beat"])

        def check(self, keys: list[str]) -> bool:
            return all(key in self.content for key in keys)

        def multi_get(self, keys: list[str]) -> list[str]:
            return [self.content[key] for key in keys]

    monkeypatch.setattr(watchdog, "_make_store", lambda rank: Store())
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    guard = Watchdog(2.0, 3)  # reports every half second
    word, speaker = guard._find_culprit()
    assert len(set(beats)) >= 3  # so that one that looks twice, a second apart, sees it move whenever it looks
    assert word.startswith("rank 0 no longer answers") and speaker == 1
