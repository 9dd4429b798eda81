"""Builds what single ranks of a large run would build, in one process and without their memory, and counts it.

Model, data-parallel wrapper, optimizer and checkpoint plan come from the trainer's own builders, over a fake process group and on
torch's meta device, whose tensors have shapes and no numbers. What is refused there is refused here in the same words.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

from megatron_ext.checkpoint_files import read_run_file
from megatron_ext.config import PrecisionConfig, RunConfig
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.model.presets import padded_vocab_size
from megatron_ext.objective import OBJECTIVES, PhasePlan
from megatron_ext.plan.communication import step_traffic
from megatron_ext.plan.hardware import GPUS, Gpu
from megatron_ext.plan.memory import RankMemory, fp8_copies, rank_memory
from megatron_ext.runtime.backend import Backend, expected_backend, pretended_backend
from megatron_ext.runtime.cpu import patch_megatron, without_numbers
from megatron_ext.runtime.topology import pretended_groups
from megatron_ext.train.build import build_model, wrap_model
from megatron_ext.train.checkpoint import sharded_state
from megatron_ext.train.optimizer import build_optimizer
from megatron_ext.train.preflight import Structure, backend_request, check_structure, resolve_vocabulary, weights_dtype


@dataclass(frozen=True)
class Group:
    """A process group of a rank."""

    size: int
    ranks: list[int]
    """Its members."""


@dataclass(frozen=True)
class CheckpointPlan:
    """What a rank adds to a checkpoint."""

    tensors: int
    """Sharded tensors that this rank writes."""
    bytes: int
    keys: list[str]
    """Names of the tensors that it holds a part of, its own to write or not."""


@dataclass(frozen=True)
class RankReport:
    """What one rank builds, sends and writes."""

    rank: int
    stage: int
    holds: list[str]
    """`embedding` and `head`, where it holds them."""
    parameters: int
    memory: RankMemory
    """Weights, gradients and optimizer from the objects that were built; the rest by formula."""
    traffic: dict[str, float]
    """Bytes sent a step, by kind."""
    groups: dict[str, Group]
    checkpoint: CheckpointPlan
    seconds: float
    """That building it took."""


@dataclass(frozen=True)
class DryRun:
    """A run as it would be built."""

    layout: str
    world_size: int
    layers: str
    """Whose modules were built: `local` or `transformer_engine`."""
    precision: str
    vocab_size: int
    padded_vocab_size: int
    vocabulary_from: str
    predicted_share: float
    """Largest share of tokens with logits in any phase: what activations and traffic were counted with."""
    micro_batches: int
    ranks: list[RankReport]
    unchecked: list[str]
    """What only the run itself can check."""


def dry_run(
    config: RunConfig,
    world_size: int,
    ranks: Sequence[int] | None = None,
    vocab_size: int | None = None,
    gpu: Gpu = GPUS["h100"],
) -> DryRun:
    """Build some ranks of a run.

    Args:
        config: the run.
        world_size: number of ranks that it would have.
        ranks: which to build; None: one of each kind, which is the first of each pipeline stage.
        vocab_size: ids that belong to tokens; None: those of the tokenizer, or of the checkpoint that the run begins with.
        gpu: what the run will have, with Transformer Engine.

    Raises:
        UserError: what the trainer would refuse, or a rank or a vocabulary that there is not.
    """
    expected = expected_backend(backend_request(config), gpu.capability)
    structure = check_structure(config, world_size, expected)
    layout = structure.layout
    for rank in ranks or ():
        if not 0 <= rank < world_size:
            raise UserError(f"--rank is {rank}: it must lie between 0 and {world_size - 1}")
    vocab_size, origin, unchecked = _vocabulary(config, vocab_size)
    backend = pretended_backend(expected)
    if backend.layers != expected.layers:
        unchecked = [*unchecked, "Transformer Engine's modules (not installed here: torch's layers stand for them)"]
    if config.precision.fp8_parameters:
        unchecked = [*unchecked, "FP8 weights (only a GPU makes them: built in bfloat16, their bytes by formula)"]
    patch_megatron()
    chosen = ranks if ranks is not None else [stage * (world_size // layout.pipeline) for stage in range(layout.pipeline)]
    return DryRun(
        layout=str(layout),
        world_size=world_size,
        layers=backend.layers,
        precision=config.precision.label,
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size(vocab_size, layout.tensor),
        vocabulary_from=origin,
        predicted_share=largest_predicted_share(structure.plan),
        micro_batches=layout.micro_batches(config.training),
        ranks=[_build_rank(config, structure, backend, vocab_size, rank) for rank in chosen],
        unchecked=[*unchecked, "data.train and data.validation", "device and driver of the run's machines"],
    )


def largest_predicted_share(plan: PhasePlan) -> float:
    """Share of the tokens that get logits in the phase with the most of them."""
    shares = []
    for phase in plan.phases:
        masked = max(phase.masking.ratio, phase.masking.final_ratio or 0.0)
        shares += [masked if OBJECTIVES[name].corrupts else 1.0 for name in phase.weights]
    return max(shares)


def _vocabulary(config: RunConfig, given: int | None) -> tuple[int, str, list[str]]:
    """Vocabulary size, where it is from, and what could not be checked of it."""
    size, origin, unchecked = given, "--vocab-size", ["data.tokenizer"]
    if given is not None and given < 1:
        raise UserError(f"--vocab-size is {given}: it must be greater than 0")
    if given is None and Path(config.data.tokenizer).exists():
        tokenizer = load_tokenizer(config.data.tokenizer)
        resolve_vocabulary(config, tokenizer)
        size, origin, unchecked = tokenizer.vocab_size, f"data.tokenizer {config.data.tokenizer}", []
    if given is None and config.model.checkpoint is not None:
        stored = read_run_file(Path(config.model.checkpoint))["vocab_size"]
        if stored > (size or 0):
            size, origin = stored, f"model.checkpoint {config.model.checkpoint}"
    if size is None:
        raise UserError(f"data.tokenizer {config.data.tokenizer} is not here: give the vocabulary with --vocab-size")
    return size, origin, unchecked


def _build_rank(config: RunConfig, structure: Structure, backend: Backend, vocab_size: int, rank: int) -> RankReport:
    started = time.perf_counter()
    layout, dtype = structure.layout, weights_dtype(config)
    stage = rank // (layout.world_size // layout.pipeline)
    numbers = (structure.encoder, vocab_size, layout, config.training, config.precision, config.data.sequence_length, stage)
    share = largest_predicted_share(structure.plan)
    precision = _buildable(config.precision)
    with pretended_groups(layout, backend, rank), without_numbers(backend.capability):
        bare = build_model(
            structure.encoder, vocab_size, layout, backend, dtype, config.training.seed, precision, config.training.recompute
        )
        chunks = wrap_model(bare, layout)
        optimizer = build_optimizer(config.optimizer, chunks, dtype, layout.distributed_optimizer, precision)
        state = sharded_state(bare, optimizer, is_loading=True)  # this also makes the moments
        memory = rank_memory(*numbers, share)
        if precision == config.precision:
            copies = fp8_copies(structure.encoder, vocab_size, layout, config.precision, stage)
            memory = dataclasses.replace(
                memory,
                weights=weight_bytes(chunks) + copies,
                gradients=sum(_bytes(buffer.grad_data) for chunk in chunks for buffer in chunk.buffers),
                optimizer=optimizer_bytes(optimizer),
            )
        return RankReport(
            rank=rank,
            stage=stage,
            holds=_holds(bare),
            parameters=sum(parameter.numel() for chunk in bare for parameter in chunk.parameters()),
            memory=memory,
            traffic=step_traffic(*numbers, share),
            groups=_groups(),
            checkpoint=_checkpoint_plan(state),
            seconds=time.perf_counter() - started,
        )


def _buildable(precision: PrecisionConfig) -> PrecisionConfig:
    """The recipe without FP8 weights, which Transformer Engine can make only where there is a GPU."""
    return dataclasses.replace(precision, fp8_parameters=False)


def weight_bytes(chunks: Sequence[torch.nn.Module]) -> int:
    """Bytes of the weights of wrapped model chunks: of megatron's buffers, where they lie in such, or of their own."""
    total = 0
    for chunk in chunks:
        buffers = [buffer.param_data for buffer in chunk.buffers if buffer.param_data is not None]
        total += sum(map(_bytes, buffers if buffers else chunk.parameters()))
    return total


