"""On GPUs: layouts against one rank, Transformer Engine against torch's layers, packed documents against single ones."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.config import ParallelConfig, TrainingConfig
from megatron_ext.data.batch import MicroBatch, collate
from megatron_ext.doctor.equivalence import check_equivalence
from megatron_ext.doctor.small_model import SAMPLES, VOCAB_SIZE, make_batch, make_encoder, sequence_length
from megatron_ext.objective import OBJECTIVES, Example
from megatron_ext.runtime.launch import run_on_ranks

LAYOUTS = {
    "one GPU": (1, "data=1"),
    "DP2": (2, "data=2"),
    "DP2, overlapped": (2, "data=2,distributed_optimizer=true,overlap_gradient_reduce=true,overlap_parameter_gather=true"),
    "TP2": (2, "tensor=2"),
    "PP2 interleaved": (2, "pipeline=2,virtual_pipeline=2"),
    "CP2": (2, "context=2"),
    "TP2 x CP2 x DP2": (8, "tensor=2,context=2,data=2"),
}
PARALLEL = ParallelConfig()
DOCUMENTS = (17, 1, 40, 38)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_on_nccl_equals_one_rank(gpus: int, layout: str, precision: Any) -> None:
    """In float32 with torch's layers, to rounding; in bfloat16 with Transformer Engine's where it is installed."""
    needed, sizes = LAYOUTS[layout]
    if gpus < needed:
        pytest.skip(f"the layout needs {needed} GPUs, there are {gpus}")
    report = check_equivalence(sizes, precision, True, ("clm", "mlm", "mixed"), 2)
    assert report.facts["communication"] == "nccl"
    assert report.problems == []


def measure(layers: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Loss and gradients of one step under each objective, and the logits of documents packed and alone."""
    from megatron_ext.doctor.whole_tensors import whole_gradients
    from megatron_ext.runtime.backend import choose_backend
    from megatron_ext.runtime.topology import check_layout, process_groups
    from megatron_ext.train.build import build_model, wrap_model
    from megatron_ext.train.step import run_schedule

    encoder, length, backend = make_encoder(PARALLEL), sequence_length(PARALLEL), choose_backend(layers)
    training = TrainingConfig(micro_batch_size=SAMPLES, global_batch_size=SAMPLES)
    layout = check_layout(PARALLEL, training, encoder.num_layers, {}, 1)
    results: dict[str, Any] = {}
    with process_groups(layout, backend):
        bare = build_model(encoder, VOCAB_SIZE, layout, backend, dtype, seed=3)
        wrapped = wrap_model(bare, layout)
        for objective in OBJECTIVES:
            wrapped[0].zero_grad_buffer()
            batches = [make_batch(0, objective, True, length)]
            sums = run_schedule(wrapped, batches, SAMPLES * length, backend.device, forward_only=False).reduce()
            results[objective] = sums.mean_losses()[objective], whole_gradients(bare, wrapped, False)
            results[objective, "logits"] = _logits(bare[0], objective, backend.device)
    return results


def _logits(model: Any, objective: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[t, vocab_size] of documents in one row, and of each in a row of its own."""
    tokens = np.random.default_rng(0).integers(5, VOCAB_SIZE, size=sum(DOCUMENTS))
    alone = np.split(tokens, np.cumsum(DOCUMENTS)[:-1])
    with torch.no_grad():
        packed = model(_row(tokens, DOCUMENTS, objective).to(device), return_logits=True)
        single = [model(_row(part, (len(part),), objective).to(device), return_logits=True) for part in alone]
    return packed[:, :VOCAB_SIZE].float().cpu(), torch.cat(single)[:, :VOCAB_SIZE].float().cpu()


def _row(tokens: np.ndarray, documents: tuple[int, ...], objective: str) -> MicroBatch:
    nothing = np.zeros(0, dtype=np.int64)
    example = Example(tokens, nothing, nothing)
    return collate([example], [np.array(documents)], OBJECTIVES[objective], documents_attend_across=False, restart_positions=True)


@pytest.mark.parametrize("dtype, loss, gradient", [(torch.float32, 1e-4, 5e-3), (torch.bfloat16, 1e-3, 1e-1)], ids=["fp32", "bf16"])
def test_transformer_engine_computes_what_torch_does(
    transformer_engine: None, dtype: torch.dtype, loss: float, gradient: float
) -> None:
    """Tolerances: TF32 products in float32, of which rounding the operands on a CPU to ten bits gives 2.0e-3 in the gradients and
    1.0e-5 in the loss; in bfloat16 those of the doctor, which say how far eight bits lead from float32."""
    found = run_on_ranks(measure, 1, "transformer_engine", dtype, on_gpus=True)[0]
    expected = run_on_ranks(measure, 1, "local", torch.float32)[0]
    for objective in OBJECTIVES:
        assert found[objective][0] == pytest.approx(expected[objective][0], rel=loss)
        for name, reference in expected[objective][1].items():
            difference = (found[objective][1][name].float() - reference).abs().max()
            assert difference <= gradient * reference.abs().max(), name


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_packed_documents_do_not_see_each_other(request: pytest.FixtureRequest, gpus: int, layers: str) -> None:
    if layers == "transformer_engine":
        request.getfixturevalue("transformer_engine")
    found = run_on_ranks(measure, 1, layers, torch.bfloat16, on_gpus=True)[0]
    for objective in OBJECTIVES:
        packed, alone = found[objective, "logits"]
        torch.testing.assert_close(packed, alone, rtol=0, atol=2e-2 * float(alone.abs().max()))
