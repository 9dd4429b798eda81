"""Memory that a CPU run has freed goes back to the system, so that its peak is what it holds and not what it has scattered."""

import ctypes
import os

M_MMAP_THRESHOLD = -3
"""glibc's number of the setting, from malloc.h."""
THRESHOLD = 4 * 2**20
OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables by which a user sets this; what they say stays."""


def give_back_freed_memory() -> bool:
    """Let glibc map blocks of 4 MiB and more one by one, and unmap them when they are freed.

    It does so by itself at first, but raises the limit up to 32 MiB as such blocks are freed. Tensors below it then come from a
    heap whose holes an aligned block of the same size does not fit into (before glibc 2.38), so that a step's peak grows by a
    quarter: docs/results/memory.md. The price is that the kernel clears the pages anew, 2 to 4 % of a run's processor time.

    Returns:
        Whether it was set: not with another C library, nor against the user's own setting.
    """
    if any(name in os.environ for name in OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_MMAP_THRESHOLD, THRESHOLD) == 1
