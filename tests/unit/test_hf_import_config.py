"""What a model folder's configuration is read as, in the spellings of the hub, and why a model of another kind is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import UserError
from megatron_ext.hf.families import FAMILIES
from megatron_ext.hf.import_config import REASONS, ImportedConfig, read_config
from megatron_ext.model.presets import EncoderConfig

LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN_25_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL_03 = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 32768,
}
MISTRAL_01 = MISTRAL_03 | {"sliding_window": 4096, "rope_theta": 10000.0, "vocab_size": 32000}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}
EUROBERT_210M = {
    "architectures": ["EuroBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_eurobert.EuroBertConfig",
        "AutoModel": "modeling_eurobert.EuroBertModel",
        "AutoModelForMaskedLM": "modeling_eurobert.EuroBertForMaskedLM",
    },
    "bos_token": "<|begin_of_text|>",
    "bos_token_id": 128000,
    "clf_pooling": "late",
    "eos_token": "<|end_of_text|>",
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "mask_token": "<|mask|>",
    "mask_token_id": 128002,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "eurobert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "num_key_value_heads": 12,
    "pad_token": "<|end_of_text|>",
    "pad_token_id": 128001,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 250000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": False,
    "vocab_size": 128256,
}


def read(folder: Path, tree: dict[str, Any]) -> ImportedConfig:
    """What is read of a `config.json`."""
    (folder / "config.json").write_text(json.dumps(tree))
    return read_config(folder)


def shape(layers: int, hidden: int, ffn: int, heads: int, groups: int, width: int, **other: Any) -> EncoderConfig:
    """The expected shape, as the model's own paper or card has it."""
    return EncoderConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=width,
        **other,
    )


SPELLINGS = {
    "Llama 2 7B": (
        LLAMA_2_7B,
        "llama",
        32000,
        shape(32, 4096, 11008, 32, 32, 128, max_position_embeddings=4096),
    ),
    "Llama 3.2 1B": (
        LLAMA_32_1B,
        "llama",
        128256,
        shape(
            16,
            2048,
            8192,
            32,
            8,
            64,
            rotary_base=500000.0,
            tie_embeddings=True,
            max_position_embeddings=131072,
            rotary_scaling="llama3",
            rotary_factor=32.0,
            rotary_low_frequency_factor=1.0,
            rotary_high_frequency_factor=4.0,
            rotary_original_length=8192,
        ),
    ),
    "Llama with RoPE stretched in the oldest spelling": (
        LLAMA_2_7B | {"rope_scaling": {"type": "linear", "factor": 8.0}, "max_position_embeddings": 32768},
        "llama",
        32000,
        shape(32, 4096, 11008, 32, 32, 128, max_position_embeddings=32768, rotary_scaling="linear", rotary_factor=8.0),
    ),
    "Qwen2.5 0.5B": (
        QWEN_25_05B,
        "qwen2",
        151936,
        shape(
            24,
            896,
            4864,
            14,
            2,
            64,
            rotary_base=1e6,
            norm_epsilon=1e-6,
            tie_embeddings=True,
            max_position_embeddings=32768,
            qkv_bias=True,
        ),
    ),
    "Qwen3 0.6B": (
        QWEN3_06B,
        "qwen3",
        151936,
        shape(
            28,
            1024,
            3072,
            16,
            8,
            128,
            rotary_base=1e6,
            norm_epsilon=1e-6,
            tie_embeddings=True,
            max_position_embeddings=40960,
            qk_norm=True,
        ),
    ),
    "Mistral 0.3": (
        MISTRAL_03,
        "mistral",
        32768,
        shape(32, 4096, 14336, 32, 8, 128, rotary_base=1e6, max_position_embeddings=32768),
    ),
    "SmolLM2 135M": (
        SMOLLM2_135M,
        "llama",
        49152,
        shape(30, 576, 1536, 9, 3, 64, rotary_base=1e5, init_std=1 / 24, tie_embeddings=True, max_position_embeddings=8192),
    ),
    "EuroBERT 210M": (
        EUROBERT_210M,
        "eurobert",
        128256,
        shape(12, 768, 3072, 12, 12, 64, rotary_base=250000.0, max_position_embeddings=8192),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_hubs_spellings_are_read(name: str, tmp_path: Path) -> None:
    tree, family, vocab_size, encoder = SPELLINGS[name]
    found = read(tmp_path, tree)
    assert (found.family.name, found.vocab_size) == (family, vocab_size)
    assert found.encoder == encoder


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_is_read_is_written_as_it_was(name: str, tmp_path: Path) -> None:
    """Through transformers' own reading of both, so that neither spelling nor defaults count."""
    from transformers import AutoConfig

    tree, *_ = SPELLINGS[name]
    found = read(tmp_path, tree)
    ids = {key: tree.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id") if key in tree}
    written = found.family.config(found.encoder, found.vocab_size, tree["torch_dtype"], ids)
    written.save_pretrained(tmp_path / "again")
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path, tmp_path / "again"))
    before["rope_parameters"].pop("type", None)  # the old name of rope_type, which transformers keeps beside the new one
    for key in after.keys() - {"transformers_version", "_name_or_path", "use_cache", "sliding_window", "max_window_layers"}:
        if not (key == "head_dim" and before.get(key) is None):
            assert after[key] == before.get(key), key


def test_a_window_that_no_text_reaches_is_none(tmp_path: Path) -> None:
    assert read(tmp_path, MISTRAL_01 | {"max_position_embeddings": 4096}).encoder.max_position_embeddings == 4096
    qwen = {"sliding_window": 131072, "max_position_embeddings": 131072}
    assert read(tmp_path, QWEN_25_05B | qwen).encoder.max_position_embeddings == 131072
    assert read(tmp_path, QWEN_25_05B | qwen | {"use_sliding_window": True, "max_window_layers": 0})
    assert read(tmp_path, QWEN_25_05B | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 24})


