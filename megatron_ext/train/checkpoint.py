"""Checkpoints: what is in them, how they are published, found, verified and loaded.

A checkpoint is a directory `step_00001000/` with megatron's `torch_dist` shards, the tokenizer, and `run.json`, written last.
It is put together aside and published by one rename, so a reader sees a whole checkpoint or none. The newest one is found by
listing, not stored. Layers are saved one by one under their own names, which is what lets a converter read tensor by tensor
and any pipeline layout load what another saved.
"""

import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from torch.distributed.checkpoint import CheckpointException

from megatron_ext.checkpoint_files import (
    FORMAT,
    RUN_FILE,
    checkpoint_name,
    complete_checkpoints,
    describe_files,
    find_damage,
    read_run_file,
    step_of,
)
from megatron_ext.errors import UserError
from megatron_ext.train.optimizer_state import adapt_loaded_state, redirect_master_weights
from megatron_ext.train.preflight import RunSetup
from megatron_ext.unpickling import only_plain_data, read_metadata, refuse_foreign_code

TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "config.json")
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
        state[name] = chunk.sharded_state_dict(metadata=metadata)
        model.update({f"{name}.{key}" if len(chunks) > 1 else key: value for key, value in state[name].items()})
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            model if len(chunks) == 1 else _by_chunk(state), is_loading=is_loading, metadata=metadata
        )
    return state


def _by_chunk(state: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in state.items() if name.startswith("model")}


def save_checkpoint(
    folder: Path, setup: RunSetup, record: dict[str, Any], chunks: Sequence[torch.nn.Module], optimizer: Any
) -> Path:
    """Write and publish a checkpoint; all ranks call it together.

    Args:
        folder: the run's checkpoint folder.
        setup: the run.
        record: what `run.json` says of the run's progress; must hold `step`.
        chunks: this rank's model chunks, without their wrappers.
        optimizer: megatron's optimizer.

    Returns:
        The published directory.
    """
    final = folder / checkpoint_name(record["step"])
    aside = folder / f".writing-{final.name}"
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(sharded_state(chunks, optimizer, is_loading=False), str(aside))
    torch.distributed.barrier()
    if is_first:
        _copy_tokenizer(setup.tokenizer.source, aside / TOKENIZER_FOLDER)
        _write_run_file(aside, setup, record)
        _check_files(aside)
        aside.rename(final)
    torch.distributed.barrier()
    return final


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a SentencePiece file, or a folder's tokenizer files: a model folder holds weights too, which do not belong here."""
    target.mkdir()
    names = TOKENIZER_FILES if source.is_dir() else (source.name,)
    folder = source if source.is_dir() else source.parent
    for path in {path for name in names for path in folder.glob(name)}:
        shutil.copy(path, target)


def _write_run_file(aside: Path, setup: RunSetup, record: dict[str, Any]) -> None:
    source = setup.tokenizer.source
    files = sorted(str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file())
    full = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **record,
        "encoder": vars(setup.encoder),
        "vocab_size": setup.vocab_size,
        "padded_vocab_size": setup.padded_vocab_size,
        "tokenizer": {
            "path": TOKENIZER_FOLDER if source.is_dir() else f"{TOKENIZER_FOLDER}/{source.name}",
            "fingerprint": setup.tokenizer.fingerprint,
        },
        "data": setup.data_record,
        "parallel": vars(setup.layout),
        "backend": setup.backend.name,
        "config": setup.config.as_dict(),
        "versions": {name: metadata.version(name) for name in ("torch", "megatron-core")},
        "files": describe_files(aside, files),
    }
    with open(aside / RUN_FILE, "w") as file:
        json.dump(full, file, indent=1)


def _check_files(checkpoint: Path) -> None:
    """What was written can be read: the run file parses, and every byte that megatron's index names is there."""
    read_run_file(checkpoint)
    read_metadata(checkpoint)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def load_checkpoint(checkpoint: Path, chunks: Sequence[torch.nn.Module], optimizer: Any | None) -> None:
    """Fill the model, and the optimizer if there is one, from a checkpoint saved at any layout.

    Raises:
        UserError: a file is missing or damaged, or holds code.

    Args:
        checkpoint: a published checkpoint.
        chunks: this rank's model chunks, without their wrappers.
        optimizer: megatron's optimizer, or None.
    """
    damage = find_damage(checkpoint)
    if damage:
        raise UserError(f"checkpoint {checkpoint} is damaged: {'; '.join(damage)}")
    stored = refuse_foreign_code(checkpoint).state_dict_metadata
    wanted = sharded_state(chunks, optimizer, is_loading=True)
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
        raise UserError(f"checkpoint {checkpoint} cannot be read ({type(cause).__name__}: {_first_line(cause)})") from error
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state["model" if len(chunks) == 1 else f"model{number}"])
    if optimizer is not None:
        optimizer.load_state_dict({**adapt_loaded_state(state["optimizer"], optimizer), "param_state_sharding_type": sharding})


def remove_old_checkpoints(folder: Path, keep_last: int, edges: set[int]) -> None:
    """Keep the newest `keep_last` interval checkpoints, and those at the steps in `edges` for ever; 0 keeps all."""
    if keep_last == 0:
        return
    passing = [path for path in complete_checkpoints(folder) if step_of(path) not in edges]
    for path in passing[:-keep_last]:
        _remove(path)


def _remove(checkpoint: Path) -> None:
    """Take a published checkpoint away; it is whole under its name until it is gone."""
    aside = checkpoint.with_name(f".removing-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)
