"""Small models, batches and gathered gradients for the distributed tests."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_ext.config import MaskingConfig, ParallelConfig, TrainingConfig
from megatron_ext.data.batch import MicroBatch, collate
from megatron_ext.model.presets import EncoderConfig
from megatron_ext.objective import MASK_STREAM, OBJECTIVES, Vocabulary, make_example, random_generator

VOCAB_SIZE = 251
SEQUENCE_LENGTH = 48
MICRO_BATCHES = 8
ENCODER = EncoderConfig(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=16,
    init_std=0.1,
    max_position_embeddings=SEQUENCE_LENGTH,
)
SPECIAL = 5
MASK_ID = 1


@dataclass(frozen=True)
class Case:
    """One layout to be compared with one rank."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    sequence: bool = True
    distributed_optimizer: bool = False
    tied: bool = False

    def parallel(self) -> ParallelConfig:
        """The configured sizes."""
        return ParallelConfig(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline,
            sequence=self.sequence,
            distributed_optimizer=self.distributed_optimizer,
        )


def make_vocabulary() -> Vocabulary:
    """Ids 0..4 are special; every third piece continues a word."""
    return Vocabulary(MASK_ID, np.arange(VOCAB_SIZE) < SPECIAL, np.arange(VOCAB_SIZE) % 3 != 0)


def make_batch(number: int, objective: str, packed: bool) -> MicroBatch:
    """Micro-batch `number` of a made-up corpus: two samples of random tokens, cut into documents."""
    generator = np.random.default_rng(number)
    examples, segments = [], []
    for sample in range(2):
        tokens = generator.integers(SPECIAL, VOCAB_SIZE, size=SEQUENCE_LENGTH)
        cuts = np.sort(generator.choice(np.arange(1, SEQUENCE_LENGTH), size=3, replace=False))
        segments.append(np.diff([0, *cuts, SEQUENCE_LENGTH]))
        masks = random_generator(7, MASK_STREAM, 2 * number + sample)
        masking = MaskingConfig()
        examples.append(make_example(tokens, segments[-1], OBJECTIVES[objective], masking, masking.ratio, make_vocabulary(), masks))
    return collate(examples, segments, OBJECTIVES[objective], documents_attend_across=not packed, restart_positions=packed)


def start(case: Case) -> tuple[Any, Any]:
    """Lay megatron's process groups out for a case; returns layout and backend."""
    from megatron.core import parallel_state

    from megatron_ext.runtime.backend import choose_backend
    from megatron_ext.runtime.topology import check_layout, initialize

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    training = TrainingConfig(micro_batch_size=2, global_batch_size=2 * MICRO_BATCHES)
    layout = check_layout(case.parallel(), training, ENCODER.num_layers, {}, torch.distributed.get_world_size())
    backend = choose_backend("auto")
    initialize(layout, backend)
    return layout, backend


def build(case: Case) -> tuple[list[Any], list[Any], Any]:
    """Bare chunks, wrapped chunks and layout for a case."""
    import dataclasses

    from megatron_ext.train.build import build_model, wrap_model

    layout, backend = start(case)
    encoder = dataclasses.replace(ENCODER, tie_embeddings=case.tied)
    bare = build_model(encoder, VOCAB_SIZE, layout, backend, torch.float32, seed=3)
    return bare, wrap_model(bare, case.distributed_optimizer), layout


def data_parallel_share(batches: list[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches of this data-parallel rank."""
    from megatron.core import parallel_state

    return batches[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]


def gather(chunks: list[Any], tensor_of: Any) -> dict[str, torch.Tensor]:
    """A tensor per parameter in its full shape, under the parameter's name in the whole model.

    Args:
        chunks: bare chunks.
        tensor_of: parameter -> this rank's part.
    """
    from megatron.core import parallel_state

    from megatron_ext.model.initialization import _global_name

    shards = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            tied_copy = name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
            shards["tied copy" if tied_copy else _global_name(chunk, name)] = tensor_of(parameter).detach().clone()
    everything: list[Any] = [None] * torch.distributed.get_world_size()
    place = (parallel_state.get_data_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
    torch.distributed.all_gather_object(everything, (place, shards))
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for (data_rank, tensor_rank), found in everything:
        if data_rank == 0:
            for name, tensor in found.items():
                parts.setdefault(name, {})[tensor_rank] = tensor
    return {name: _join(name, [tensors[rank] for rank in sorted(tensors)]) for name, tensors in parts.items()}


def _join(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return torch.cat(parts, dim=1)
    if name.endswith("linear_fc1.weight"):
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    if parts[0].dim() == 1:
        return parts[0]
    return (
        torch.cat(parts)[:VOCAB_SIZE]
        if name.endswith(("word_embeddings.weight", "output_layer.weight", "tied copy"))
        else torch.cat(parts)
    )
