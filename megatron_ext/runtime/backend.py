"""What this machine can run, and the choice made: device, layers, communication library."""

import os
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_ext.config import ParallelConfig
from megatron_ext.errors import UserError
from megatron_ext.runtime.capabilities import check_apex, has_transformer_engine


@dataclass(frozen=True)
class Backend:
    """The kernels a run uses."""

    device: torch.device
    layers: Literal["local", "transformer_engine"]
    """Torch modules with SDPA, or Transformer Engine modules."""
    communication: Literal["gloo", "nccl", "fake"]
    """`fake` sends nothing: one process builds what a rank of many would."""

    capability: tuple[int, int] | None = None
    """Compute capability of the GPU; None without one."""

    @property
    def name(self) -> str:
        """For logs and run records, e.g. `cpu/local/gloo`."""
        return f"{self.device.type}/{self.layers}/{self.communication}"


ON_CPU = Backend(device=torch.device("cpu"), layers="local", communication="gloo")
"""What runs everywhere."""


def choose_backend(requested: Literal["auto", "local", "transformer_engine"]) -> Backend:
    """Pick device and layers.

    Args:
        requested: `training.backend` of the configuration; `auto` takes Transformer Engine where it and a GPU are present.

    Raises:
        UserError: Transformer Engine was asked for and cannot be used here, or the installed `apex` is not NVIDIA's.
    """
    check_apex()
    device = own_device()
    has_gpu = device.type == "cuda"
    missing = [
        name for name, present in (("a CUDA device", has_gpu), ("Transformer Engine", has_transformer_engine())) if not present
    ]
    if requested == "transformer_engine" and missing:
        raise UserError(
            f"training.backend is transformer_engine, but this machine has no {' and no '.join(missing)}: use auto or local"
        )
    layers = "local" if missing or requested == "local" else "transformer_engine"
    capability = torch.cuda.get_device_capability() if has_gpu else None
    return Backend(device=device, layers=layers, communication="nccl" if has_gpu else "gloo", capability=capability)


def expected_backend(requested: Literal["auto", "local", "transformer_engine"], capability: tuple[int, int] | None) -> Backend:
    """What a run gets on a GPU of this compute capability where Transformer Engine is installed."""
    layers: Literal["local", "transformer_engine"] = "local" if requested == "local" else "transformer_engine"
    return Backend(torch.device("cuda"), layers, "nccl", capability)


def check_overlap(parallel: ParallelConfig, backend: Backend) -> None:
    """Refuse to overlap communication and computation where nothing can do it.

    Raises:
        UserError: naming the first field.
    """
    for name in ("overlap_gradient_reduce", "overlap_parameter_gather"):
        if getattr(parallel, name) and backend.device.type == "cpu":
            raise UserError(f"parallel.{name} is true, but this run is on the CPU: only a GPU communicates while it computes")
    if parallel.overlap_tensor_communication and backend.layers == "local":
        raise UserError(
            "parallel.overlap_tensor_communication is true, but this run has torch's layers: only Transformer Engine overlaps "
            "tensor-parallel communication, and it needs a GPU"
        )


def pretended_backend(expected: Backend) -> Backend:
    """The backend of a dry run: shapes without numbers, and Transformer Engine's modules if it is installed here as well.

    Args:
        expected: that of the run.
    """
    check_apex()
    has_modules = expected.layers == "transformer_engine" and has_transformer_engine()
    layers: Literal["local", "transformer_engine"] = "transformer_engine" if has_modules else "local"
    return Backend(torch.device("meta"), layers, "fake", expected.capability)


def own_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")
