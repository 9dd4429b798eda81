"""From the backward pass to the update. Nothing here waits for the device: what decides about a step stays on it."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch.distributed import ReduceOp

from megatron_ext.train.step import Sums


def finalize_gradients(chunks: list[torch.nn.Module], predicted: torch.Tensor | None = None, **others: Any) -> None:
    """megatron's reduction of the gradients after the last micro-batch; then they are divided by the predicted tokens.

    megatron 0.16 divides in there, after it has asked on the host whether there are any.

    Args:
        chunks: this rank's model chunks.
        predicted: [1] tokens that this data-parallel rank's last pipeline stage predicted; 0 is legal. None divides by nothing.
        others: megatron's own.
    """
    finalize_model_grads(chunks, None, **others)
    if predicted is None:
        return
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(predicted, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    torch.distributed.all_reduce(predicted, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    scale = 1.0 / predicted.clamp(min=1)
    for chunk in chunks:
        chunk.scale_gradients(scale)


def gradient_norm(optimizer: Any, device: torch.device) -> torch.Tensor:
    """Make the gradients ready for an update; their global norm before clipping, a float32 scalar."""
    optimizer.prepare_grads()
    return torch.stack([_sum_of_squares(part, device) for part in parts_of(optimizer)]).sum().sqrt()


def is_not_finite(norm: torch.Tensor, sums: Sums) -> torch.Tensor:
    """Whether the gradients' norm or some rank's loss is not a number or infinite: float32 scalar, 1 or 0, equal on all ranks."""
    finite = torch.isfinite(norm)
    if sums.batch_losses:
        finite = finite & torch.isfinite(torch.stack(sums.batch_losses)).all()
    found = (~finite).float()
    torch.distributed.all_reduce(found, op=ReduceOp.MAX)
    return found


def parts_of(optimizer: Any) -> list[Any]:
    """The optimizers that megatron has chained, or the only one."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _sum_of_squares(part: Any, device: torch.device) -> torch.Tensor:
    gradients = part.get_main_grads_for_grad_norm()
    if gradients:
        total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).square()
    else:
        total = torch.zeros((), device=device)
    torch.distributed.all_reduce(total, group=part.get_grad_stats_parallel_group())
    return total
