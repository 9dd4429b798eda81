"""Ranks that start again agree on a name of their own, whatever an earlier attempt has left in the store."""

import threading
from datetime import timedelta

import pytest
import torch

from megatron_ext.runtime.attempt import agree_on_name


def names_of_attempt(store: torch.distributed.HashStore, ranks: int, late: int) -> list[str]:
    """The names that all ranks come to; rank `late` starts only when rank 0 has been looking at what lies in the store."""
    names = [""] * ranks

    def agree(rank: int) -> None:
        names[rank] = agree_on_name(store, rank, ranks, timedelta(seconds=30))

    threads = {rank: threading.Thread(target=agree, args=(rank,)) for rank in range(ranks)}
    for rank, thread in threads.items():
        if rank != late:
            thread.start()
    if store.check([f"word/{late}"]):  # of the attempt before: rank 0 answers it, and must not take the answer for heard
        store.wait([f"name for {store.get(f'word/{late}').decode()}"], timedelta(seconds=30))
    threads[late].start()
    for thread in threads.values():
        thread.join(60)
    return names


def test_each_attempt_agrees_on_a_new_name() -> None:
    store = torch.distributed.HashStore()
    seen = set()
    for late in (2, 1, 2):
        names = names_of_attempt(store, 3, late)
        assert len(set(names)) == 1 and names[0]
        assert names[0] not in seen
        seen.add(names[0])


def test_a_rank_that_does_not_come_is_named() -> None:
    store = torch.distributed.HashStore()
    store.set("word/1", "of an earlier attempt")
    with pytest.raises(TimeoutError, match=r"ranks \[1\]"):
        agree_on_name(store, 0, 2, timedelta(seconds=0.2))
