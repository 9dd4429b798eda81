"""Emulated FP8: rounding against bits written out in numpy, products and scales against formulas, layouts against one rank."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.config import PrecisionConfig
from megatron_ext.model.fp8_rounding import block_scale, microscale, round_blocks, round_with_scale, tensor_scale
from megatron_ext.runtime.launch import run_on_ranks
from tests.unit.fp8_reference import fake_quantize, numbers, round_to

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_is_that_of_the_format(name: str) -> None:
    """Every number, every tie between two, what lies just beside a tie, the subnormals, and what is too large."""
    table = numbers(name)
    ties = (table[1:] + table[:-1]) / 2
    values = np.concatenate([table, ties, np.nextafter(ties, np.inf, dtype=np.float32), np.nextafter(ties, 0, dtype=np.float32)])
    values = np.concatenate([values, table[-1] * np.array([1.01, 1.5, 1e6]), table[1] * np.array([0.5, 0.49, 0.51])])
    values = np.concatenate([values, -values]).astype(np.float32)
    found = round_with_scale(torch.from_numpy(values[None]), torch.tensor(1.0), DTYPES[name]).values()
    assert table[-1] == LARGEST[name]
    assert np.array_equal(found.numpy()[0], round_to(name, values))


def test_infinity_saturates_and_nan_stays() -> None:
    values = torch.tensor([[float("inf"), float("-inf"), float("nan")]])
    found = round_with_scale(values, torch.tensor(1.0), torch.float8_e4m3fn).values()
    assert found[0, :2].tolist() == [448.0, -448.0] and found[0, 2].isnan()


def draw(*shape: int, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    """Values over several orders of magnitude, as bfloat16 has them."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=shape) * np.exp(spread * generator.normal(size=shape))
    return torch.from_numpy(values.astype(np.float32)).bfloat16().float().numpy()


def block_wise(values: np.ndarray, rows: int, columns: int, rule: Any) -> np.ndarray:
    """Quantize block by block in numpy, with `rule(largest value) -> scale`."""
    result = np.empty_like(values)
    for i in range(0, values.shape[0], rows):
        for j in range(0, values.shape[1], columns):
            block = values[i : i + rows, j : j + columns]
            result[i : i + rows, j : j + columns] = fake_quantize("e4m3", block, rule(float(np.abs(block).max())))
    return result


def power_of_two_below(amax: float) -> float:
    return 1.0 if amax == 0 else 2.0 ** np.floor(np.log2(448 / amax))


def microscale_of(amax: float) -> float:
    return 1.0 if amax == 0 else 2.0 ** -np.ceil(np.log2(amax / 448))


@pytest.mark.parametrize(
    "block, rule, expected",
    [
        ((1, 128), block_scale, power_of_two_below),
        ((128, 1), block_scale, power_of_two_below),
        ((128, 128), block_scale, power_of_two_below),
        ((1, 32), microscale, microscale_of),
        ((32, 1), microscale, microscale_of),
        (None, tensor_scale, lambda amax: 448 / amax),
    ],
    ids=["row", "column", "square", "micro-row", "micro-column", "tensor"],
)
def test_each_block_has_the_scale_of_its_largest_value(block: Any, rule: Any, expected: Any) -> None:
    values = draw(256, 384, seed=3)
    values[:128, 128:256] = 0  # a block of zeros has a scale too
    values[0, 0] = 7.0  # 448 / 7 is a power of two: the edge of both rules
    found = round_blocks(torch.from_numpy(values).bfloat16(), block, torch.float8_e4m3fn, rule).values().numpy()
    assert np.array_equal(found, block_wise(values, *(block or values.shape), expected))


def test_scales_of_nothing_and_of_too_much() -> None:
    amax = torch.tensor([0.0, float("inf"), 1e-45, float("nan")])
    assert tensor_scale(amax, 448.0)[:3].tolist() == [1.0, 1.0, torch.finfo(torch.float32).max]
    for rule in (tensor_scale, block_scale, microscale):
        scale = rule(amax, 448.0)
        assert scale[3].isnan() and (scale[:3].isfinite() & (scale[:3] > 0) & (1 / scale[:3] > 0)).all()


