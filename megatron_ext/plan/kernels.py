"""Seconds of single kernels: matrix products by shape and precision, attention by length and head, passes over memory.

Nothing here is above a published best. What remains between a best case and a training run is in a few constants, which
`calibration.py` fits to published runs on H100s.
"""

from dataclasses import dataclass, fields

from megatron_ext.plan.hardware import Gpu

TILE, TILE_DEPTH = 128, 2048
"""Rows and columns of a product's tile, and the depth after which kernels split a product to fill the GPU."""
KERNEL_FLOOR = 2e-6
"""Seconds that the smallest kernel takes on the device."""


@dataclass(frozen=True)
class Constants:
    """What is fitted to published runs; see docs/results/planner.md."""

    operand_traffic: float
    """Passes over a product's operands and result through HBM that its arithmetic does not hide."""
    exposed: float
    """Share of overlapped communication that shows all the same."""
    triton_attention: float
    """Rate of the first Triton flash attention in units of FlashAttention-2's; only runs of 2023 use it."""

    def as_list(self) -> list[float]:
        """The values in the order of the fields."""
        return [getattr(self, f.name) for f in fields(self)]


CALIBRATED = Constants(operand_traffic=2.5376, exposed=0.3106, triton_attention=0.5689)
"""What `python tools/plan.py validate --calibrate` finds."""

HBM_SHARE = 0.88
"""Share of HBM's data-sheet bandwidth that a pass over memory achieves: copies on an H100 run at about 2.9-3.0 of 3.35 TB/s."""
BACKWARD_ATTENTION = 0.85
"""Rate of attention's backward kernels in units of the forward ones: about 550 against 648 and 320 against 370 TFLOP/s published
for FlashAttention-3 and 2 at head width 128."""
BLOCKWISE_RATE = 0.88
"""Products with a scale for each block of 128, in units of those with one scale: about 1.2 of 1.4 PFLOP/s. Not calibrated."""

ATTENTION_RATES = {
    # kernel: {(head width, causal): (TFLOP/s at great length, tokens at which half of it is reached)}
    "flash2": {(64, False): (325, 70), (64, True): (302, 310), (128, False): (372, 80), (128, True): (340, 320)},
    "flash3": {(64, False): (505, 250), (64, True): (485, 750), (128, False): (650, 150), (128, True): (620, 500)},
    "cudnn": {(64, False): (415, 110), (64, True): (390, 370), (128, False): (610, 100), (128, True): (545, 330)},
}
"""Fits to the FlashAttention-3 paper's figures for an H100 (arXiv 2407.08608, forward, lengths 512 to 16k, FP16)."""


def product_seconds(gpu: Gpu, constants: Constants, rows: float, columns: float, depth: float, fp8: float = 0.0) -> float:
    """Seconds of one product [rows, depth] x [depth, columns].

    Arithmetic at the best rate ever measured, plus traffic of operands and result that is not hidden, plus half a wave of tiles in
    which some multiprocessors have nothing to do. A smooth function: which tile a library picks is not modelled.

    Args:
        gpu: the GPU.
        constants: fitted constants.
        rows: of the left operand.
        columns: of the right operand.
        depth: their common size.
        fp8: rate of FP8 products in units of the best one; 0 for bfloat16 operands. The result is in bfloat16.
    """
    rate = gpu.best_fp8 * fp8 if fp8 else gpu.best_bf16
    element = 1 if fp8 else 2
    traffic = element * depth * (rows + columns) + 2 * rows * columns
    last_wave = TILE * TILE * min(depth, TILE_DEPTH) * gpu.processors / rate
    arithmetic = 2 * rows * columns * depth / rate
    return arithmetic + constants.operand_traffic * traffic / (gpu.bandwidth * HBM_SHARE) + last_wave + KERNEL_FLOOR


def attention_rate(gpu: Gpu, constants: Constants, kernel: str, head_dim: int, length: float, causal: bool) -> float:
    """FLOP/s of attention's forward kernel, masked-out pairs not counted.

    Args:
        gpu: the GPU.
        constants: fitted constants.
        kernel: one of `ATTENTION_RATES`, or `triton`.
        head_dim: width of a head; rates between 64 and 128 are interpolated, narrower heads lose in proportion.
        length: tokens in a run that see each other.
        causal: only half of the pairs are computed.
    """
    factor = gpu.speed * (constants.triton_attention if kernel == "triton" else 1.0)
    rates = ATTENTION_RATES["flash2" if kernel == "triton" else kernel]
    narrow, wide = (rates[width, causal] for width in (64, 128))
    place = min(1.0, max(0.0, (head_dim - 64) / 64))
    rate, half = ((1 - place) * n + place * w for n, w in zip(narrow, wide, strict=True))
    return factor * min(1.0, head_dim / 64) * rate * 1e12 * length / (length + half)


def pass_seconds(gpu: Gpu, bytes_moved: float) -> float:
    """Seconds of reading or writing this many bytes of HBM."""
    return bytes_moved / (gpu.bandwidth * HBM_SHARE)
