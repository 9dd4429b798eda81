"""The contenders of `benchmarks.gpu`, each at its sensible best on a GPU. A step returns the loss per predicted token, unread."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.contenders import (
    CLIP,
    LEARNING_RATE,
    Shape,
    encoder_of,
    make_batch,
    megatron_config,
    own_micro_batch,
    transformers_model,
)
from benchmarks.own_run import own_step

Step = Callable[[], Tensor]


def build_ours(shape: Shape, objective: str, recipe: Any, layout: Any, backend: Any) -> Step:
    """This project, as a run of one rank builds it; the batch is copied to the GPU in every step."""
    from megatron_ext.config import OptimizerConfig, PrecisionConfig

    config = OptimizerConfig(learning_rate=LEARNING_RATE, clip_grad_norm=CLIP)
    own = own_step(encoder_of(shape), shape.vocab_size, torch.bfloat16, layout, backend, config, PrecisionConfig(recipe=recipe))
    micro_batch = own_micro_batch(shape, objective)

    def step() -> Tensor:
        sums = own([micro_batch])
        return sums.losses[objective] / sums.predicted[objective]

    return step


def build_transformers(shape: Shape, objective: str) -> Step:
    """transformers in a plain loop: float32 weights under bfloat16 autocast, SDPA, fused AdamW."""
    with torch.device("cuda"):
        model = transformers_model(encoder_of(shape), shape.vocab_size, objective)
    batch = make_batch(shape, objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    tokens, labels = torch.from_numpy(batch.tokens).cuda(), torch.from_numpy(batch.labels).cuda()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    return step


def build_megatron_core(shape: Shape, objective: str) -> Step:
    """megatron-core's GPTModel with Transformer Engine's layers, its fusions, DDP and optimizer; logits at every position."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module
    from transformer_engine.pytorch.optimizers import FusedAdam

    model_parallel_cuda_manual_seed(0)
    numbers = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    config = megatron_config(encoder_of(shape), **numbers, **FUSED)
    model = Float16Module(config, _gpt(config, shape, objective).cuda())
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    settings = OptimizerConfig(
        optimizer="adam", lr=LEARNING_RATE, clip_grad=CLIP, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=False
    )
    with patch("megatron.core.optimizer.Adam", FusedAdam):  # its own choice, which this project replaces
        optimizer = get_megatron_optimizer(settings, [ddp])
    tokens, positions, labels, counted = _inputs(shape, objective)

    def step() -> Tensor:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        losses = ddp(tokens, positions, None, labels=labels)
        loss = (losses * counted).sum() / counted.sum()
        loss.backward()
        ddp.finish_grad_sync()
        optimizer.step()
        return loss.detach()

    return step


FUSED = {
    "gradient_accumulation_fusion": False,  # its output layer would need Apex for it
    "bias_activation_fusion": True,
    "apply_rope_fusion": True,
    "cross_entropy_loss_fusion": True,
}


def _gpt(config: Any, shape: Shape, objective: str) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.enums import AttnMaskType

    spec = get_gpt_layer_with_transformer_engine_spec()
    if objective == "mlm":
        spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    return GPTModel(
        config,
        spec,
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.sequence_length,
        share_embeddings_and_output_weights=encoder_of(shape).tie_embeddings,
        position_embedding_type="rope",
    ).train()


def _inputs(shape: Shape, objective: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[b, s] tokens, positions, what is to be said at each, and whether it counts."""
    batch = make_batch(shape, objective)
    tokens, labels = torch.from_numpy(batch.tokens).cuda(), torch.from_numpy(batch.labels).cuda()
    if objective == "clm":
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    positions = torch.arange(shape.sequence_length, device="cuda").expand_as(tokens)
    return tokens, positions, labels.clamp_min(0), labels >= 0


BUILDERS = {"transformers": build_transformers, "megatron_core": build_megatron_core}
