"""RoPE's angles, against transformers' own."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_ext.errors import UserError
from megatron_ext.model.presets import EncoderConfig
from megatron_ext.model.rotary import rotary_frequencies

SHAPE = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 1, "num_query_groups": 1}


@pytest.mark.parametrize("width", [48, 64, 128])
@pytest.mark.parametrize("factor, low, high, original", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 0.5, 3.0, 40)])
def test_llama3_scaling_equals_that_of_transformers(width: int, factor: float, low: float, high: float, original: int) -> None:
    ours = rotary_frequencies(
        EncoderConfig(
            **SHAPE,
            head_dim=width,
            rotary_base=500_000.0,
            rotary_scaling="llama3",
            rotary_factor=factor,
            rotary_low_frequency_factor=low,
            rotary_high_frequency_factor=high,
            rotary_original_length=original,
        )
    )
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=width, rope_parameters=parameters)
    theirs, scaling = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert scaling == 1.0
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_linear_scaling_equals_that_of_transformers() -> None:
    parameters = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=parameters)
    theirs, _ = ROPE_INIT_FUNCTIONS["linear"](config, torch.device("cpu"))
    ours = rotary_frequencies(EncoderConfig(**SHAPE, head_dim=64, rotary_scaling="linear", rotary_factor=4.0))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"rotary_scaling": "yarn"}, "rotary_scaling is 'yarn'"),
        ({"rotary_factor": 2.0}, "rotary_factor is 2.0"),
        ({"rotary_scaling": "linear", "rotary_factor": 0.5}, "rotary_factor is 0.5"),
        ({"rotary_low_frequency_factor": 4.0}, "rotary_low_frequency_factor 4.0"),
    ],
)
def test_impossible_scaling_is_refused(fields: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        EncoderConfig(**SHAPE, head_dim=64, **fields)
