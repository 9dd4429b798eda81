"""Reads the next tensor while the present one is written."""

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
_END = object()


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before is in use: two of them are in memory at a time.

    Raises:
        Exception: what making an item raised, when its turn comes.
    """
    source = iter(items)
    with ThreadPoolExecutor(max_workers=1) as pool, _one_thread():
        coming = pool.submit(next, source, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, source, _END)
            yield item
            del item


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Memory is what limits a conversion: more threads in a product of torch would wait for it in the way of those that sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
