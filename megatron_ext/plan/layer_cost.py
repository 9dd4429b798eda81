"""Seconds of the parts of a model on one GPU: a layer forward and backward, the head, the optimizer."""

from dataclasses import dataclass

from megatron_ext.plan.execution import Execution
from megatron_ext.plan.hardware import Gpu
from megatron_ext.plan.kernels import (
    BACKWARD_ATTENTION,
    KERNEL_FLOOR,
    Constants,
    attention_rate,
    pass_seconds,
    product_seconds,
)
from megatron_ext.plan.workload import Workload

NORM_PASSES = {
    # stack: bytes per number of the residual stream that norms, casts and residual additions move, forward and backward
    "fused": (20, 24),  # 2 x (norm 2+2, addition 4+2); 2 x (norm 6, addition of gradients 6)
    "autocast": (40, 60),  # 2 x (cast 4+2, norm 2+2, addition 4+2+4); 2 x (norm 6, casts 6+6, addition 12)
    "compiled": (32, 36),  # 2 x (norm 4+2, addition 4+2+4); 2 x (norm 10, addition 8)
}
"""bfloat16 numbers have two bytes; `fused` keeps the stream in bfloat16, the others in float32."""
LOGIT_BYTES = {False: 48, True: 12}
"""Bytes moved per logit besides the products: a float32 softmax and its gradient step by step (megatron-core's vocabulary-parallel
loss, and our head), or a fused kernel on bfloat16 logits."""
KERNELS = {False: 45, True: 90}
"""Kernels of a layer, forward and backward, in bfloat16 and in FP8 (casts, transposes, scales): what the host must launch."""
FP8_CAST_BYTES = {"fp8-delayed": 4, "fp8-tensorwise": 6, "fp8-blockwise": 6, "mxfp8": 6}
"""Bytes moved to make a number's FP8 value and its transpose: read once (delayed), or twice (the largest value first)."""
OPTIMIZER_BYTES = 38
"""Per parameter: AdamW on float32 states (read 16, written 12), the bfloat16 weight, the gradient's norm and its reset."""


@dataclass
class Parts:
    """Seconds by kind; they add up."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    """Norms, activations, rotary embedding, residual stream, casts."""
    head: float = 0.0
    recomputed: float = 0.0
    waiting_for_host: float = 0.0
    optimizer: float = 0.0
    bubble: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    pipeline: float = 0.0
    data: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class LayerCost:
    """Seconds of one layer for one micro-batch on one GPU, without communication."""

    forward_products: float
    backward_products: float
    forward_attention: float
    backward_attention: float
    forward_memory: float
    backward_memory: float
    host: float
    """The host's time to launch its kernels."""

    @property
    def forward(self) -> float:
        """The forward pass."""
        return self.forward_products + self.forward_attention + self.forward_memory

    @property
    def backward(self) -> float:
        """The backward pass, without recomputation."""
        return self.backward_products + self.backward_attention + self.backward_memory


def layer_cost(gpu: Gpu, constants: Constants, work: Workload, run: Execution, *, in_fp8: bool) -> LayerCost:
    """One layer, the mean over layers with and without a window."""
    tokens = run.micro_batch * work.sequence / run.context
    forward, backward = _products(gpu, constants, work, run, tokens, run.fp8_rate if in_fp8 else 0.0)
    attention_forward, attention_backward = _attention(gpu, constants, work, run, tokens)
    memory_forward, memory_backward = _memory(gpu, work, run, tokens, in_fp8)
    return LayerCost(
        forward_products=forward,
        backward_products=backward,
        forward_attention=attention_forward,
        backward_attention=attention_backward,
        forward_memory=memory_forward,
        backward_memory=memory_backward,
        host=KERNELS[in_fp8] * gpu.launch,
    )


def _matrices(work: Workload, run: Execution) -> list[tuple[float, float]]:
    """[inputs, outputs] of a layer's four matrices on one tensor-parallel rank."""
    shape, t = work.shape, run.tensor
    return [
        (shape.hidden, (shape.query_width + 2 * shape.key_width) / t),
        (shape.query_width / t, shape.hidden),
        (shape.hidden, shape.up_width / t),
        (shape.ffn / t, shape.hidden),
    ]


def _products(gpu: Gpu, constants: Constants, work: Workload, run: Execution, tokens: float, fp8: float) -> tuple[float, float]:
    forward = backward = 0.0
    for inputs, outputs in _matrices(work, run):
        forward += product_seconds(gpu, constants, tokens, outputs, inputs, fp8)
        backward += product_seconds(gpu, constants, tokens, inputs, outputs, fp8)
        backward += product_seconds(gpu, constants, inputs, outputs, tokens, fp8)
    return forward, backward


