"""The layout of the ranks: sizes that must fit together, process groups, and this rank's place in them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

from megatron_ext.config import ParallelConfig, TrainingConfig
from megatron_ext.errors import UserError
from megatron_ext.runtime.attempt import join
from megatron_ext.runtime.backend import Backend, own_device


@dataclass(frozen=True)
class Layout:
    """Parallel sizes of a run; they multiply to the number of ranks."""

    world_size: int
    tensor: int
    pipeline: int
    virtual_pipeline: int
    context: int
    data: int
    sequence_parallel: bool
    distributed_optimizer: bool
    overlap_gradient_reduce: bool = False
    overlap_parameter_gather: bool = False
    overlap_tensor_communication: bool = False

    def __str__(self) -> str:
        interleaved = f" x{self.virtual_pipeline} chunks" if self.virtual_pipeline > 1 else ""
        sequence = "+SP" if self.sequence_parallel else ""
        context = f" x CP{self.context}" if self.context > 1 else ""
        return f"TP{self.tensor}{sequence} x PP{self.pipeline}{interleaved}{context} x DP{self.data}"

    def micro_batches(self, training: TrainingConfig) -> int:
        """Micro-batches that one data-parallel rank runs in one optimizer step."""
        return training.global_batch_size // (training.micro_batch_size * self.data)


def check_layout(
    parallel: ParallelConfig,
    training: TrainingConfig,
    num_layers: int,
    shards: dict[str, int],
    world_size: int,
    *,
    tokens: int | None = None,
) -> Layout:
    """Check that the sizes fit together. The only place where they are multiplied.

    Args:
        parallel: the configured sizes.
        training: batch sizes.
        num_layers: transformer layers of the model.
        shards: sizes that tensor parallelism splits, by name: heads, key/value heads, FFN width.
        world_size: number of ranks.
        tokens: of a micro-batch, which context and sequence parallelism split; None where none is ever run.

    Raises:
        UserError: naming the factor that does not fit.
    """
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_ranks:
        context = f" x parallel.context {parallel.context}" if parallel.context > 1 else ""
        raise UserError(
            f"{world_size} ranks cannot hold parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline}{context} = "
            f"{model_ranks}: start a multiple of {model_ranks} ranks"
        )
    data = world_size // model_ranks
    for name, size in shards.items():
        if size % parallel.tensor:
            raise UserError(f"parallel.tensor is {parallel.tensor}: it does not divide {name} {size}")
    if tokens is not None:
        _check_tokens(parallel, tokens)
    stages = parallel.pipeline * parallel.virtual_pipeline
    if num_layers % stages:
        raise UserError(
            f"model.num_layers {num_layers} does not divide into parallel.pipeline {parallel.pipeline} x "
            f"parallel.virtual_pipeline {parallel.virtual_pipeline} = {stages} stages"
        )
    samples = training.micro_batch_size * data
    if training.global_batch_size % samples:
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of training.micro_batch_size "
            f"{training.micro_batch_size} x {data} data-parallel ranks = {samples}"
        )
    micro_batches = training.global_batch_size // samples
    if parallel.virtual_pipeline > 1 and micro_batches % parallel.pipeline:
        raise UserError(
            f"{micro_batches} micro-batches a step do not divide by parallel.pipeline {parallel.pipeline}: the interleaved "
            f"schedule needs that; change training.global_batch_size {training.global_batch_size}"
        )
    return Layout(
        world_size=world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        data=data,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        distributed_optimizer=parallel.distributed_optimizer,
        overlap_gradient_reduce=parallel.overlap_gradient_reduce,
        overlap_parameter_gather=parallel.overlap_parameter_gather,
        overlap_tensor_communication=parallel.overlap_tensor_communication,
    )


def _check_tokens(parallel: ParallelConfig, tokens: int) -> None:
    if tokens % parallel.tensor:
        raise UserError(f"parallel.tensor is {parallel.tensor}: it does not divide the tokens of a micro-batch, {tokens}")
    if tokens % (parallel.context * parallel.tensor):
        tensor = f" x parallel.tensor {parallel.tensor}" if parallel.tensor > 1 else ""
        raise UserError(
            f"parallel.context is {parallel.context}: parallel.context{tensor} does not divide the tokens of a micro-batch, "
            f"{tokens} (training.micro_batch_size x data.sequence_length)"
        )


def world_size_from_environment() -> int:
    """Ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank_from_environment() -> int:
    """This process's rank under torchrun; 0 without."""
    return int(os.environ.get("RANK", 0))


@contextmanager
def pretended_groups(layout: Layout, backend: Backend, rank: int) -> Iterator[None]:
    """Context with the groups that one rank of this layout would have, in a single process; nothing is ever sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        with process_groups(layout, backend):
            yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def default_group(timeout: timedelta = timedelta(minutes=10)) -> Iterator[None]:
    """Context with the default process group, and with this rank's device bound; megatron's groups are not made.

    One that is there already is left alone. Otherwise it is made from torchrun's environment, or of this one rank on a free local
    port, and destroyed at the end.
    """
    if torch.distributed.is_initialized():
        yield
        return
    device = own_device()
    _make_default_group("nccl" if device.type == "cuda" else "gloo", device, timeout)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def process_groups(layout: Layout, backend: Backend, timeout: timedelta = timedelta(minutes=10)) -> Iterator[None]:
    """Context with megatron's groups for this layout, and with the device bound.

    The time-out is that of all groups, the default one and megatron's. The default process group is made if there is none: from
    torchrun's environment, or of this one rank on a free local port. What was made is destroyed at the end.
    """
    makes_default = not torch.distributed.is_initialized()
    initialize(layout, backend, timeout)
    try:
        yield
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        if makes_default:
            torch.distributed.destroy_process_group()


def initialize(layout: Layout, backend: Backend, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Create the default process group, if there is none, and megatron's groups for this layout; bind the device."""
    from megatron.core import parallel_state

    if not torch.distributed.is_initialized():
        _make_default_group(backend.communication, backend.device, timeout)
    elif backend.device.type == "cuda":
        torch.cuda.set_device(backend.device)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        distributed_timeout_minutes=timeout / timedelta(minutes=1),  # a fraction is as good: it goes into a timedelta
        create_gloo_process_groups=backend.communication != "fake",
    )


def _make_default_group(communication: str, device: torch.device, timeout: timedelta) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        store, rank, ranks = join(timeout)
    else:
        store, rank, ranks = torch.distributed.TCPStore("localhost", 0, 1, is_master=True), 0, 1
    torch.distributed.init_process_group(communication, store=store, rank=rank, world_size=ranks, timeout=timeout)
