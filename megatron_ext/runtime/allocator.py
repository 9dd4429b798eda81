"""Memory that a CPU run has freed stays with it, so that the kernel need not hand it out, and clear it, again in every step."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers of the settings, from malloc.h."""
LIMITS = (2**30, 2**25)
"""Bytes from which on blocks are mapped one by one: the first that is taken. Before glibc 2.35 it is 32 MiB at most."""
NEVER = 2**31 - 1
OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables by which a user sets this; what they say stays."""


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, instead of giving blocks above a limit of at most 32 MiB back to the system.

    A step makes and drops tensors of the same sizes again and again. Mapped anew each time, every page is cleared by the kernel:
    a fifth to a third of a step's processor time. The price is a peak that is 5 to 20 % higher, for a block does not always fit
    into the hole that one of the same size left: docs/results/memory.md.

    Returns:
        Whether it was set: not with another C library, nor against the user's own setting.
    """
    if any(name in os.environ for name in OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not any(mallopt(M_MMAP_THRESHOLD, limit) == 1 for limit in LIMITS):
        return False
    return mallopt(M_TRIM_THRESHOLD, NEVER) == 1
