"""Counters of a run, and speed, MFU and memory of its last stretch of steps."""

import resource
import sys
import time
from dataclasses import asdict, dataclass

import torch

from megatron_ext.model.flops import training_flops
from megatron_ext.model.presets import EncoderConfig
from megatron_ext.train.step import GlobalSums

GPU_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense BF16 rates of the data sheets, FLOP/s, by a word in the device's name."""


@dataclass
class Counters:
    """What the run has used so far, over all ranks; stored in every checkpoint."""

    samples: int = 0
    tokens: int = 0
    predicted_tokens: int = 0
    flops: float = 0.0
    skipped_steps: int = 0

    def add(self, sums: GlobalSums, samples: int, flops: float) -> None:
        """Count a stretch of steps."""
        self.samples += samples
        self.tokens += sums.tokens
        self.predicted_tokens += sum(sums.predicted.values())
        self.flops += flops

    def as_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)


def step_flops(encoder: EncoderConfig, vocab_size: int, sums: GlobalSums) -> float:
    """Floating-point operations of the steps summed up, forward and backward."""
    predicted = sum(sums.predicted.values())
    return training_flops(encoder, vocab_size, tokens=sums.tokens, attended=sums.attended, predicted=predicted)


class SpeedMeter:
    """Time spent training, validation and checkpoints excluded."""

    def __init__(self, peak_flops: float):
        """
        Args:
            peak_flops: FLOP/s of all ranks together.
        """
        self._peak = peak_flops
        self.start()

    def start(self) -> None:
        """Begin a stretch now."""
        self._started = time.perf_counter()
        self._paused = 0.0

    def pause(self) -> "_Pause":
        """Context in which time does not count."""
        return _Pause(self)

    def read(self, sums: GlobalSums, flops: float, steps: int) -> dict[str, float]:
        """Metrics of the stretch since the last reading, which it ends."""
        seconds = time.perf_counter() - self._started - self._paused
        self.start()
        return {
            "tokens_per_second": sums.tokens / seconds,
            "mfu": flops / seconds / self._peak,
            "seconds_per_step": seconds / steps,
            "memory_gib": peak_memory_bytes() / 2**30,
        }

    def add_pause(self, seconds: float) -> None:
        """Leave this time out."""
        self._paused += seconds


class _Pause:
    def __init__(self, meter: SpeedMeter):
        self._meter = meter

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._meter.add_pause(time.perf_counter() - self._started)


def peak_memory_bytes() -> int:
    """Peak memory of this process: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of this rank's device: the data sheet's dense BF16 rate of a known GPU, else the rate of a matmul measured now.

    The measured product is in float32 on a CPU and in bfloat16 on a GPU.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for word, rate in GPU_PEAK_FLOPS.items():
            if word in name:
                return rate
    return _measure_matmul(device)


def _measure_matmul(device: torch.device, size: int = 2048, repeats: int = 5) -> float:
    """Best rate of a few `size`^3 products."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    left, right, result = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(3))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        torch.mm(left, right, out=result)
        wait()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
