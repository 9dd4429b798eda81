"""Memory and traffic by formula, against what torch says it keeps, what the kernel says is resident, and published formulas."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config import ParallelConfig, PrecisionConfig, TrainingConfig
from megatron_ext.model.flops import count_parameters
from megatron_ext.model.presets import EncoderConfig, preset_2b, preset_210m
from megatron_ext.plan.communication import KINDS, step_traffic
from megatron_ext.plan.memory import chunks_in_flight, rank_memory
from megatron_ext.runtime.launch import run_on_ranks
from megatron_ext.runtime.topology import Layout

ROOT = Path(__file__).parents[2]
VOCAB_SIZE, TOKENS, SHARE = 1024, 64, 0.4
SMALL = EncoderConfig(num_layers=2, hidden_size=64, ffn_hidden_size=160, num_attention_heads=4, num_query_groups=2, head_dim=16)
SHAPES = {
    "grouped": SMALL,
    "ungrouped": dataclasses.replace(SMALL, num_query_groups=4),
    "tied, biases, norms": dataclasses.replace(SMALL, tie_embeddings=True, qkv_bias=True, qk_norm=True),
    "norms, ungrouped": dataclasses.replace(SMALL, num_query_groups=4, qk_norm=True),
}
TRAINING = TrainingConfig(micro_batch_size=4, global_batch_size=4)


def layout_of(**sizes: Any) -> Layout:
    """A layout with these sizes, the others at 1."""
    ranks = {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "data": 1, **sizes}
    world = ranks["tensor"] * ranks["pipeline"] * ranks["context"] * ranks["data"]
    return Layout(**{"world_size": world, "sequence_parallel": False, "distributed_optimizer": False, **ranks})


# --- measured in a process of its own -------------------------------------------------------------------------------------


def count_kept_bytes() -> dict[tuple[str, str], int]:
    """For each shape and recipe the bytes that autograd keeps after a forward pass, weights aside."""
    return {(name, recipe): _kept(shape, recipe) for name, shape in SHAPES.items() for recipe in ("fp32", "bf16")}


def _kept(encoder: EncoderConfig, recipe: str) -> int:
    from benchmarks.memory import Row, make_batch
    from megatron_ext.runtime.backend import choose_backend
    from megatron_ext.runtime.topology import check_layout, process_groups
    from megatron_ext.train.build import build_model

    dtype = torch.float32 if recipe == "fp32" else torch.bfloat16
    layout, backend = check_layout(ParallelConfig(), TRAINING, encoder.num_layers, {}, 1), choose_backend("local")
    row = Row("", "", TOKENS, TRAINING.micro_batch_size, VOCAB_SIZE, predicted_share=SHARE)
    with process_groups(layout, backend):
        (model,) = build_model(encoder, VOCAB_SIZE, layout, backend, dtype, 0)
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(make_batch(row, 0))
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        return sum(storage.nbytes() for storage in kept.values())


# --- tests ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept() -> dict[tuple[str, str], int]:
    return run_on_ranks(count_kept_bytes, 1)[0]


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_autograd_keeps(shape: str, recipe: str, kept: dict[tuple[str, str], int]) -> None:
    encoder, precision = SHAPES[shape], PrecisionConfig(recipe=recipe)
    memory = rank_memory(encoder, VOCAB_SIZE, layout_of(), TRAINING, precision, TOKENS, 0, SHARE, on_cpu=True)
    predicted = TRAINING.micro_batch_size * round(TOKENS * SHARE)
    # What the head keeps: the gradients of the predicted rows, and of its weight in float32.
    head = predicted * encoder.hidden_size * (4 if recipe == "fp32" else 2) + VOCAB_SIZE * encoder.hidden_size * 4
    assert memory.activations + head == pytest.approx(kept[shape, recipe], rel=0.01)


def test_resident_memory_of_a_small_run() -> None:
    """`make bench-memory` holds larger ones to 10 %; here libraries' own buffers weigh more."""
    command = [sys.executable, "-m", "benchmarks.memory", "--worker", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["predicted"] == pytest.approx(result["measured"], rel=0.2)


@pytest.mark.parametrize("stage", range(4))
def test_micro_batches_in_flight_of_1f1b(stage: int) -> None:
    """Narayanan et al., arXiv 2104.04473: a stage holds as many as there are stages from it to the end, or all."""
    layout = layout_of(pipeline=4)
    assert chunks_in_flight(layout, 16, stage) == 4 - stage
    assert chunks_in_flight(layout, 2, stage) == min(2, 4 - stage)


@pytest.mark.parametrize("chunks", [2, 4])
def test_interleaving_costs_what_the_literature_says(chunks: int) -> None:
    """Korthikanti et al., arXiv 2205.05198: the first stage holds L (1 + (p - 1) / (p v)) layers' activations."""
    p, layers = 4, 1.0 / (4 * chunks)
    held = chunks_in_flight(layout_of(pipeline=p, virtual_pipeline=chunks), 64, 0) * layers
    assert held == pytest.approx(1 + (p - 1) / (p * chunks))


def test_transformer_engine_layer_by_the_published_count() -> None:
    """Per token and layer, of width h in bf16: two norms' inputs and results, q, k, v, their result, gate, up and product."""
    encoder = preset_210m()
    memory = rank_memory(encoder, VOCAB_SIZE, layout_of(), TRAINING, PrecisionConfig(recipe="bf16"), 512, 0, SHARE)
    per_token = 2 * (4 * 768 + 4 * 768 + 3 * 3072) * encoder.num_layers
    assert memory.activations == pytest.approx(4 * 512 * per_token, rel=0.01)


def test_tensor_and_sequence_parallelism_divide_activations() -> None:
    args = (TrainingConfig(micro_batch_size=4, global_batch_size=4), PrecisionConfig(recipe="bf16"), 2048, 0, SHARE)
    one = rank_memory(preset_2b(), 128_256, layout_of(), *args).activations
    two = rank_memory(preset_2b(), 128_256, layout_of(tensor=2, sequence_parallel=True), *args).activations
    without = rank_memory(preset_2b(), 128_256, layout_of(tensor=2), *args).activations
    assert two == pytest.approx(one / 2, rel=0.001)
    assert two < without < one


def test_recomputation_and_fp8() -> None:
    def activations(recompute: str, recipe: str = "bf16") -> int:
        training = TrainingConfig(micro_batch_size=4, global_batch_size=4, recompute=recompute)
        return rank_memory(preset_2b(), 128_256, layout_of(), training, PrecisionConfig(recipe=recipe), 2048, 0, SHARE).activations

    assert activations("full") == pytest.approx((32 + 1) * 4 * 2048 * 2304 * 2, rel=0.01)  # the layers' inputs and the last norm's
    assert activations("full") < activations("attention") < activations("none")
    assert activations("none", "fp8-delayed") < activations("none")


def test_weights_of_fp8_layers_are_there_twice_more() -> None:
    encoder, layout = preset_210m(), layout_of(distributed_optimizer=True, data=8)
    training = TrainingConfig(micro_batch_size=1, global_batch_size=8)
    matrices = count_parameters(encoder, VOCAB_SIZE).blocks * 10 // 12  # the first and the last layer stay in bf16

    def weights(**precision: Any) -> int:
        return rank_memory(encoder, VOCAB_SIZE, layout, training, PrecisionConfig(**precision), 512, 0, SHARE).weights

    plain = weights(recipe="bf16")
    assert weights(recipe="fp8-delayed") - plain == 2 * matrices
    assert weights(recipe="fp8-delayed", fp8_parameters=True) == pytest.approx(plain, rel=0.001)  # 1 + 1 bytes for 2
    assert weights(recipe="fp8-delayed", emulation=True) == plain


def traffic(layout: Layout, stage: int = 0, **training: Any) -> dict[str, float]:
    batches = TrainingConfig(**{"micro_batch_size": 2, "global_batch_size": 16 * layout.data, **training})
    return step_traffic(preset_2b(), 128_256, layout, batches, PrecisionConfig(recipe="bf16"), 2048, stage, SHARE)


def test_a_single_rank_sends_nothing() -> None:
    assert traffic(layout_of()) == dict.fromkeys(KINDS, 0.0)


def test_data_parallel_traffic() -> None:
    """Gradients in float32, weights in bf16: reduce-scatter 4 P (d - 1) / d and all-gather 2 P (d - 1) / d, or an all-reduce."""
    parameters = count_parameters(preset_2b(), 128_256).total
    sharded = traffic(layout_of(data=8, distributed_optimizer=True))
    assert sharded["reduce_scatter"] == pytest.approx(4 * parameters * 7 / 8)
    assert sharded["all_gather"] == pytest.approx(2 * parameters * 7 / 8)
    assert traffic(layout_of(data=8))["all_reduce"] == pytest.approx(8 * parameters * 7 / 8)


def test_tensor_parallel_traffic() -> None:
    """Four all-reduces a layer and micro-batch (Shoeybi et al., arXiv 1909.08053): 8 b s h (t - 1) / t numbers."""
    blocks = 8 * 32 * 8 * (2 * 2048 * 2304) / 2 * 2  # micro-batches, layers, times b s h numbers of 2 bytes
    sent = traffic(layout_of(tensor=2))["tensor"]
    assert blocks < sent < 1.03 * blocks  # the embedding and the head add a little


def test_pipeline_traffic() -> None:
    """One hidden state forward and one backward a boundary and micro-batch, whose parts sequence parallelism sends apart."""
    state = 8 * 2 * 2048 * 2304 * 2
    layout = layout_of(pipeline=4)
    assert [traffic(layout, stage)["pipeline"] for stage in range(4)] == [state, 2 * state, 2 * state, state]
    both = layout_of(pipeline=4, tensor=2, sequence_parallel=True)
    assert traffic(both, 1)["pipeline"] == state


def test_context_parallel_traffic() -> None:
    """Keys and values of the whole row are gathered once, and their gradients scattered once."""
    keys_and_values = 2 * (2 * 2048) * 6 * 128 * 2
    assert traffic(layout_of(context=2))["context"] == 8 * 32 * 2 * keys_and_values / 2
    again = traffic(layout_of(context=2), recompute="attention")["context"]
    assert again == 1.5 * traffic(layout_of(context=2))["context"]


def test_a_tied_embedding_is_reduced_between_the_ends() -> None:
    encoder = dataclasses.replace(preset_2b(), tie_embeddings=True)
    args = (128_256, layout_of(pipeline=2), TRAINING, PrecisionConfig(), 2048)
    sent = [step_traffic(encoder, *args, stage, SHARE)["embedding"] for stage in range(2)]
    assert sent == [4 * 128_256 * 2304] * 2


def test_a_chunk_of_logits_is_that_of_the_head() -> None:
    from megatron_ext.model import head
    from megatron_ext.plan import memory

    assert memory.LOGITS_PER_CHUNK is head.LOGITS_PER_CHUNK
