"""Initial weights as a pure function of (seed, parameter name): the same model at any parallel layout."""

import hashlib
import math
import re

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.utils import get_pg_rank, get_pg_size

from megatron_ext.model.presets import EncoderConfig

RESIDUAL_PROJECTIONS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


def initialize_parameters(model: torch.nn.Module, encoder: EncoderConfig, vocab_size: int, seed: int) -> None:
    """Fill every parameter of one model chunk: normal matrices, norms at one, biases at zero, padded vocabulary rows at zero.

    The projections back into the residual stream get std / sqrt(2 layers), as GPT-2 does. Each full matrix is drawn on the CPU
    from a generator of its own, and this rank's shard cut out of it.

    Args:
        model: an `EncoderModel`, not wrapped.
        encoder: its shape.
        vocab_size: ids that belong to tokens.
        seed: the run's seed.
    """
    rank, size = get_pg_rank(model.pg_collection.tp), get_pg_size(model.pg_collection.tp)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            if not hasattr(parameter, "tensor_model_parallel"):
                # megatron marks split weights only when it initializes them itself; without the mark the gradient norm
                # would count this rank's part for a copy of the first rank's.
                set_tensor_model_parallel_attributes(parameter, True, _partition_dim(name), 1)
            if parameter.is_meta:  # a dry run has shapes and no numbers
                continue
            name = global_name(model, name)
            residual = name.endswith(RESIDUAL_PROJECTIONS)
            std = encoder.init_std / math.sqrt(2 * encoder.num_layers) if residual else encoder.init_std
            full = _draw(name, _full_shape(name, parameter, size), vocab_size, std, seed)
            shard = _shard(name, full, rank, size)
            parameter.copy_(shard)
            if hasattr(parameter, "get_high_precision_init_val"):
                # Transformer Engine keeps what an FP8 weight was made from, and the optimizer's master weights begin there.
                parameter.get_high_precision_init_val().copy_(shard)


def global_name(model: torch.nn.Module, name: str) -> str:
    """Name with the layer's number in the whole model; a tied head is the embedding."""
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name
    return f"decoder.layers.{model.decoder.layers[int(match[1])].layer_number - 1}.{match[2]}"


def _partition_dim(name: str) -> int:
    """The dimension that tensor parallelism splits: the input's for the residual projections, else the output's."""
    return 1 if name.endswith(RESIDUAL_PROJECTIONS) else 0


def _full_shape(name: str, parameter: torch.Tensor, size: int) -> list[int]:
    shape = list(parameter.shape)
    shape[_partition_dim(name)] *= size
    return shape


def _draw(name: str, shape: list[int], vocab_size: int, std: float, seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if not name.startswith("decoder."):
        # Only rows of real tokens are drawn: the amount of padding depends on the tensor-parallel size.
        full = torch.zeros(shape)
        full[:vocab_size].normal_(std=std, generator=generator)
        return full
    return torch.empty(shape).normal_(std=std, generator=generator)


def _shard(name: str, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    if name.endswith("mlp.linear_fc1.weight"):
        # Each rank holds its rows of the gate, then its rows of the up projection.
        gate, up = full.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return full.chunk(size, dim=_partition_dim(name))[rank]