def _attention(gpu: Gpu, constants: Constants, work: Workload, run: Execution, tokens: float) -> tuple[float, float]:
    shape = work.shape
    forward = 0.0
    for layers, attended, length, kernel in _attention_kinds(work, run):
        flops = 4.0 * tokens * attended * shape.query_width / run.tensor
        rate = attention_rate(gpu, constants, kernel, shape.head_dim, length, work.causal)
        forward += layers / shape.layers * (flops / rate + KERNEL_FLOOR)
    return forward, 2.5 * forward / BACKWARD_ATTENTION


def _attention_kinds(work: Workload, run: Execution) -> list[tuple[int, float, float, str]]:
    """(layers, tokens that a token's scores are computed for, run length, kernel) without and with a window.

    A window is computed in whole tiles, and by FlashAttention-2.
    """
    shape = work.shape
    kinds = [(shape.layers - shape.local_layers, work.attended, work.run_length, run.attention)]
    if shape.local_layers:
        window = min(work.attended_in_window + 128, work.attended)
        kinds.append((shape.local_layers, window, window, "flash2"))
    return kinds


def _memory(gpu: Gpu, work: Workload, run: Execution, tokens: float, in_fp8: bool) -> tuple[float, float]:
    shape, t = work.shape, run.tensor
    stream = tokens * shape.hidden / (t if run.sequence_parallel else 1)
    norm_forward, norm_backward = (bytes_ * stream for bytes_ in NORM_PASSES[run.stack])
    inner = tokens * shape.ffn / t
    gate_forward, gate_backward = (6 * inner, 10 * inner) if shape.gated else (4 * inner, 6 * inner)
    passes = 3 if run.stack == "autocast" else 1
    rotary = shape.rotary * passes * 4 * tokens * (shape.query_width + shape.key_width) / t
    forward, backward = norm_forward + gate_forward + rotary, norm_backward + gate_backward + rotary
    if in_fp8:
        cast = FP8_CAST_BYTES[run.recipe] * tokens
        forward += cast * sum(inputs for inputs, _ in _matrices(work, run))
        backward += cast * sum(outputs for _, outputs in _matrices(work, run))
    parameters = shape.layer_parameters / t
    if run.stack == "fused":
        backward += 6 * parameters  # float32 sums of gradients are read and written, instead of bfloat16 ones written
    else:
        forward += 6 * parameters  # autocast makes bfloat16 weights anew, and gradients are added one after the other
        backward += 12 * parameters
    return pass_seconds(gpu, forward), pass_seconds(gpu, backward)


def head_seconds(gpu: Gpu, constants: Constants, work: Workload, run: Execution) -> float:
    """Head and loss of one micro-batch, forward and backward; in chunks if the head works in chunks."""
    rows = run.micro_batch * work.sequence / run.context * work.predicted_share
    columns = work.shape.vocab / run.tensor
    if run.logits_per_chunk is None:
        return _chunk_seconds(gpu, constants, work, run, rows, columns)
    step = max(1.0, run.logits_per_chunk // columns)
    chunk = _chunk_seconds(gpu, constants, work, run, min(step, rows), columns)
    # each chunk adds its gradient of the weight to a float32 sum
    chunk += pass_seconds(gpu, 10 * columns * work.shape.hidden)
    return max(1.0, rows / step) * chunk


def _chunk_seconds(gpu: Gpu, constants: Constants, work: Workload, run: Execution, rows: float, columns: float) -> float:
    hidden = work.shape.hidden
    products = product_seconds(gpu, constants, rows, columns, hidden)
    products += product_seconds(gpu, constants, rows, hidden, columns)
    products += product_seconds(gpu, constants, hidden, columns, rows)
    return products + pass_seconds(gpu, LOGIT_BYTES[run.fused_loss] * rows * columns) + 12 * KERNEL_FLOOR


def stage_parameters(work: Workload, run: Execution) -> float:
    """Parameters of the fullest pipeline stage on one tensor-parallel rank."""
    shape = work.shape
    embeddings = shape.hidden * shape.vocab * (1 if run.pipeline > 1 or shape.tied else 2)
    return (shape.layers / run.pipeline * shape.layer_parameters + embeddings) / run.tensor


def optimizer_seconds(gpu: Gpu, work: Workload, run: Execution) -> float:
    """Optimizer step; FP8 copies of the weights are made once in it."""
    parameters = stage_parameters(work, run)
    ranks = run.data * run.context if run.distributed_optimizer or run.sharded_weights else 1
    seconds = pass_seconds(gpu, OPTIMIZER_BYTES * parameters / ranks)
    return seconds + run.is_fp8 * pass_seconds(gpu, 4 * parameters)
