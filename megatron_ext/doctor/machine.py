"""What this machine has, what it lacks and what that costs, and what a run would use."""

import importlib
import os
import platform
import resource
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_ext.doctor.report import Report
from megatron_ext.errors import UserError, one_line
from megatron_ext.runtime.capabilities import (
    architecture,
    find_apex,
    installed_version,
    is_there,
    refusal_of,
    trains_fp8,
    transformer_engine_problem,
)

if TYPE_CHECKING:
    from megatron_ext.runtime.backend import Backend

ENGINE = "transformer-engine"
OPTIONAL = {
    ENGINE: "layers are plain torch modules: attention runs document by document, norms are not fused, no FP8",
    "flash-attn": "Transformer Engine then attends with cuDNN's kernels; the local layers use what torch brings along",
}
"""Distributions that a run can do without, and what that costs."""
LIMITS = {"open files": resource.RLIMIT_NOFILE, "locked memory": resource.RLIMIT_MEMLOCK}
FEW_OPEN_FILES = 4096
SMALL_SHARED_MEMORY = 2**30
PACKAGE = "megatron_ext"
NO_COMMUNICATION = {"gloo": False, "nccl": False, "nccl_version": None, "cuda_version": None, "cudnn_version": None}
Found = TypeVar("Found")


def check_machine() -> Report:
    """Look at this machine; a problem is what would stop a run or spoil it. Takes a few seconds, most of them imports."""
    report = Report("machine")
    apex = find_apex()
    has_torch = _or(None, report, "torch cannot be imported", lambda: importlib.import_module("torch")) is not None
    gpus, links = _look_through_torch(report) if has_torch else ([], NO_COMMUNICATION)
    engine_problem = transformer_engine_problem()
    report.facts = {
        "system": _system(report, has_torch),
        "gpus": gpus,
        "communication": links,
        "packages": _or({}, report, "the required packages cannot be looked up", lambda: _packages(report)),
        "transformer_engine": {"version": installed_version("transformer-engine"), "problem": engine_problem},
        "apex": vars(apex),
        "flash_attention": installed_version("flash-attn"),
        "will_use": None,
    }
    report.facts["fp8"] = _fp8(gpus, engine_problem)
    if refusal := refusal_of(apex):
        report.problems.append(refusal)
    _note_what_is_missing(report, engine_problem)
    _note_limits(report)
    if has_torch and apex.kind != "foreign":  # otherwise importing megatron-core would run the foreign package
        report.facts["will_use"] = _or(None, report, "what a run would use cannot be found out", _will_use)
    if gpus and not links["nccl"]:
        report.problems.append("there is a GPU, but this torch has no NCCL: training on GPUs needs it")
    return report


def _or(fallback: Found, report: Report, complaint: str, look: Callable[[], Found]) -> Found:
    """What `look` finds. A broken package raises anything when it is imported or asked: that is a problem, and the fallback."""
    try:
        return look()
    except Exception as error:
        report.problems.append(f"{complaint} ({error if isinstance(error, UserError) else one_line(error)})")
        return fallback


def _look_through_torch(report: Report) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    gpus = _or([], report, "the GPUs cannot be looked at", _gpus)
    return gpus, _or(NO_COMMUNICATION, report, "torch.distributed cannot be looked at", _communication)


def _memory() -> tuple[int | None, int | None]:
    import psutil

    return _memory_limit(psutil.virtual_memory().total), psutil.virtual_memory().available


def _cpu_capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _system(report: Report, has_torch: bool) -> dict[str, Any]:
    shared, here = Path("/dev/shm"), Path.cwd()
    memory, available = _or((None, None), report, "the memory cannot be looked at", _memory)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_capability": _or(None, report, "the CPU cannot be looked at", _cpu_capability) if has_torch else None,
        "memory_bytes": memory,
        "memory_available_bytes": available,
        "shared_memory_bytes": shutil.disk_usage(shared).total if shared.is_dir() else None,
        "free_disk_bytes": shutil.disk_usage(here).free,
        "folder": str(here),
        "limits": {name: _finite(resource.getrlimit(number)[0]) for name, number in LIMITS.items()},
    }


def _memory_limit(total: int) -> int:
    """The machine's memory, or the container's limit where that is lower."""
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such file, or `max`
        return total


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        capability = (properties.major, properties.minor)
        found.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "compute_capability": list(capability),
                "architecture": architecture(capability),
                "trains_fp8": trains_fp8(capability),
            }
        )
    return found


def _fp8(gpus: list[dict[str, Any]], engine_problem: str | None) -> dict[str, Any]:
    """Whether FP8 matrices can be multiplied here, and if not, why."""
    if not gpus:
        reason = "there is no GPU"
    elif not all(gpu["trains_fp8"] for gpu in gpus):
        gpu = next(gpu for gpu in gpus if not gpu["trains_fp8"])
        reason = f"{gpu['name']} is {gpu['architecture']}: FP8 recipes need Hopper or newer"
    else:
        reason = f"Transformer Engine is missing ({engine_problem})" if engine_problem else None
    return {"possible": reason is None, "reason": reason}


