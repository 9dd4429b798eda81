"""The head over tensor-parallel ranks whose parts of the vocabulary hold unequal numbers of tokens, in many chunks."""

from typing import Any

import pytest
import torch

from megatron_ext.config import ParallelConfig, TrainingConfig
from megatron_ext.doctor.small_model import SAMPLES, make_batch, make_encoder, sequence_length
from megatron_ext.runtime.launch import run_on_ranks

LARGE, SMALL = 2**25, 5 * 128
"""Logits at a time: all of them, and a few rows."""


def measure(tensor: int, vocab_size: int, chunk: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step of MLM, both ends of the vocabulary included."""
    from megatron_ext.doctor.whole_tensors import whole_gradients
    from megatron_ext.model import head
    from megatron_ext.runtime.backend import choose_backend
    from megatron_ext.runtime.topology import check_layout, process_groups
    from megatron_ext.train.build import build_model, wrap_model
    from megatron_ext.train.step import run_schedule

    head.LOGITS_PER_CHUNK = {"cpu": chunk}
    parallel = ParallelConfig(tensor=tensor)
    encoder, length, backend = make_encoder(parallel), sequence_length(parallel), choose_backend("local")
    training = TrainingConfig(micro_batch_size=SAMPLES, global_batch_size=SAMPLES)
    layout = check_layout(parallel, training, encoder.num_layers, {}, tensor)
    with process_groups(layout, backend):
        bare = build_model(encoder, vocab_size, layout, backend, torch.float32, seed=3)
        wrapped = wrap_model(bare, layout)
        wrapped[0].zero_grad_buffer()
        sums = run_schedule(wrapped, [make_batch(0, "mlm", True, length)], SAMPLES * length, backend.device, False).reduce()
        return sums.mean_losses()["mlm"], whole_gradients(bare, wrapped, False)


@pytest.mark.parametrize("vocab_size", [251, 258], ids=["128 and 123", "256 and 2"])
def test_ranks_reduce_the_same_chunks(vocab_size: int) -> None:
    """Were chunks as many rows as fit each rank's own part, the ranks would wait for each other, or add up what is apart."""
    loss, gradients = run_on_ranks(measure, 1, 1, vocab_size, LARGE)[0]
    found: list[Any] = run_on_ranks(measure, 2, 2, vocab_size, SMALL)
    assert found[0][0] == pytest.approx(loss, rel=1e-5)
    for name, expected in gradients.items():
        difference = (found[0][1][name][: len(expected)] - expected[: len(found[0][1][name])]).abs().max()
        assert difference <= 2e-5 * expected.abs().max(), name
