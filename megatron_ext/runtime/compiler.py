"""Leaves torch's compiler out where nothing is compiled: half of the time that importing megatron-core takes."""

import sys
import types
from typing import Any

JIT = "megatron.core.jit"


def leave_out_compiler() -> None:
    """On a machine without a GPU, import megatron-core without Inductor. Call it before megatron-core is imported."""
    import torch

    if not torch.cuda.is_available():
        install_stand_in()


def install_stand_in() -> None:
    """Have megatron-core leave its functions as they are written, without looking for a GPU.

    megatron-core hands some forty functions to `torch.compile` while it is imported, and the first of them imports the compiler.
    They are fused kernels for a GPU; on a CPU the few that are called at all run as they are.
    """
    if JIT in sys.modules:
        return
    module = types.ModuleType(JIT)
    module.jit_fuser = module.noop_decorator = _as_it_is
    module.enable_jit_fuser = module.disable_jit_fuser = lambda: None
    sys.modules[JIT] = module


def _as_it_is(function: Any) -> Any:
    return function
