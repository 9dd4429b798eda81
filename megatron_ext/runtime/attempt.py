"""A store for one attempt of a run that torchrun starts again.

torchrun keeps one store for all attempts. The keys that a process group finds there may be those of an earlier attempt: gloo then
connects to ports that are gone, NCCL takes an old identifier. So all ranks first agree on a name that no attempt had before.
"""

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch

SECONDS_BETWEEN_LOOKS = 0.02


def join(timeout: timedelta) -> tuple[Any, int, int]:
    """Meet the other ranks at torchrun's store; all ranks call it.

    Returns:
        A store for the process group of this attempt, this rank, and the number of ranks.
    """
    store, rank, ranks = next(torch.distributed.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # rank 0 keeps the store, a new one in each attempt
        return store, rank, ranks
    return torch.distributed.PrefixStore(agree_on_name(store, rank, ranks, timeout), store), rank, ranks


def agree_on_name(store: Any, rank: int, ranks: int, timeout: timedelta) -> str:
    """A name that only the ranks of this attempt have, whatever earlier attempts have left in the store.

    Each rank leaves a word that it has just made up. Rank 0's is the name: it is given in answer to the words of the others, and
    each confirms it. An answer to an old word reaches nobody, so rank 0 looks again until all have confirmed.

    Raises:
        TimeoutError: on rank 0, not all ranks came.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"word/{rank}", word)
        store.wait([f"name for {word}"], timeout)
        name = store.get(f"name for {word}").decode()
        store.set(f"{name} heard by {rank}", "1")
        return name
    missing, end = set(range(1, ranks)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"word/{other}"]):
                store.set(f"name for {store.get(f'word/{other}').decode()}", word)
            if store.check([f"{word} heard by {other}"]):
                missing.remove(other)
        if time.monotonic() > end:
            raise TimeoutError(f"ranks {sorted(missing)} did not come within {timeout.total_seconds():.0f} s")
        if missing:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    return word
