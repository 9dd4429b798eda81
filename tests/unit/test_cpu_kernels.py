"""Norm, gate and rotation for CPUs against torch's and megatron's operations, and their gradients against finite differences."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor

from megatron_ext.runtime.cpu import patch_weight_gradients
from megatron_ext.runtime.cpu_kernels import rms_norm, rotate, swiglu

TOKENS, HEADS, WIDTH = 7, 3, 8
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def angles(dtype: torch.dtype = torch.float32) -> Tensor:
    """[t, 1, 1, d] as megatron's rotary embedding gives them: one half twice."""
    half = torch.arange(TOKENS, dtype=dtype)[:, None] * 0.3 ** torch.arange(WIDTH // 2, dtype=dtype)
    return torch.cat([half, half], dim=-1)[:, None, None, :]


def dense_swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def assert_same(ours: Callable[..., Tensor], dense: Callable[..., Tensor], inputs: tuple[Tensor, ...], tolerance: float) -> None:
    found, expected = ours(*inputs), dense(*inputs)
    grad = random(*expected.shape, dtype=expected.dtype, seed=9).detach()
    tensors = [found, *torch.autograd.grad(found, inputs, grad)], [expected, *torch.autograd.grad(expected, inputs, grad)]
    for one, other in zip(*tensors, strict=True):
        assert one.dtype is other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype) -> None:
    inputs = random(TOKENS, 1, 24, dtype=dtype), random(24, dtype=dtype, seed=1)
    assert_same(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (24,), w, 1e-5), inputs, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype: torch.dtype) -> None:
    assert_same(swiglu, dense_swiglu, (random(TOKENS, 1, 24, dtype=dtype),), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation(dtype: torch.dtype) -> None:
    heads = random(TOKENS, 1, HEADS, WIDTH, dtype=dtype)
    assert_same(lambda x: rotate(x, angles()), lambda x: _apply_rotary_pos_emb_bshd(x, angles()), (heads,), DTYPES[dtype])


def test_rotation_of_a_view_that_is_not_contiguous() -> None:
    query = random(TOKENS, 1, HEADS, 3 * WIDTH).split(WIDTH, dim=-1)[1]
    torch.testing.assert_close(rotate(query, angles()), _apply_rotary_pos_emb_bshd(query, angles()))


def test_gradients_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(swiglu, (random(3, 1, 8, dtype=torch.float64),))
    heads = random(TOKENS, 1, 2, WIDTH, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles(torch.float64)), (heads,))


def test_layers_add_gradients_on_a_cpu_where_transformer_engine_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron takes TE's function for the gradient without meaning there, and that one asks for a GPU."""
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(
        layers, "get_dummy_wgrad", lambda shape, dtype, zero=False: torch.empty(shape, device="cuda"), raising=False
    )
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
    patch_weight_gradients()
    assert layers.get_dummy_wgrad([2, 3], torch.float32).shape == (2, 3)
    assert not layers.get_dummy_wgrad([2, 3], torch.float32, zero=True).any()
    rows, grad = random(5, 3).detach(), random(5, 2, seed=1).detach()
    total = torch.ones(2, 3)
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(rows, grad, total)
    torch.testing.assert_close(total, 1 + grad.t() @ rows)
