"""What is kept of a published training run."""

from dataclasses import dataclass

from megatron_ext.plan.execution import Execution
from megatron_ext.plan.hardware import GPUS, Gpu
from megatron_ext.plan.workload import Workload

H100 = GPUS["h100"]


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """One published row."""

    name: str
    source: str
    work: Workload
    run: Execution
    tokens_per_second: float
    """Published, or from the published TFLOP/s, of one GPU."""
    published: str
    """The figure as it was published, and how its author counts."""
    assumed: str = ""
    """Conditions that were not published."""
    gpu: Gpu = H100
    calibrates: bool = False
    known: bool = True
    """Enough was published to say what the row should give; else it is shown and counts for nothing."""