RECIPES = ("fp8-delayed", "fp8-tensorwise", "fp8-blockwise", "mxfp8")


@pytest.fixture(scope="module")
def one_rank() -> Any:
    """megatron's groups for one rank, in this process."""
    from megatron_ext.config import ParallelConfig, TrainingConfig
    from megatron_ext.runtime.backend import choose_backend
    from megatron_ext.runtime.cpu import patch_megatron
    from megatron_ext.runtime.topology import check_layout, process_groups

    patch_megatron()
    layout = check_layout(ParallelConfig(), TrainingConfig(), 4, {}, 1)
    backend = choose_backend("local")
    with process_groups(layout, backend):
        yield layout, backend


def encoder_config(**other: Any) -> Any:
    """Every side a multiple of 128 on two tensor-parallel ranks too."""
    from megatron_ext.model.presets import EncoderConfig

    sizes = {"hidden_size": 256, "ffn_hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 64}
    return EncoderConfig(num_layers=4, max_position_embeddings=128, init_std=0.05, **{**sizes, **other})


def make_linear(one_rank: Any, recipe: str, dtype: torch.dtype = torch.bfloat16, history: int = 4) -> Any:
    """An emulated layer 256 -> 128 with drawn weights."""
    from megatron_ext.model.fp8_emulation import EmulatedColumnParallelLinear
    from megatron_ext.model.layers import transformer_config

    precision = PrecisionConfig(recipe=recipe, emulation=True, amax_history_length=history)
    config = transformer_config(encoder_config(), one_rank[0], "local", dtype, precision)
    linear = EmulatedColumnParallelLinear(256, 128, config=config, init_method=None, bias=False, gather_output=False)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(draw(128, 256, seed=9, spread=0.5)))
    return linear


def formula(recipe: str, values: np.ndarray, operand: str, sums_over: str, scale: float | None = None) -> np.ndarray:
    """An operand as it enters a product that sums over its `columns` or `rows`."""
    if recipe in ("fp8-delayed", "fp8-tensorwise"):
        name = "e5m2" if operand == "gradient" else "e4m3"
        return fake_quantize(name, values, np.float32(LARGEST[name]) / np.float32(np.abs(values).max()) if scale is None else scale)
    size = 128 if recipe == "fp8-blockwise" else 32
    rule = power_of_two_below if recipe == "fp8-blockwise" else microscale_of
    if recipe == "fp8-blockwise" and operand == "weight":
        return block_wise(values, size, size, rule)
    return block_wise(values, *((1, size) if sums_over == "columns" else (size, 1)), rule)


