"""This rank's share of the batches, and every gradient in its full shape: how the ranks of a layout are put together again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.data.batch import MicroBatch
from megatron_ext.doctor.small_model import VOCAB_SIZE
from megatron_ext.model.initialization import global_name
from megatron_ext.model.layers import FUSED_NAMES

TIED_COPY = "the head's copy of the tied embedding"


def own_share(batches: list[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches of this data-parallel rank."""
    return batches[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]


def whole_gradients(bare: Sequence[Any], wrapped: Sequence[Any], distributed_optimizer: bool) -> dict[str, Tensor]:
    """Every gradient in its full shape, by the parameter's name in the whole model; all ranks call it together.

    Args:
        bare: this rank's chunks.
        wrapped: the same, wrapped for data parallelism.
        distributed_optimizer: each data-parallel rank has summed up only its own share of the gradients.
    """
    if distributed_optimizer:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for bucket in (bucket for chunk in wrapped for buckets in chunk.bucket_groups for bucket in buckets.buckets):
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=group)
    return gather(bare, lambda parameter: parameter.main_grad)


def gather(chunks: Sequence[Any], tensor_of: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """A tensor per parameter in its full shape, under the name that the local layers give it in the whole model.

    Args:
        chunks: bare chunks.
        tensor_of: parameter -> this rank's part.
    """
    shards = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            is_copy = name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
            shards[TIED_COPY if is_copy else local_name(global_name(chunk, name))] = tensor_of(parameter).detach().cpu().clone()
    everything: list[Any] = [None] * torch.distributed.get_world_size()
    place = (parallel_state.get_data_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
    torch.distributed.all_gather_object(everything, (place, shards))
    parts: dict[str, dict[int, Tensor]] = {}
    for (data_rank, tensor_rank), found in everything:
        if data_rank == 0:
            for name, tensor in found.items():
                parts.setdefault(name, {})[tensor_rank] = tensor
    return {name: _join(name, [tensors[rank] for rank in sorted(tensors)]) for name, tensors in parts.items()}


def local_name(name: str) -> str:
    """Transformer Engine's name of a fused norm as the local layers have it; other names as they are."""
    for local, fused in FUSED_NAMES.items():
        name = name.replace(fused, local)
    return name


def _join(name: str, parts: list[Tensor]) -> Tensor:
    """Tensor-parallel shards as one tensor, without the rows that pad the vocabulary."""
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return torch.cat(parts, dim=1)
    if name.endswith("linear_fc1.weight"):
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    if parts[0].dim() == 1 and not name.endswith("linear_qkv.bias"):
        return parts[0]
    whole = torch.cat(parts)
    return whole[:VOCAB_SIZE] if name.endswith(("word_embeddings.weight", "output_layer.weight", TIED_COPY)) else whole
