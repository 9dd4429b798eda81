"""GPUs by their data sheets. Only the H100 is calibrated: the others get its efficiencies at their own rates.

Sources: NVIDIA's data sheets (dense rates, HBM, NVLink per direction; H100 and H200 SXM5, A100 SXM4 80 GB, B200 in HGX). Achieved
rates of the H100 are measurements published by others: 794 TFLOP/s BF16 and 1,403 TFLOP/s FP8 as the best square-ish matrix
products, about 376 of 450 GB/s over NVLink, about 36 of 50 GB/s per GPU over InfiniBand NDR. Where nobody published the like for
another GPU, its share of the peak is taken to be the H100's.
"""

from dataclasses import dataclass

from megatron_ext.errors import UserError

H100_BF16_SHARE, H100_FP8_SHARE = 794 / 989, 1403 / 1979
H100_BEST_PRODUCT = 794e12
NVLINK_SHARE, NETWORK_SHARE = 376 / 450, 36 / 50


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU and the machine it stands in."""

    name: str
    capability: tuple[int, int] | None
    """Compute capability; None for another vendor's."""
    bf16_peak: float
    """Data sheet's dense rate, FLOP/s."""
    fp8_peak: float
    """The same for FP8; 0 without FP8."""
    memory: float
    """Bytes."""
    bandwidth: float
    """HBM, bytes/s."""
    nvlink: float
    """Bytes/s in each direction, data sheet."""
    network: float = 50e9
    """Bytes/s of the network for each GPU, in each direction."""
    processors: int = 132
    """Streaming multiprocessors."""
    gpus_per_node: int = 8
    launch: float = 5e-6
    """Seconds of the host for one kernel, PyTorch's and Transformer Engine's Python included."""
    calibrated: bool = False
    """Constants were fitted to measurements on it."""

    @property
    def best_bf16(self) -> float:
        """Best rate of a matrix product in bfloat16, FLOP/s."""
        return self.bf16_peak * H100_BF16_SHARE

    @property
    def best_fp8(self) -> float:
        """Best rate of a matrix product in FP8, FLOP/s; 0 without FP8."""
        return self.fp8_peak * H100_FP8_SHARE

    def peak(self, in_fp8: bool) -> float:
        """Data sheet's rate that MFU refers to."""
        return self.fp8_peak if in_fp8 else self.bf16_peak

    @property
    def speed(self) -> float:
        """Rate of its matrix products in units of the H100's: how attention kernels measured on an H100 are scaled."""
        return self.best_bf16 / H100_BEST_PRODUCT


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", (8, 0), 312e12, 0, 80e9, 2.039e12, 300e9, network=25e9, processors=108),
        Gpu("h100", (9, 0), 989e12, 1979e12, 80e9, 3.35e12, 450e9, calibrated=True),
        Gpu("h200", (9, 0), 989e12, 1979e12, 141e9, 4.8e12, 450e9),
        Gpu("b200", (10, 0), 2250e12, 4500e12, 180e9, 7.7e12, 900e9, processors=148),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        UserError: there is none.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu is '{name}': allowed are {', '.join(GPUS)}")
    return GPUS[name.lower()]
