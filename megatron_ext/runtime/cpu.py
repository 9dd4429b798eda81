"""Lets megatron-core run where there is no CUDA, and gives it one AdamW everywhere. The only module that patches it or torch for
good. (`megatron_ext.unpickling.only_plain_data` replaces two functions of torch while a checkpoint is loaded.)

megatron-core assumes CUDA in three ways, each met by one patch below. All were found on 0.16.1 and hold to 0.19.x
(`megatron_versions.SUPPORTED`); `patch_megatron` refuses other versions, so that an upgrade is looked at before it is trusted.
The patches are applied once per process, before any process group; those for a machine without CUDA never where there is one.
"""

import contextlib
import importlib
import inspect
import logging
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from megatron_ext.runtime.adamw import FusedAdamW
from megatron_ext.runtime.cpu_kernels import rotate
from megatron_ext.runtime.megatron_versions import check_version
from megatron_ext.runtime.writer import patch_checkpoint_writer

CUDA_CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
"""Literals that name the CUDA device or its tensor types, and what they mean on a CPU."""

MODULES_WITH_CUDA_CONSTANTS = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.utils",
)


def patch_megatron() -> None:
    """Apply every patch that this machine needs; calling it again changes nothing.

    Raises:
        UserError: megatron-core is outside the versions that the patches were checked against.
    """
    check_version()
    patch_torch_optimizer()
    patch_checkpoint_writer()
    if not torch.cuda.is_available():
        patch_cuda_runtime()
        patch_rng_tracker()
        patch_cuda_constants()
        patch_tensor_lists()
        patch_weight_gradients()
        patch_rotation()
        patch_embedding()


def patch_cuda_runtime() -> None:
    """`torch.cuda` calls without a `cuda.is_available()` guard: the current device is the CPU, streams do nothing.

    Can go when megatron-core asks for the device of the tensors it works on.
    """
    device = torch.device("cpu")
    stream = _NullStream()
    replacements = {
        "current_device": lambda: device,
        "synchronize": lambda device=None: None,
        "is_initialized": lambda: True,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, function in replacements.items():
        setattr(torch.cuda, name, function)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]


class _NullStream:
    """Stands for a CUDA stream: everything has already happened."""

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def patch_rng_tracker() -> None:
    """megatron's tensor-parallel RNG tracker saves and restores the CUDA generator: give it the CPU's.

    Its warning that the CPU state changed inside a GPU context is then always true and says nothing: that logger is silenced.
    """
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def patch_cuda_constants() -> None:
    """Hard-coded `device="cuda"` and `'torch.cuda.FloatTensor'`: translate the literals inside megatron's own functions.

    Rewriting the constants of these few modules leaves torch itself alone: code outside megatron that asks for "cuda" still
    gets torch's honest error.
    """
    for name in MODULES_WITH_CUDA_CONSTANTS:
        module = importlib.import_module(name)
        for function in _functions_of(module):
            function.__code__ = _translate(function.__code__)


def _functions_of(module: types.ModuleType) -> Iterator[types.FunctionType]:
    members: list[Any] = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    for member in members:
        for value in vars(member).values() if inspect.isclass(member) else [member]:
            if isinstance(value, staticmethod | classmethod):
                value = value.__func__
            if isinstance(value, property):
                value = value.fget
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, types.FunctionType):
                yield function


def _translate(code: types.CodeType) -> types.CodeType:
    def translate(constant: Any) -> Any:
        if isinstance(constant, types.CodeType):
            return _translate(constant)
        if isinstance(constant, tuple):
            return tuple(translate(item) for item in constant)
        return CUDA_CONSTANTS.get(constant, constant) if isinstance(constant, str) else constant

    return code.replace(co_consts=tuple(translate(constant) for constant in code.co_consts))


