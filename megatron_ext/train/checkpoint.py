"""What a checkpoint holds, as megatron's sharded tensors, and loading it at any layout.

A checkpoint is a directory `step_00001000/` with megatron's `torch_dist` shards, the tokenizer, and `run.json`. `saving.py` writes
it. Layers are saved one by one under their own names, which is what lets a converter read tensor by tensor and any pipeline layout
load what another saved.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint import CheckpointException

from megatron_ext.checkpoint_files import FP8_HISTORY
from megatron_ext.errors import UserError, one_line
from megatron_ext.train.engine_state import put_back, take_out
from megatron_ext.train.optimizer_state import adapt_loaded_state, redirect_master_weights
from megatron_ext.unpickling import only_plain_data, refuse_foreign_code

# Layers under their own names; optimizer shards gathered so that any layout can load them.
SHARDING = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}


def sharded_state(chunks: Sequence[torch.nn.Module], optimizer: Any | None, is_loading: bool) -> dict[str, Any]:
    """What is saved, as megatron's sharded tensors.

    Args:
        chunks: this rank's model chunks, without their wrappers.
        optimizer: megatron's optimizer, or None for the weights alone.
        is_loading: the tensors are to be filled.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {**SHARDING, "dp_cp_group": group}
    model: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for number, chunk in enumerate(chunks):
        name = "model" if len(chunks) == 1 else f"model{number}"
        state[name] = take_out(chunk, chunk.sharded_state_dict(metadata=metadata))
        model.update({f"{name}.{key}" if len(chunks) > 1 else key: value for key, value in state[name].items()})
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            model if len(chunks) == 1 else _by_chunk(state), is_loading=is_loading, metadata=metadata
        )
    return state


def _by_chunk(state: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in state.items() if name.startswith("model")}


def _leave_out_absent_fp8_states(wanted: dict[str, Any], stored: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Ask for no state of FP8 layers where there is none: in a checkpoint that was imported, or trained with another recipe.

    Returns:
        For each chunk the names that were left out, with the value that they begin with.
    """
    absent: dict[str, dict[str, Any]] = {}
    for name, part in _by_chunk(wanted).items():
        absent[name] = {key: _beginning(value) for key, value in part.items() if _is_absent(key, value, stored)}
        for key in absent[name]:
            del part[key]
    return absent


def _is_absent(key: str, value: Any, stored: dict[str, Any]) -> bool:
    if key.endswith("_extra_state") and isinstance(value, ShardedObject):
        return value.unique_key not in stored
    if key.endswith(FP8_HISTORY):  # one of another length says something else
        return value.key not in stored or tuple(stored[value.key].size) != tuple(value.global_shape)
    return False


def _beginning(value: Any) -> Any:
    return None if isinstance(value, ShardedObject) else value.data


def load_checkpoint(checkpoint: Path, chunks: Sequence[torch.nn.Module], optimizer: Any | None) -> None:
    """Fill the model, and the optimizer if there is one, from a checkpoint saved at any layout.

    Raises:
        UserError: it cannot be read, or holds code. Whether every byte is as written is asked before (`resume.check_files`).

    Args:
        checkpoint: a published checkpoint.
        chunks: this rank's model chunks, without their wrappers.
        optimizer: megatron's optimizer, or None.
    """
    stored = refuse_foreign_code(checkpoint).state_dict_metadata
    wanted = sharded_state(chunks, optimizer, is_loading=True)
    absent = _leave_out_absent_fp8_states(wanted, stored)
    if optimizer is not None:
        redirect_master_weights(wanted["optimizer"], set(stored))
        sharding = wanted["optimizer"].get("param_state_sharding_type")
    try:
        with only_plain_data(checkpoint):
            state = dist_checkpointing.load(wanted, str(checkpoint))
    except CheckpointException as error:  # torch's own, and not an Exception
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"checkpoint {checkpoint} cannot be read ({one_line(cause)})") from error
    for number, chunk in enumerate(chunks):
        name = "model" if len(chunks) == 1 else f"model{number}"
        chunk.load_state_dict(put_back(chunk, state[name]) | absent[name])
    if optimizer is not None:
        optimizer.load_state_dict({**adapt_loaded_state(state["optimizer"], optimizer), "param_state_sharding_type": sharding})
