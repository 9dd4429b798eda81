"""Limits the time of calls that may never return."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Patience:
    """Makes calls on a thread of its own, one after the other, and gives up waiting for one that takes too long.

    A call that was given up cannot be ended: it stays on its thread, which does not keep the process from ending, and the next
    one has to wait for it. Only one thread may make calls.
    """

    def __init__(self, seconds: float):
        """
        Args:
            seconds: how long a call may take.
        """
        self.seconds = seconds
        self._last: Future[Any] | None = None

    def call(self, function: Callable[[], T]) -> T:
        """What the function returns.

        Raises:
            TimeoutError: it did not return in time, or the one before still has not.
            Exception: what it raised.
        """
        end = time.monotonic() + self.seconds
        if self._last is not None:
            self._last.exception(self.seconds)
        answer: Future[T] = Future()
        self._last = answer
        threading.Thread(target=_answer, args=(function, answer), daemon=True).start()
        return answer.result(max(0.0, end - time.monotonic()))


def _answer(function: Callable[[], T], answer: Future[T]) -> None:
    try:
        answer.set_result(function())
    except Exception as error:
        answer.set_exception(error)
