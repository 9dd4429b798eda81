"""How a model is trained: layout, batch, numbers and the software around it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_ext.config import PrecisionConfig, Recipe, TrainingConfig
from megatron_ext.model.presets import LOGITS_PER_CHUNK
from megatron_ext.plan.kernels import BLOCKWISE_RATE

if TYPE_CHECKING:  # it imports torch
    from megatron_ext.runtime.topology import Layout

Stack = Literal["fused", "autocast", "compiled"]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One way of training on `tensor x pipeline x context x data` GPUs."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    data: int = 1
    micro_batch: int = 1
    """Samples in a forward pass."""
    global_batch: int = 1
    """Samples in an optimizer step."""
    recipe: Recipe = "bf16"
    bf16_layers: int = 0
    """Layers that stay in bfloat16 under an FP8 recipe."""
    recompute: Literal["none", "attention", "full"] = "none"
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    overlap_tensor: bool = False
    overlap_reduce: bool = False
    overlap_gather: bool = False
    sharded_weights: bool = False
    """Weights are gathered for every forward and backward pass (FSDP), in this many bytes: see `gathered_bytes`."""
    gathered_bytes: int = 2
    stack: Stack = "fused"
    """Passes over memory around the products: fused kernels on a bfloat16 stream (megatron-core and Transformer Engine), PyTorch's
    own kernels under autocast on a float32 stream, or these compiled."""
    attention: str = "cudnn"
    fused_loss: bool = False
    """One kernel on bfloat16 logits, instead of a float32 softmax and its gradient step by step."""
    logits_per_chunk: int | None = None
    """Logits that the head has at a time; None: all of a micro-batch."""

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def micro_batches(self) -> float:
        """Forward passes of one data-parallel rank in a step; published runs may have an uneven last one."""
        return self.global_batch / (self.micro_batch * self.data)

    @property
    def is_fp8(self) -> bool:
        """Products of the layers run in FP8."""
        return self.recipe not in ("fp32", "bf16")

    @property
    def fp8_rate(self) -> float:
        """FP8 products' rate in units of the best: 0 where there are none."""
        if not self.is_fp8:
            return 0.0
        return BLOCKWISE_RATE if self.recipe == "fp8-blockwise" else 1.0

    @classmethod
    def of(cls, layout: "Layout", training: TrainingConfig, precision: PrecisionConfig, *, overlap: bool) -> "Execution":
        """This stack's way at a layout; `overlap` hides communication wherever this stack can."""
        return cls(
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            virtual=layout.virtual_pipeline,
            context=layout.context,
            data=layout.data,
            micro_batch=training.micro_batch_size,
            global_batch=training.global_batch_size,
            recipe=precision.recipe,
            bf16_layers=precision.bf16_first_layers + precision.bf16_last_layers,
            recompute=training.recompute,
            sequence_parallel=layout.sequence_parallel,
            distributed_optimizer=layout.distributed_optimizer,
            overlap_tensor=overlap and layout.sequence_parallel,
            overlap_reduce=overlap,
            overlap_gather=overlap and layout.distributed_optimizer,
            fused_loss=True,
            logits_per_chunk=LOGITS_PER_CHUNK["gpu"],
        )