@contextlib.contextmanager
def without_numbers(capability: tuple[int, int]) -> Iterator[None]:
    """Context in which new tensors have a shape and a dtype but no memory, and a GPU of this compute capability seems to be there.

    megatron asks for its device by name, so the device is changed in torch's factory functions, for code in this context only.
    Transformer Engine asks no more of the GPU than whether there is one, and its compute capability. Objects that ranks tell
    each other are taken to be this rank's own: they are the optimizer's parameter groups, which all ranks have alike.
    """
    properties = types.SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132)
    with contextlib.ExitStack() as stack:
        prefix = "torch.cuda." if torch.cuda.is_available() else "torch."
        for owner, name, function in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_capability", lambda device=None: capability),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.distributed, "all_gather_object", _hear_oneself),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, function)
        with _OnMeta(prefix):
            yield


def _hear_oneself(heard: list[Any], said: Any, group: Any = None) -> None:
    heard[:] = [said] * len(heard)


class _OnMeta(TorchFunctionMode):
    """Every factory function makes meta tensors, whatever device it is told."""

    def __init__(self, prefix: str):
        """Args: prefix: of the type names that megatron compares with: `patch_cuda_constants` has shortened them without a GPU."""
        super().__init__()
        self._prefix = prefix

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in _device_constructors() or kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        if function in (torch.Tensor.cpu, torch.Tensor.cuda) and args[0].is_meta:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and args[0].is_meta:
            return function(*args).replace("torch.meta.", self._prefix)
        return function(*args, **kwargs)


def patch_weight_gradients() -> None:
    """The product that gives a weight's gradient adds it to the gradient buffer, which megatron has only as Apex's CUDA kernel.

    Layers take it whose `gradient_accumulation_fusion` is on, which `train.build` does once they have a buffer.
    """
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=_add_weight_gradient)
    layers.get_dummy_wgrad = _gradient_without_meaning  # Transformer Engine's, where that is installed, is on a GPU


def _gradient_without_meaning(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype) if zero else torch.empty(shape, dtype=dtype)


def _add_weight_gradient(rows: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """[t, in], [t, out] -> added to [out, in] in float32."""
    if rows.dtype is main_grad.dtype:
        main_grad.addmm_(grad_output.t(), rows)
    else:
        main_grad.add_(grad_output.t() @ rows)


def patch_rotation() -> None:
    """megatron turns queries and keys with a kernel of Transformer Engine, or in ten passes over memory."""
    importlib.import_module("megatron.core.models.common.embeddings.rope_utils").fused_apply_rotary_pos_emb = rotate


def patch_embedding() -> None:
    """The gradient of a look-up has the rows that were looked up: added to the gradient buffer, not a vocabulary of zeros."""
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    layers.F = types.SimpleNamespace(**{**vars(torch.nn.functional), "embedding": _look_up})


def _look_up(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(ids, weight, sparse=hasattr(weight, "main_grad"))


def patch_tensor_lists() -> None:
    """Where Transformer Engine or Apex is installed, as in the environment that a cluster's login nodes share, megatron takes
    norms and scales lists of tensors with their CUDA kernels: give it its own loops, which it has for machines without them.
    """
    utils = importlib.import_module("megatron.core.utils")
    own = {
        "multi_tensor_applier": utils.local_multi_tensor_applier,
        "l2_norm_impl": utils.local_multi_tensor_l2_norm,
        "multi_tensor_scale_impl": utils.local_multi_tensor_scale,
        "multi_tensor_scale_tensor_impl": None,  # 0.19: then the one above does it
    }
    for name in ("megatron.core.optimizer.clip_grads", "megatron.core.optimizer.optimizer"):
        module = importlib.import_module(name)
        for attribute in own.keys() & vars(module).keys():
            setattr(module, attribute, own[attribute])


def patch_torch_optimizer() -> None:
    """One AdamW on every device. megatron's own choice is Transformer Engine's or Apex's, CUDA kernels both, or torch's, whose
    state per parameter the distributed optimizer cannot load (`KeyError: 'step'`).

    `FusedAdamW` keeps to the interface of Apex's optimizer, so megatron is told that it has that one. With theirs the host would
    have to wait for the device before each update: they take no flag from it that leaves a step out.
    """
    optimizer = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")

    optimizer.Adam = distributed.Adam = FusedAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = True
    distributed.USING_TE_OPTIMIZER, distributed.USING_APEX_OPTIMIZER = False, True
