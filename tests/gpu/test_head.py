"""On a GPU: the kernels of the head's loss against softmax in float64, and the whole head in bfloat16 against a dense one."""

import pytest
import torch

from tests.unit.test_gpu_kernels import check_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 100, 8192, 128_256])
def test_loss_and_gradient_of_a_chunk(gpus: int, dtype: torch.dtype, width: int) -> None:
    check_kernels(dtype, width, "cuda")


def test_products_are_summed_in_float32(gpus: int) -> None:
    """The gradient of the head's weight over chunks: bfloat16 operands, nothing rounded on the way to the sum."""
    from megatron_ext.model.head import _add_product

    generator = torch.Generator("cuda").manual_seed(0)
    left = torch.randn(4096, 512, generator=generator, device="cuda").bfloat16()
    right = torch.randn(4096, 256, generator=generator, device="cuda").bfloat16()
    total = torch.full((512, 256), float("nan"), device="cuda")
    for number, rows in enumerate(torch.arange(4096).split(1000)):
        _add_product(total, left[rows].t(), right[rows], is_first=number == 0)
    exact = left.double().t() @ right.double()
    assert (total - exact).abs().max() <= 1e-5 * exact.abs().max()