def test_a_model_that_says_it_is_not_causal(tmp_path: Path) -> None:
    assert read(tmp_path, QWEN3_06B | {"is_causal": False}).family.name == "qwen3-bidirectional"
    for tree in (LLAMA_32_1B, QWEN_25_05B, MISTRAL_03):
        with pytest.raises(UserError, match=r"that is not causal \(is_causal\)"):
            read(tmp_path, tree | {"is_causal": False})


ROPE = {"rope_theta": 1e4, "factor": 2.0}
REFUSED = {
    "Mistral 0.1": (MISTRAL_01, r"slides a window of 4096 tokens .* over up to 32768 .*\"sliding_window\": null"),
    "Qwen2 with a window": (
        QWEN_25_05B | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 12},
        "slides a window of 4096 tokens",
    ),
    "yarn": (LLAMA_2_7B | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rule 'yarn'"),
    "Qwen yarn": (
        QWEN_25_05B | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        "rule 'yarn'",
    ),
    "dynamic": (LLAMA_2_7B | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rule 'dynamic'"),
    "longrope": (
        LLAMA_2_7B
        | {"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}},
        "rule 'longrope'",
    ),
    "a rule that nobody knows": (LLAMA_2_7B | {"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rule 'spiral'"),
    "a part of each head": (LLAMA_2_7B | {"partial_rotary_factor": 0.5}, "rotates a part of each head"),
    "gelu": (LLAMA_2_7B | {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "mlp_bias": (LLAMA_2_7B | {"mlp_bias": True}, "mlp_bias"),
    "gptq": (LLAMA_2_7B | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "weights are quantized"),
    "bitsandbytes": (
        LLAMA_2_7B | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "weights are quantized",
    ),
    "fp8": (QWEN3_06B | {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, "weights are quantized"),
    "an unknown type": (LLAMA_2_7B | {"model_type": "llamas"}, "does not know it"),
    "no type": ({"hidden_size": 64}, "does not know it"),
    "heads that do not divide": (LLAMA_2_7B | {"num_key_value_heads": 5}, "does not divide"),
    "a size that is text": (LLAMA_2_7B | {"hidden_size": "large"}, "hidden_size is 'large': it must be a whole number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(name: str, tmp_path: Path) -> None:
    tree, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path, tree)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("kind", REASONS)
def test_models_of_other_kinds_are_refused_with_their_reason(kind: str, tmp_path: Path) -> None:
    """The files that transformers writes for a default model of each kind."""
    from transformers import CONFIG_MAPPING

    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert f"type '{kind}' cannot be imported ({REASONS[kind]}); known: eurobert, llama, mistral, qwen2, qwen3" in str(caught.value)


def test_every_known_kind_is_read_and_none_is_known_twice(tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    assert not REASONS.keys() & {family.model_type for family in FAMILIES.values()}
    for family in FAMILIES.values():
        config = CONFIG_MAPPING[family.model_type](**dict(family.fixed))
        config.save_pretrained(tmp_path / family.name)
        assert read_config(tmp_path / family.name).family == family
