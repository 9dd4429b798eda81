"""Scales of Transformer Engine's delayed scaling in a checkpoint, as plain tensors.

Transformer Engine pickles what an FP8 module knows into a tensor of bytes, and unpickles it when the module is loaded; a pickle is
code, and checkpoints hold none (docs/security.md). Its other recipes keep nothing. That a resumed run takes them up is untested
on a GPU.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

EXTRA_STATE = "_extra_state"
DIRECTIONS = ("scaling_fwd", "scaling_bwd")
TENSORS = ("scale", "amax_history")


def take_out(chunk: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The sharded state of a model chunk, with tensors in place of Transformer Engine's bytes."""
    for key, value in state.items():
        if key.endswith(EXTRA_STATE) and isinstance(value, ShardedObject):
            tensors = _scales(_module(chunk, key))
            if tensors:
                value.data = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    return state


def put_back(chunk: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Give the modules of a chunk the scales that were loaded.

    Those of another recipe, or of a history of another length, are left: the modules begin anew.

    Returns:
        The state without them.
    """
    loaded = {key: value for key, value in state.items() if key.endswith(EXTRA_STATE) and isinstance(value, dict)}
    for key, stored in loaded.items():
        module = _module(chunk, key)
        if hasattr(module, "fp8_meta") and chunk.config.fp8 and chunk.config.fp8_recipe == "delayed":
            _restore(module, stored, chunk.config)
    return {**state, **dict.fromkeys(loaded)}


def _restore(module: Any, stored: dict[str, Any], config: Any) -> None:
    from megatron.core.fp8_utils import get_fp8_recipe

    module.fp8_meta["recipe"] = get_fp8_recipe(config)
    module.init_fp8_meta_tensors(module.fp8_meta["recipe"])
    own = _scales(module)
    if all(isinstance(stored.get(name), Tensor) and stored[name].shape == tensor.shape for name, tensor in own.items()):
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def _scales(module: torch.nn.Module) -> dict[str, Tensor]:
    """A Transformer Engine module's scales and histories; empty without delayed scaling, and for any other module."""
    meta = getattr(module, "fp8_meta", {})
    directions = [(name, meta[name]) for name in DIRECTIONS if hasattr(meta.get(name), "amax_history")]
    return {f"{name}.{field}": getattr(state, field) for name, state in directions for field in TENSORS}


def _module(chunk: torch.nn.Module, key: str) -> torch.nn.Module:
    return chunk.get_submodule(key.removesuffix(EXTRA_STATE).removesuffix("."))
