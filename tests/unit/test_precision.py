"""Precision recipes: what they ask of megatron-core, and what is refused, with the way out named."""

import re
from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.config import ParallelConfig, PrecisionConfig, TrainingConfig
from megatron_ext.config_reading import from_dict
from megatron_ext.errors import UserError
from megatron_ext.model.presets import PRESETS, EncoderConfig
from megatron_ext.runtime.precision import (
    FP8_RECIPES,
    check_precision,
    data_parallel_settings,
    emulation_notice,
    optimizer_settings,
    small_width_warning,
    stays_in_bf16,
    transformer_settings,
)
from megatron_ext.runtime.topology import Layout, check_layout

HOPPER, ADA, BLACKWELL, RTX_BLACKWELL = (9, 0), (8, 9), (10, 0), (12, 0)
ENCODER = PRESETS["2b"]()  # 32 layers, width 2304, FFN 6144, 18 heads and 6 groups of 128


def precision(recipe: str, **other: Any) -> PrecisionConfig:
    return PrecisionConfig(recipe=recipe, **other)


def layout(tensor: int = 1, pipeline: int = 1, sequence: bool = True) -> Layout:
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=sequence)
    return check_layout(parallel, TrainingConfig(), 32, {}, tensor * pipeline)


def check(recipe: str, encoder: EncoderConfig = ENCODER, place: Layout | None = None, tokens: int = 4096, **other: Any) -> None:
    """On a Hopper GPU with Transformer Engine, emulated if `other` says so."""
    check_precision(precision(recipe, **other), encoder, place or layout(), tokens, HOPPER, True)


def refusal(*arguments: Any, **named: Any) -> str:
    with pytest.raises(UserError) as caught:
        check(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "recipe, capability, has_te, found",
    [
        ("fp8-delayed", None, False, "has no GPU"),
        ("fp8-tensorwise", (8, 0), True, "compute capability 8.0"),
        ("fp8-blockwise", ADA, True, "compute capability 8.9"),
        ("fp8-delayed", HOPPER, False, "has no Transformer Engine"),
        ("mxfp8", HOPPER, True, "compute capability 9.0"),
        ("mxfp8", RTX_BLACKWELL, True, "compute capability 12.0"),
    ],
)
def test_devices_without_the_kernels_are_refused(recipe: str, capability: Any, has_te: bool, found: str) -> None:
    with pytest.raises(UserError) as caught:
        check_precision(precision(recipe), ENCODER, layout(), 4096, capability, has_te)
    for word in (f"precision.recipe is {recipe}", found, "precision.emulation to true", "bf16", "Transformer Engine"):
        assert word in str(caught.value)
    check_precision(precision(recipe, emulation=True), ENCODER, layout(), 4096, capability, has_te)


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_devices_with_the_kernels_are_taken(recipe: str) -> None:
    check_precision(precision(recipe), ENCODER, layout(), 4096, BLACKWELL, True)


def test_other_recipes_ask_for_nothing() -> None:
    odd = replace(ENCODER, hidden_size=18 * 65, ffn_hidden_size=77)
    for recipe in ("fp32", "bf16"):
        check_precision(precision(recipe), odd, layout(), 7, None, False)
        assert transformer_settings(precision(recipe)) == optimizer_settings(precision(recipe)) == {}
        assert data_parallel_settings(precision(recipe)) == {"fp8_param_gather": False}


@pytest.mark.parametrize(
    "recipe, change, place, tokens, words",
    [
        ("fp8-delayed", {"ffn_hidden_size": 6150}, layout(), 4096, ["model.ffn_hidden_size is 6150", "of 16", "6144 or 6160"]),
        (
            "fp8-tensorwise",
            {"ffn_hidden_size": 6160},
            layout(2),
            4096,
            ["ffn_hidden_size is 6160", "rank has 3080", "6144 or 6176"],
        ),
        ("fp8-blockwise", {"ffn_hidden_size": 704}, layout(), 4096, ["model.ffn_hidden_size is 704", "of 128", "640 or 768"]),
        ("mxfp8", {"ffn_hidden_size": 16}, layout(), 4096, ["model.ffn_hidden_size is 16", "of 32", "set it to 32"]),
        ("fp8-blockwise", {"ffn_hidden_size": 896}, layout(2), 4096, ["rank has 448", "parallel.tensor to 1"]),
        ("fp8-blockwise", {"hidden_size": 1728}, layout(), 4096, ["model.hidden_size is 1728", "1152 or 2304"]),
        ("fp8-blockwise", {"head_dim": 64}, layout(6), 4608, ["tensor 6", "1920", "has 320", "to 1 or 3"]),
        (
            "mxfp8",
            {"head_dim": 20},
            layout(),
            4096,
            ["(18 heads + 2 x 6 groups) x 20 = 600", "model.head_dim to 16 or 32"],
        ),
        ("fp8-delayed", {}, layout(), 1000, ["1000 tokens", "training.micro_batch_size x data.sequence_length", "992 or 1008"]),
        ("fp8-delayed", {}, layout(2), 1008, ["sequence-parallel rank has 504", "992 or 1024"]),
        ("fp8-blockwise", {}, layout(), 64, ["64 tokens", "make it 128 tokens"]),
    ],
)
def test_sides_that_do_not_divide_are_named_with_the_fix(
    recipe: str, change: dict[str, int], place: Layout, tokens: int, words: list[str]
) -> None:
    emulated = refusal(recipe, replace(ENCODER, **change), place, tokens, emulation=True)
    assert all(word in emulated for word in [*words, f"precision.recipe {recipe}"]), emulated
    if recipe != "mxfp8":
        assert refusal(recipe, replace(ENCODER, **change), place, tokens) == emulated


