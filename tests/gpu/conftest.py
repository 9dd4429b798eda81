"""What the tests here need; without it each of them is skipped, with the reason."""

import pytest
import torch

from megatron_ext.runtime.capabilities import transformer_engine_problem


@pytest.fixture(scope="session")
def gpus() -> int:
    """How many GPUs there are."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch.cuda.device_count()


@pytest.fixture(scope="session")
def transformer_engine(gpus: int) -> None:
    """Transformer Engine works."""
    problem = transformer_engine_problem()
    if problem:
        pytest.skip(f"Transformer Engine cannot be imported: {problem}")
