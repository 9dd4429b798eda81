"""AdamW through megatron's optimizers, and the learning rate as a pure function of the step."""

import math
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer

from megatron_ext.config import OptimizerConfig, PrecisionConfig
from megatron_ext.objective import PhasePlan
from megatron_ext.runtime.precision import optimizer_settings
from megatron_ext.train.gradients import gradient_norm, is_not_finite, parts_of
from megatron_ext.train.step import Sums


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


def update(optimizer: Any, sums: Sums) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip the gradients and take the step, unless a loss or the gradients are not finite on some rank. Waits for no device.

    megatron's own step in parts: it is decided on the device, where a step that is left out changes nothing. `count_skipped` must
    be told of those before the optimizer's state is saved or reset.

    Args:
        optimizer: megatron's.
        sums: this rank's losses of the step.

    Returns:
        The gradients' global norm before clipping, and 1 if the step was left out, else 0: float32 scalars, equal on all ranks.
    """
    norm = gradient_norm(optimizer, sums.device)
    is_bad = is_not_finite(norm, sums)
    for part in parts_of(optimizer):
        if part.get_parameters():
            limit = part.config.clip_grad
            part.optimizer.decide(is_bad, (norm / limit).clamp(min=1.0) if limit > 0 else None)
    optimizer.step_with_ready_grads()
    return norm, is_bad


def count_skipped(optimizer: Any, steps: int) -> None:
    """So many steps since the last call were left out: AdamW does not count them."""
    for part in parts_of(optimizer):
        if part.get_parameters():
            part.optimizer.count_skipped(steps)


def set_learning_rate(optimizer: Any, config: OptimizerConfig, rate: float) -> None:
    """Set a step's learning rate, and each group's weight decay, which a loaded checkpoint may have set otherwise."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)


def reset_optimizer_state(optimizer: Any) -> None:
    """Forget the moments and the step count, as at the start of training; master weights stay."""
    for part in parts_of(optimizer):
        for state in part.optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = 0 * group["step"]
