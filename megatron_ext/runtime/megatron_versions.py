"""The megatron-core versions that are supported, and all in which they differ for this stack. Only this module asks for them.

`make test-compat` runs the tests under the newest of them; docs/results/compatibility.md says what came out.
"""

import importlib
from typing import Any

from megatron_ext.errors import UserError

SUPPORTED = ((0, 16), (0, 19))
"""First and last megatron-core (major, minor) that the patches in `cpu.py` and `writer.py` were checked against."""

CHECKPOINTING = "megatron.core.dist_checkpointing"


def installed_version() -> tuple[int, int]:
    """(major, minor) of the installed megatron-core."""
    from megatron.core.package_info import MAJOR, MINOR

    return MAJOR, MINOR


def check_version() -> None:
    """Refuse a megatron-core that nobody has looked at.

    Raises:
        UserError: it is outside `SUPPORTED`.
    """
    from megatron.core.package_info import __version__

    if not SUPPORTED[0] <= installed_version() <= SUPPORTED[1]:
        first, last = (".".join(map(str, version)) for version in SUPPORTED)
        raise UserError(f"megatron-core {__version__} is installed: this version of megatron_ext supports {first} to {last}")


def common_writer() -> tuple[Any, str] | None:
    """Where the function lies that writes `common.pt` from (state, folder), and its name: a method in 0.16, a function since.

    None from 0.19 on, which keeps that state among the shards and writes no such file.
    """
    version = installed_version()
    if version >= (0, 19):
        return None
    if version >= (0, 17):
        return importlib.import_module(f"{CHECKPOINTING}.serialization"), "save_common"
    return importlib.import_module(f"{CHECKPOINTING}.strategies.common").TorchCommonSaveStrategy, "save_common"


def results_queue() -> tuple[Any, str]:
    """The module of the checkpoint writers, and the name of its function for the queue they report to: public since 0.17."""
    module = importlib.import_module(f"{CHECKPOINTING}.strategies.filesystem_async")
    return module, "get_write_results_queue" if installed_version() >= (0, 17) else "_get_write_results_queue"


def asynchronous_arguments() -> dict[str, Any]:
    """What an asynchronous `dist_checkpointing.save` needs beside the flag: since 0.17 there are two writers to choose from."""
    return {"async_strategy": "mcore"} if installed_version() >= (0, 17) else {}
