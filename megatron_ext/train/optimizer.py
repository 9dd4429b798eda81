"""AdamW through megatron's optimizers, and the learning rate as a pure function of the step."""

import math
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_ext.config import OptimizerConfig, PrecisionConfig
from megatron_ext.objective import PhasePlan
from megatron_ext.runtime.adamw import FusedAdamW
from megatron_ext.runtime.precision import optimizer_settings


def build_optimizer(
    config: OptimizerConfig,
    chunks: list[torch.nn.Module],
    dtype: torch.dtype,
    distributed: bool,
    precision: PrecisionConfig | None = None,
) -> Any:
    """megatron's optimizer over the DDP-wrapped model chunks of this rank.

    Args:
        config: hyper-parameters.
        chunks: the model chunks.
        dtype: of the weights.
        distributed: shard the state over the data-parallel ranks.
        precision: the FP8 recipe; None for none.
    """
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=config.min_learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_grad_norm,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        **optimizer_settings(precision or PrecisionConfig()),
    )
    has_gloo_groups = torch.distributed.get_backend() != "fake"
    return get_megatron_optimizer(megatron_config, chunks, use_gloo_process_groups=has_gloo_groups)


def learning_rate(config: OptimizerConfig, plan: PhasePlan, step: int) -> float:
    """Learning rate of a step: linear warmup, then stable and linear decay (wsd), a cosine, or constant.

    The schedule spans a stretch of phases without a `rewarm` between them (see `PhasePlan.schedule_segment`).
    WSD: Hu et al., arXiv 2404.06395. Cosine: Loshchilov and Hutter, arXiv 1608.03983, without restarts inside a stretch.
    """
    start, end = plan.schedule_segment(step)
    done, left = step - start, end - step
    peak, lowest = config.learning_rate, config.min_learning_rate
    if done < config.warmup_steps:
        return peak * (done + 1) / config.warmup_steps
    if config.schedule == "wsd" and left <= config.decay_steps:
        return lowest + (peak - lowest) * left / config.decay_steps
    if config.schedule == "cosine":
        progress = (done - config.warmup_steps) / max(1, end - start - config.warmup_steps)
        return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak


def gradient_norm(optimizer: Any) -> float:
    """Make the gradients ready for an update; their global norm, before clipping. Waits for the device."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update(optimizer: Any, norm: float) -> None:
    """Clip the gradients, whose norm this is, and take the step. Together with `gradient_norm` this is megatron's own step,
    cut in two so that a step with a norm that is not finite can be left out."""
    for part in _parts(optimizer):
        parameters = part.get_parameters()
        if not parameters or part.config.clip_grad <= 0:
            continue
        if isinstance(part.optimizer, FusedAdamW):
            part.optimizer.gradient_divisor = max(1.0, norm / part.config.clip_grad)
        else:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
    optimizer.step_with_ready_grads()


def set_learning_rate(optimizer: Any, config: OptimizerConfig, rate: float) -> None:
    """Set a step's learning rate, and each group's weight decay, which a loaded checkpoint may have set otherwise."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)


def reset_optimizer_state(optimizer: Any) -> None:
    """Forget the moments and the step count, as at the start of training; master weights stay."""
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = 0 * group["step"]


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers that megatron has chained, or the only one."""
    return getattr(optimizer, "chained_optimizers", [optimizer])