def run(linear: Any, inputs: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, gradient of the input, gradient of the weight."""
    x = torch.from_numpy(inputs).to(linear.weight.dtype)[:, None].requires_grad_()
    linear.weight.grad = None
    output, _ = linear(x)
    output.backward(torch.from_numpy(gradient).to(output.dtype)[:, None])
    return output.detach()[:, 0].float().numpy(), x.grad[:, 0].float().numpy(), linear.weight.grad.float().numpy()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_three_products_are_of_rounded_operands(one_rank: Any, recipe: str) -> None:
    linear = make_linear(one_rank, recipe)
    inputs, gradient, weight = draw(128, 256, seed=1), draw(128, 128, seed=2), linear.weight.detach().float().numpy()
    scale = 1.0 if recipe == "fp8-delayed" else None  # there are no past steps yet
    x, w, g = [{way: formula(recipe, matrix, name, way, scale) for way in ("columns", "rows")} for matrix, name in (
        (inputs, "input"), (weight, "weight"), (gradient, "gradient"))]  # fmt: skip
    expected = (x["columns"] @ w["columns"].T, g["columns"] @ w["rows"], g["rows"].T @ x["rows"])
    for found, product in zip(run(linear, inputs, gradient), expected, strict=True):
        # One rounding to bfloat16 (8 bits), and float32 sums in another order.
        assert np.abs(found - product).max() <= 2**-8 * np.abs(product).max()
        assert np.abs(found - product).mean() < 2**-8 * np.abs(product).mean()


def test_rounding_is_what_makes_the_difference(one_rank: Any) -> None:
    """The emulated output is off the exact one by what 3 mantissa bits cost, not less and not much more."""
    linear = make_linear(one_rank, "fp8-tensorwise")
    inputs = draw(128, 256, seed=1, spread=0.5)
    exact = inputs @ linear.weight.detach().float().numpy().T
    found, _, _ = run(linear, inputs, draw(128, 128, seed=2))
    assert 0.01 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.08


def test_delayed_scales_come_from_the_largest_values_of_past_steps(one_rank: Any) -> None:
    """Seven steps of two micro-batches against a history kept by hand; it is four steps long, so old values leave it."""
    from megatron_ext.model.fp8_emulation import GRADIENT, INPUT, WEIGHT, end_step

    linear = make_linear(one_rank, "fp8-delayed")
    weight = linear.weight.detach().float().numpy()
    past: list[list[float]] = []
    sizes = [1.0, 8.0, 0.5, 0.25, 0.25, 0.25, 4.0]
    for step, size in enumerate(sizes):
        seen = [0.0, 0.0, 0.0]
        for number in range(2):
            inputs = draw(16, 256, seed=10 * step + number) * np.float32(size)
            gradient = draw(16, 128, seed=100 + 10 * step + number) * np.float32(size / 64)
            found = run(linear, inputs, gradient)
            largest = [max((row[i] for row in past[-4:]), default=0.0) for i in range(3)]
            scales = [limit / value if value else 1.0 for limit, value in zip((448.0, 448.0, 57344.0), largest, strict=True)]
            x = fake_quantize("e4m3", inputs, scales[INPUT])
            w = fake_quantize("e4m3", weight, scales[WEIGHT])
            g = fake_quantize("e5m2", gradient, scales[GRADIENT])
            for result, product in zip(found, (x @ w.T, g @ w, g.T @ x), strict=True):
                assert np.abs(result - product).max() <= 2**-8 * np.abs(product).max()
            seen = [max(a, float(np.abs(b).max())) for a, b in zip(seen, (inputs, weight, gradient), strict=True)]
        end_step([linear], torch.tensor(0.0))
        past.append(seen)
        assert linear.emulated_amax_history[0].tolist() == seen
    assert linear.emulated_amax_history.tolist() == past[:-5:-1]


def test_only_steps_that_are_taken_enter_the_history(one_rank: Any) -> None:
    """Not validation, not a step that was left out; and computing a layer again notes nothing new."""
    from megatron_ext.model.fp8_emulation import end_step

    linear = make_linear(one_rank, "fp8-delayed")
    inputs, gradient = draw(16, 256), draw(16, 128)
    linear.eval()
    run(linear, inputs * 3, gradient)
    linear.train()
    run(linear, inputs * 2, gradient)
    end_step([linear], torch.tensor(1.0))
    assert not linear.emulated_amax_history.any()
    run(linear, inputs, gradient)
    with torch.no_grad():
        linear(torch.from_numpy(inputs).bfloat16()[:, None])
    end_step([linear], torch.tensor(0.0))
    assert linear.emulated_amax_history.count_nonzero() == 3
    assert linear.emulated_amax_history[0, 0] == float(np.abs(inputs).max())


def test_first_and_last_layers_and_the_head_stay_in_bf16(one_rank: Any) -> None:
    from megatron_ext.model.fp8_emulation import _EmulatedProducts
    from megatron_ext.train.build import build_model

    precision = PrecisionConfig(recipe="mxfp8", emulation=True, bf16_first_layers=2, bf16_last_layers=1)
    model = build_model(encoder_config(), 251, *one_rank, torch.bfloat16, 3, precision)[0]
    emulated = [name for name, module in model.named_modules() if isinstance(module, _EmulatedProducts)]
    linears = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    assert sorted(emulated) == sorted(f"decoder.layers.2.{name}" for name in linears)


def train_steps(tensor: int, sequence: bool, recipe: str) -> dict[str, np.ndarray]:
    """Three steps of a small model in float32: losses, gradient norms and histories.

    The weights hardly move: Adam would make much of a small difference between layouts.
    """
    from megatron.core import parallel_state

    from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainingConfig
    from megatron_ext.doctor.small_model import SAMPLES, VOCAB_SIZE, make_batch
    from megatron_ext.model.fp8_emulation import end_step
    from megatron_ext.runtime.backend import choose_backend
    from megatron_ext.runtime.topology import check_layout, initialize
    from megatron_ext.train.build import build_model, wrap_model
    from megatron_ext.train.optimizer import build_optimizer, update
    from megatron_ext.train.step import run_schedule

    ranks = torch.distributed.get_world_size()
    batches_in_all, results = 2, {}
    layout = check_layout(ParallelConfig(tensor=tensor, sequence=sequence), TrainingConfig(), 4, {}, ranks)
    backend = choose_backend("local")
    initialize(layout, backend)
    precision = PrecisionConfig(recipe=recipe, emulation=recipe != "fp32", amax_history_length=2)
    bare = build_model(encoder_config(), VOCAB_SIZE, layout, backend, torch.float32, 3, precision)
    chunks = wrap_model(bare, layout)
    optimizer = build_optimizer(OptimizerConfig(learning_rate=1e-7), chunks, torch.float32, False)
    data = parallel_state.get_data_parallel_rank()
    losses = []
    for step in range(3):
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        numbers = range(step * batches_in_all + data, (step + 1) * batches_in_all, layout.data)
        batches = [make_batch(number, "mlm", True, 128) for number in numbers]
        sums = run_schedule(chunks, batches, 128 * SAMPLES, backend.device, False)
        norm, is_bad = update(optimizer, sums)
        end_step(chunks, is_bad)
        losses.append(sums.reduce().mean_losses()["mlm"])
        results[f"norm {step}"] = norm.numpy()
    results["losses"] = np.array(losses)
    for name, buffer in bare[0].named_buffers():
        if name.endswith("amax_history"):
            results[name] = buffer.float().numpy()
    parallel_state.destroy_model_parallel()
    return results


LAYOUTS = {"TP2": (2, True), "DP2": (1, False)}
LAYOUT_TOLERANCE = 6e-3
"""Layouts sum in another order, and a value that lies on the edge of two FP8 numbers may then fall on the other side of it."""
HISTORY_TOLERANCE = 6e-2
"""Of a largest value: it is one element, and one such fall moves it by up to half a step of e4m3, 1/16."""
OWN_SCALE_TOLERANCE = 2e-2
"""fp8-tensorwise on TP2: a rank scales its own part of a weight by that part's largest value, as Transformer Engine does."""


def run_recipes(layouts: list[str]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """All recipes in one set of processes, which take longer to start than a recipe to run."""
    return {(recipe, layout): train_steps(*LAYOUTS[layout], recipe) for recipe in ("fp32", *RECIPES) for layout in layouts}


def test_two_ranks_compute_what_one_does() -> None:
    """TP2 with sequence parallelism and DP2 against one rank: losses, gradient norms, histories."""
    expected = {recipe: found for (recipe, _), found in run_on_ranks(run_recipes, 1, ["DP2"])[0].items()}
    for rank in run_on_ranks(run_recipes, 2, list(LAYOUTS)):
        for (recipe, layout), found in rank.items():
            assert found.keys() == expected[recipe].keys()
            has_own_scales = recipe == "fp8-tensorwise" and layout == "TP2"
            for name, value in expected[recipe].items():
                tolerance = OWN_SCALE_TOLERANCE if has_own_scales else LAYOUT_TOLERANCE
                tolerance = HISTORY_TOLERANCE if name.endswith("amax_history") else tolerance
                np.testing.assert_allclose(found[name], value, rtol=tolerance, err_msg=f"{recipe} {name} {layout}")
    for recipe in RECIPES:  # each rounds, and each otherwise
        others = [found["losses"] for name, found in expected.items() if name != recipe]
        assert all((expected[recipe]["losses"] != losses).any() for losses in others)
        np.testing.assert_allclose(expected[recipe]["losses"], expected["fp32"]["losses"], rtol=0.03)
