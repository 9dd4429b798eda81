"""What is installed here, found out without running anything foreign: NVIDIA's Apex or another `apex`, Transformer Engine, GPUs.

megatron-core asks only whether `import apex` succeeds, and then takes layers and optimizers from it. PyPI's package of that
name is a web toolkit that has nothing to do with NVIDIA, so the two are told apart by what lies in their folders, before
anything imports them.
"""

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from megatron_ext.errors import UserError, one_line

APEX_PARTS = ("optimizers/fused_adam.py", "multi_tensor_apply/__init__.py", "normalization/__init__.py")
"""Files of NVIDIA's Apex, below its package folder, that megatron-core imports from."""

ARCHITECTURES = {(7, 0): "Volta", (7, 5): "Turing", (8, 0): "Ampere", (8, 6): "Ampere", (8, 7): "Ampere", (8, 9): "Ada Lovelace"}
"""GPU generations by compute capability, where the major number alone does not say it."""
GENERATIONS = {5: "Maxwell", 6: "Pascal", 7: "Volta", 8: "Ampere", 9: "Hopper", 10: "Blackwell", 11: "Blackwell", 12: "Blackwell"}

FP8_CAPABILITY = (9, 0)
"""First compute capability on which FP8 is trained. Ada Lovelace (8.9) multiplies FP8, but lacks most of the recipes' kernels."""


@dataclass(frozen=True)
class Apex:
    """What `import apex` would import."""

    kind: Literal["none", "nvidia", "foreign"]
    location: str | None = None
    """Folder or file."""
    distribution: str | None = None
    """Name, version and summary of the installed distribution, where there is one."""


def find_apex() -> Apex:
    """Look at the `apex` that Python would import, without importing it."""
    if not is_there("apex"):
        return Apex("none")
    spec = importlib.util.find_spec("apex")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    is_nvidia = any(all((folder / part).is_file() for part in APEX_PARTS) for folder in folders)
    location = str(folders[0]) if folders else spec.origin
    return Apex("nvidia" if is_nvidia else "foreign", location, _distribution("apex"))


def _distribution(name: str) -> str | None:
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    summary = (found["Summary"] or "").splitlines()
    return f"{found['Name']} {found['Version']}" + (f" ({summary[0]})" if summary and summary[0] != "UNKNOWN" else "")


def refusal_of(apex: Apex) -> str | None:
    """Why nothing may run beside this `apex`, in one line; None if it is NVIDIA's or there is none."""
    if apex.kind != "foreign":
        return None
    known = f"{apex.location}, {apex.distribution}" if apex.distribution else apex.location
    return (
        f"the installed package apex ({known}) is not NVIDIA Apex, and megatron-core would import it as if it were: "
        "remove it (pip uninstall apex), or install NVIDIA's from https://github.com/NVIDIA/apex"
    )


def check_apex() -> None:
    """Refuse an `apex` that is not NVIDIA's. Call it before megatron-core is imported.

    Raises:
        UserError: naming what was found.
    """
    refusal = refusal_of(find_apex())
    if refusal:
        raise UserError(refusal)


def transformer_engine_problem() -> str | None:
    """Why Transformer Engine's torch modules cannot be imported; None if they can."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # it loads libraries, asks for GPUs and asserts: anything may come
        return one_line(error)
    return None


def is_there(module: str) -> bool:
    """Whether Python finds a module of this name, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a half-loaded module
        return False


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's torch modules can be imported."""
    return transformer_engine_problem() is None


def has_triton() -> bool:
    """Whether kernels written in Triton can be compiled here: torch for CUDA comes with it."""
    return is_there("triton")


def can_fuse_weight_gradients(layers: Literal["local", "transformer_engine"]) -> bool:
    """Whether the product that gives a weight's gradient adds it to the float32 sum itself: TE's kernel, or Apex's on a GPU."""
    if layers == "transformer_engine":
        return True
    import torch

    return torch.cuda.is_available() and is_there("fused_weight_gradient_mlp_cuda")


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def architecture(capability: tuple[int, int]) -> str:
    """Name of a GPU generation, e.g. (9, 0) -> Hopper."""
    return ARCHITECTURES.get(capability) or GENERATIONS.get(capability[0], "unknown")


def trains_fp8(capability: tuple[int, int]) -> bool:
    """Whether an FP8 recipe can run on a GPU."""
    return capability >= FP8_CAPABILITY
