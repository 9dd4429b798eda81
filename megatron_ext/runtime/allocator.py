"""Memory that a CPU run has freed goes back to the system, so that its peak is what it holds and not what it has scattered."""

import ctypes
import os

M_MMAP_THRESHOLD = -3
"""glibc's number of the setting, from malloc.h."""
THRESHOLD = 2**20
OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables by which a user sets this; what they say stays."""


def give_back_freed_memory() -> bool:
    """Let glibc map blocks of 1 MiB and more one by one, and unmap them when they are freed.

    It does so by itself at first, but raises the limit up to 32 MiB as such blocks are freed. Tensors below it then come from a
    heap whose holes an aligned block of the same size does not fit into (before glibc 2.38): a step's peak grew by a quarter to
    a half. The price is that the kernel clears the pages anew, a few percent of a run's processor time: docs/results/memory.md.

    Returns:
        Whether it was set: not with another C library, nor against the user's own setting.
    """
    if any(name in os.environ for name in OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_MMAP_THRESHOLD, THRESHOLD) == 1
