"""What this machine can run, and the choice made: device, layers, communication library."""

import os
from dataclasses import dataclass
from typing import Literal

import torch

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

    @property
    def name(self) -> str:
        """For logs and run records, e.g. `cpu/local/gloo`."""
        return f"{self.device.type}/{self.layers}/{self.communication}"


def choose_backend(requested: Literal["auto", "local", "transformer_engine"]) -> Backend:
    """Pick device and layers.

    Args:
        requested: `training.backend` of the configuration; `auto` takes Transformer Engine where it and a GPU are present.

    Raises:
        UserError: Transformer Engine was asked for and cannot be used here, or the installed `apex` is not NVIDIA's.
    """
    check_apex()
    has_gpu = torch.cuda.is_available()
    missing = [
        name for name, present in (("a CUDA device", has_gpu), ("Transformer Engine", has_transformer_engine())) if not present
    ]
    if requested == "transformer_engine" and missing:
        raise UserError(
            f"training.backend is transformer_engine, but this machine has no {' and no '.join(missing)}: use auto or local"
        )
    layers = "local" if missing or requested == "local" else "transformer_engine"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if has_gpu else torch.device("cpu")
    return Backend(device=device, layers=layers, communication="nccl" if has_gpu else "gloo")


def pretended_backend(requested: Literal["auto", "local", "transformer_engine"]) -> Backend:
    """The backend of a dry run: shapes without numbers, and Transformer Engine's modules wherever they are installed.

    Args:
        requested: `training.backend` of the configuration.

    Raises:
        UserError: Transformer Engine was asked for and is not installed here.
    """
    check_apex()
    has_modules = requested != "local" and has_transformer_engine()
    if requested == "transformer_engine" and not has_modules:
        raise UserError("training.backend is transformer_engine, but Transformer Engine is not installed here: use auto or local")
    return Backend(torch.device("meta"), "transformer_engine" if has_modules else "local", "fake")
