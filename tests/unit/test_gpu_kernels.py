"""The kernels of the head's loss, in Triton's interpreter where there is no GPU, against softmax in float64."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

ROWS = 6


def check_kernels(dtype: torch.dtype, width: int, device: str) -> None:
    """Both kernels on rows with targets in the first and last column, in the middle, and outside on either side."""
    from megatron_ext.runtime.gpu_kernels import row_sums, turn_into_gradient

    generator = torch.Generator().manual_seed(width)
    logits = (torch.randn(ROWS, width, generator=generator) * 4).to(dtype).to(device)
    targets = torch.tensor([0, width - 1, width // 2, -3, width, 10 * width], device=device)
    exact, rows, is_here = logits.double(), torch.arange(ROWS, device=device), (targets >= 0) & (targets < width)
    largest, sums = row_sums(logits, targets)
    losses = sums[0].double().log() - sums[1]
    assert torch.equal(largest.double(), exact.amax(dim=1))
    expected = exact.logsumexp(dim=1) - torch.where(is_here, exact[rows, targets.clamp(0, width - 1)], largest.double())
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    turn_into_gradient(logits, targets, largest, sums[0])
    gradient = exact.softmax(dim=1)
    gradient[rows[is_here], targets[is_here]] -= 1
    relative = 2**-7 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits.double(), gradient, rtol=relative, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 100, 20_011])
def test_in_the_interpreter(dtype: str, width: int) -> None:
    """In a process of its own: Triton decides on import how it runs."""
    code = f"import torch; from tests.unit.test_gpu_kernels import check_kernels; check_kernels(torch.{dtype}, {width}, 'cpu')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
