"""The line that stands beside every figure: the machine's shape and the versions."""

import os
import platform
from importlib import metadata

DISTRIBUTIONS = ("torch", "transformers", "megatron-core")


def machine(distributions: tuple[str, ...] = DISTRIBUTIONS) -> str:
    """Cores, memory and versions, as text."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in distributions)
    return f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GiB; Python {platform.python_version()}, {versions}"