def _communication() -> dict[str, Any]:
    import torch

    has_nccl = torch.distributed.is_nccl_available()
    return {
        "gloo": torch.distributed.is_gloo_available(),
        "nccl": has_nccl,
        "nccl_version": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
        "cuda_version": torch.version.cuda,
        "cudnn_version": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    }


def _packages(report: Report) -> dict[str, str | None]:
    """Versions of what this package requires, held against the versions that it allows."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires(PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        report.notes.append(f"{PACKAGE} itself is not installed (pip install -e .): its requirements cannot be checked")
        return {}
    versions = {}
    for requirement in (one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})):
        version = versions[requirement.name] = installed_version(requirement.name)
        if version is None:
            report.problems.append(f"{requirement.name} is not installed: {requirement.name}{requirement.specifier} is required")
        elif not requirement.specifier.contains(version, prereleases=True):
            report.problems.append(f"{requirement.name} {version} is installed: {requirement.specifier} is required")
    return versions


def _note_what_is_missing(report: Report, engine_problem: str | None) -> None:
    for name, cost in OPTIONAL.items():
        if installed_version(name) is None and not (name == ENGINE and is_there("transformer_engine")):
            report.notes.append(f"{name} is not installed: {cost}")
    if is_there("transformer_engine") and engine_problem is not None:
        report.problems.append(f"{ENGINE} is there but cannot be imported ({engine_problem}): {OPTIONAL[ENGINE]}")
    if report.facts["apex"]["kind"] == "none" and engine_problem is not None:
        report.notes.append("NVIDIA Apex is not installed either: AdamW runs on torch's fused kernel, which costs nothing")
    if not report.facts["gpus"]:
        report.notes.append("there is no GPU: everything runs on the CPU, joined by gloo, which is for small models and tests")


def _note_limits(report: Report) -> None:
    system = report.facts["system"]
    files = system["limits"]["open files"]
    if files is not None and files < FEW_OPEN_FILES:
        report.notes.append(f"at most {files} files can be open: large blends and many ranks need more (ulimit -n)")
    if not report.facts["gpus"]:
        return
    if system["shared_memory_bytes"] is not None and system["shared_memory_bytes"] < SMALL_SHARED_MEMORY:
        report.notes.append(f"/dev/shm has {system['shared_memory_bytes'] >> 20} MiB: NCCL wants 1 GiB (docker run --shm-size)")
    if system["limits"]["locked memory"] is not None:
        report.notes.append("locked memory is limited: NCCL over InfiniBand needs it unlimited (ulimit -l)")


def _will_use() -> dict[str, Any]:
    """What a run with `training.backend: auto` takes, from the functions that a run asks."""
    from megatron_ext.runtime.backend import choose_backend

    backend = choose_backend("auto")
    return {
        "device": backend.device.type,
        "layers": backend.layers,
        "communication": backend.communication,
        "attention": list(_attention(backend)),
    }


def _attention(backend: "Backend") -> Iterator[dict[str, Any]]:
    """For each objective, packed or not: the kernel, the mask it is given, and how many runs of tokens a micro-batch has."""
    from megatron_ext.config import ParallelConfig
    from megatron_ext.doctor.small_model import DOCUMENTS, SAMPLES, make_batch, sequence_length
    from megatron_ext.model.attention import AttentionLayout, mask_type
    from megatron_ext.objective import OBJECTIVES

    for name in OBJECTIVES:
        for packed in (True, False):
            layout = AttentionLayout.of(make_batch(0, name, packed, sequence_length(ParallelConfig())))
            yield {
                "objective": name,
                "packed": packed,
                "kernel": _kernel(backend, layout.causal),
                "mask_type": mask_type(layout, backend.layers),
                "runs": len(layout.segment_lengths),
                "samples": SAMPLES,
                "documents": SAMPLES * DOCUMENTS,
            }


def _kernel(backend: "Backend", causal: bool) -> str:
    """The attention kernel; torch is asked which of its own it takes for a training step of a usual size."""
    import torch
    from torch.nn.attention import SDPBackend

    if backend.layers == "transformer_engine":
        return "Transformer Engine, THD: flash attention or cuDNN, as it decides per call"
    dtype = torch.bfloat16 if backend.device.type == "cuda" else torch.float32
    query = torch.zeros(1, 12, 512, 64, dtype=dtype, device=backend.device, requires_grad=True)
    chosen = SDPBackend(torch._fused_sdp_choice(query, query, query, None, 0.0, causal))
    return f"torch SDPA, {chosen.name.lower()}"