def optimizer_bytes(optimizer: Any) -> int:
    """Bytes of moments and master weights of megatron's optimizer; the moments must exist."""
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        total += sum(_bytes(value) for state in part.optimizer.state.values() for value in state.values() if torch.is_tensor(value))
        for groups in (getattr(part, name, ()) for name in ("fp32_from_float16_groups", "shard_fp32_from_float16_groups")):
            total += sum(_bytes(tensor) for group in groups for tensor in group if tensor is not None)
    return total


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _holds(chunks: Sequence[Any]) -> list[str]:
    parts = {"embedding": any(chunk.pre_process for chunk in chunks), "head": any(chunk.post_process for chunk in chunks)}
    return [name for name, is_held in parts.items() if is_held]


def _groups() -> dict[str, Group]:
    """The process groups of the rank that is being built, by what they are for."""
    found = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "data and context": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    return {name: Group(group.size(), torch.distributed.get_process_group_ranks(group)) for name, group in found.items()}


def _checkpoint_plan(state: Any) -> CheckpointPlan:
    tensors = list(_sharded(state))
    written = [tensor for tensor in tensors if is_main_replica(tensor.replica_id)]
    size = sum(tensor.data.numel() * tensor.dtype.itemsize for tensor in written)
    return CheckpointPlan(len(written), size, sorted({tensor.key for tensor in tensors}))


def _sharded(tree: Any) -> Iterator[ShardedTensor]:
    """The sharded tensors of a nested state; those that megatron splits when it saves, split."""
    if isinstance(tree, ShardedTensorFactory):
        yield from _sharded(tree.build())
    elif isinstance(tree, ShardedTensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _sharded(value)
