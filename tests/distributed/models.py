"""The doctor's small model as the distributed tests build it."""

from dataclasses import dataclass
from typing import Any

from megatron_ext.config import ParallelConfig, Recompute, TrainingConfig
from megatron_ext.doctor.small_model import SAMPLES, VOCAB_SIZE, make_encoder, sequence_length

SEQUENCE_LENGTH = sequence_length(ParallelConfig())
MICRO_BATCHES = 8
EXTRAS = {
    "qkv_bias": True,
    "qk_norm": True,
    "rotary_scaling": "llama3",
    "rotary_factor": 8.0,
    "rotary_original_length": 16,
}


@dataclass(frozen=True)
class Case:
    """One layout to be compared with one rank."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    sequence: bool = True
    distributed_optimizer: bool = False
    tied: bool = False
    with_extras: bool = False
    """Biases on queries, keys and values, norms on queries and keys, stretched RoPE."""
    recompute: Recompute = "none"

    def parallel(self) -> ParallelConfig:
        """The configured sizes."""
        return ParallelConfig(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline,
            context=self.context,
            sequence=self.sequence,
            distributed_optimizer=self.distributed_optimizer,
        )


def start(case: Case) -> tuple[Any, Any]:
    """Lay megatron's process groups out for a case; returns layout and backend."""
    import torch
    from megatron.core import parallel_state

    from megatron_ext.runtime.backend import choose_backend
    from megatron_ext.runtime.topology import check_layout, initialize

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    training = TrainingConfig(micro_batch_size=SAMPLES, global_batch_size=SAMPLES * MICRO_BATCHES)
    encoder = make_encoder(case.parallel())
    layout = check_layout(case.parallel(), training, encoder.num_layers, {}, torch.distributed.get_world_size())
    backend = choose_backend("auto")
    initialize(layout, backend)
    return layout, backend


def build(case: Case) -> tuple[list[Any], list[Any], Any]:
    """Bare chunks, wrapped chunks and layout for a case."""
    import torch

    from megatron_ext.train.build import build_model, wrap_model

    layout, backend = start(case)
    encoder = make_encoder(case.parallel(), tie_embeddings=case.tied, **(EXTRAS if case.with_extras else {}))
    bare = build_model(encoder, VOCAB_SIZE, layout, backend, torch.float32, seed=3, recompute=case.recompute)
    return bare, wrap_model(bare, layout), layout