def follow(message: str, sizes: dict[str, int]) -> dict[str, int]:
    """The sizes with the last number that the advice names in place."""
    advice = message.split("; ")[-1]
    if "parallel.tensor to" in advice:
        return {**sizes, "tensor": int(re.findall(r"\d+", advice)[-1])}
    if "model.head_dim to" in advice:
        return {**sizes, "head_dim": int(re.findall(r"\d+", advice.split(" (")[0])[-1]), "tensor": 1}
    field = "tokens" if "tokens" in advice else message.split()[0].removeprefix("model.")
    return {**sizes, field: int(re.findall(r"\d+", advice)[-1])}


@pytest.mark.parametrize("recipe", FP8_RECIPES)
@pytest.mark.parametrize("name", ["tiny", "610m", "1b"])
@pytest.mark.parametrize("tensor", [1, 2, 6])
def test_advice_leads_to_sizes_that_are_taken(recipe: str, name: str, tensor: int) -> None:
    """Each advice mends what it is about: four are enough for tokens, width, feed-forward and attention."""
    encoder, sizes, message = PRESETS[name](), {"tokens": 500, "tensor": tensor}, ""
    for _ in range(5):
        shape = {field: value for field, value in sizes.items() if field not in ("tokens", "tensor")}
        try:
            check(recipe, replace(encoder, **shape), layout(sizes["tensor"]), sizes["tokens"], emulation=True)
            return
        except UserError as error:
            message = str(error)
            sizes = follow(message, sizes)
    pytest.fail(f"the advice leads nowhere, at last: {message}")


def test_bf16_layers_must_leave_some_and_fit_megatron() -> None:
    message = refusal("mxfp8", bf16_first_layers=30, bf16_last_layers=2, emulation=True)
    assert "bf16_first_layers 30 + bf16_last_layers 2" in message and "32 layers" in message
    assert "precision.bf16_last_layers is 9" in refusal("fp8-delayed", place=layout(pipeline=4), bf16_last_layers=9)
    check("fp8-delayed", place=layout(pipeline=4), bf16_last_layers=8)
    assert [stays_in_bf16(precision("mxfp8", bf16_first_layers=2, bf16_last_layers=1), layer, 6) for layer in range(6)] == [
        True, True, False, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_megatron_takes_the_settings(recipe: str) -> None:
    """Through the checks of its own `__post_init__`, with pipeline stages; of torch layers, for Transformer Engine's want a GPU."""
    import torch

    from megatron_ext.model.layers import transformer_config

    asked = precision(recipe, fp8_parameters=True, bf16_first_layers=2, amax_history_length=77)
    config = transformer_config(ENCODER, layout(2, 4), "local", torch.bfloat16, asked)
    names = {"fp8-delayed": "delayed", "fp8-tensorwise": "tensorwise", "fp8-blockwise": "blockwise", "mxfp8": "mxfp8"}
    assert (config.fp8_recipe, config.fp8_param) == (names[recipe], True)
    assert config.fp8 == ("hybrid" if recipe in ("fp8-delayed", "fp8-tensorwise") else "e4m3")
    if recipe == "fp8-delayed":
        assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo, config.fp8_margin) == (77, "max", 0)
        assert not config.first_last_layers_bf16, "megatron refuses it; the layers are made so"
    else:
        assert (config.first_last_layers_bf16, config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (True, 2, 1)
    assert data_parallel_settings(asked) == {"fp8_param_gather": True}
    assert optimizer_settings(asked) == {"fp8_recipe": names[recipe]}
    emulated = transformer_config(ENCODER, layout(2, 4), "local", torch.bfloat16, precision(recipe, emulation=True))
    assert emulated.fp8 is None, "megatron's FP8 contexts stay away from an emulation"


def test_what_megatron_takes_is_what_it_has() -> None:
    """The settings are fields of megatron's own configurations, whatever its version."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    asked = precision("mxfp8", fp8_parameters=True)
    assert DistributedDataParallelConfig(use_distributed_optimizer=True, **data_parallel_settings(asked)).fp8_param_gather
    assert OptimizerConfig(**optimizer_settings(asked)).fp8_recipe == "mxfp8"


def run_tree(recipe: str, backend: str = "auto", **other: Any) -> dict[str, Any]:
    return {
        "output_dir": "x",
        "data": {"tokenizer": "t", "train": [{"prefix": "p"}]},
        "phases": [{"objective": "mlm", "steps": 1}],
        "precision": {"recipe": recipe, **other},
        "training": {"backend": backend},
    }


def test_emulation_and_kernels_have_their_backends() -> None:
    with pytest.raises(UserError, match="precision.emulation is true with training.backend transformer_engine"):
        from_dict(run_tree("mxfp8", "transformer_engine", emulation=True))
    with pytest.raises(UserError, match="precision.recipe is mxfp8 with training.backend local: .* precision.emulation to true"):
        from_dict(run_tree("mxfp8", "local"))
    for backend in ("auto", "local"):
        assert from_dict(run_tree("mxfp8", backend, emulation=True)).precision.label == "mxfp8 (emulation)"


def test_small_width_is_warned_of() -> None:
    warning = small_width_warning(precision("fp8-delayed"), 768)
    assert warning is not None
    for word in ("fp8-delayed", "768", "1.05x", "1,280", "1.33x", "2,560"):
        assert word in warning
    assert small_width_warning(precision("fp8-delayed"), 2560) is None
    assert small_width_warning(precision("fp8-delayed", emulation=True), 768) is None, "an emulation is not run for its speed"
    assert small_width_warning(precision("bf16"), 768) is None


def test_an_emulated_run_says_so() -> None:
    assert "fp8-blockwise (emulation)" in (emulation_notice(precision("fp8-blockwise", emulation=True)) or "")
    assert emulation_notice(precision("fp8-blockwise")) is None
