"""Reads a Hugging Face model's configuration as one of our shapes, or says by name why it cannot be one."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import UserError, one_line
from megatron_ext.hf.families import FAMILIES, Family
from megatron_ext.model.presets import EncoderConfig
from megatron_ext.regular_file import read_small_file
from megatron_ext.run_record import check_encoder, check_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

REASONS = {
    "gemma": "its norms add one to their weights and its embedding is scaled",
    "gemma2": "it norms after each block too and caps its logits",
    "gemma3": "it norms after each block too and slides a window in most layers",
    "gemma3_text": "it norms after each block too and slides a window in most layers",
    "mixtral": "it is a mixture of experts",
    "qwen2_moe": "it is a mixture of experts",
    "qwen3_moe": "it is a mixture of experts",
    "deepseek_v2": "it is a mixture of experts with latent attention",
    "deepseek_v3": "it is a mixture of experts with latent attention",
    "gpt_oss": "it is a mixture of experts with attention sinks",
    "gpt2": "its positions are learned and its norms are LayerNorms",
    "gpt_neox": "its blocks run in parallel and its norms are LayerNorms",
    "opt": "its positions are learned and its norms are LayerNorms",
    "phi": "its blocks run in parallel and its norms are LayerNorms",
    "phi3": "it rotates a part of each head and may stretch RoPE by its own rule (longrope)",
    "olmo": "its norms have no weights",
    "olmo2": "it norms after each block instead of before",
    "cohere": "its blocks run in parallel and its logits are scaled",
    "starcoder2": "its norms are LayerNorms and its feed-forward block has no gate",
    "bert": "it norms after each block and its positions are learned",
    "roberta": "it norms after each block and its positions are learned",
    "modernbert": "its norms are LayerNorms and most of its layers see a window only",
    "granite": "it scales embeddings, attention, residuals and logits",
    "smollm3": "some of its layers have no RoPE",
    "mamba": "it has no attention",
}
"""Why a model type is not one of ours."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
"""A model on the hub; a folder on somebody's disk is none."""

LARGEST_CONFIG = 2**24
"""Bytes."""
SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
"""transformers' names of sizes, and ours."""
SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3"}


@dataclass(frozen=True)
class ImportedConfig:
    """What a model folder's configuration says."""

    family: Family
    encoder: EncoderConfig
    vocab_size: int
    """Rows of the embedding; a tokenizer may have fewer ids."""
    base_model: str | None = None
    """Its name on a hub, if the configuration gives one."""


def read_config(folder: Path) -> ImportedConfig:
    """Read `config.json`; code that a folder brings along is not run.

    Raises:
        UserError: it is missing or broken, or its model is none that can be represented; the reason is named.
    """
    tree = _read_tree(folder / "config.json")
    model_type = tree.get("model_type")
    family = next((family for family in FAMILIES.values() if family.model_type == model_type), None)
    if family is None:
        known = sorted({family.model_type for family in FAMILIES.values()})
        reason = REASONS.get(str(model_type), "this version does not know it")
        raise UserError(
            f"{folder}: a model of type {str(model_type)!r:.60} cannot be imported ({reason}); known: {', '.join(known)}"
        )
    if family.model_type == "qwen3" and tree.get("is_causal") is False:
        family = FAMILIES["qwen3-bidirectional"]
    source = str(folder / "config.json")
    check_sizes(tree, SIZES, source)
    config = _parse(folder)
    try:
        _check(folder, config, family)
        encoder = _encoder(folder, config, family)
    except (TypeError, ValueError, KeyError, OverflowError) as error:  # fields that are not what they should be
        raise UserError(f"{source} cannot be read as a configuration ({one_line(error)})") from None
    check_encoder(vars(encoder), source)
    name = tree.get("_name_or_path")  # also the path on the machine that it was saved on
    base_model = name if isinstance(name, str) and HUB_NAME.fullmatch(name) else None
    return ImportedConfig(family, encoder, int(config.vocab_size), base_model)


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(read_small_file(path, LARGEST_CONFIG).decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; the folder of a Hugging Face model is wanted") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({one_line(error)})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a JSON object")
    return tree


def _parse(folder: Path) -> "PreTrainedConfig":
    """As transformers reads it, whichever of its versions wrote it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and its checks of fields raise anything
        raise UserError(f"{folder / 'config.json'} cannot be read as a configuration ({one_line(error)})") from None


def _check(folder: Path, config: "PreTrainedConfig", family: Family) -> None:
    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise UserError(f"{folder} cannot be imported: {problem}")

    window, length = _window(config), config.max_position_embeddings
    require(
        window is None or window >= length,
        f"its attention slides a window of {window} tokens (sliding_window) over up to {length} (max_position_embeddings); up to "
        f'{window} it is a model without: write "sliding_window": null and "max_position_embeddings": {window} for those alone',
    )
    require(config.hidden_act in ("silu", "swish"), f"hidden_act is {config.hidden_act!r:.40}; only silu (SwiGLU) is known")
    require(not family.causal or getattr(config, "is_causal", True), f"a {family.model_type} that is not causal (is_causal)")
    layer_types = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    require(not layer_types, f"it has layers of the type {', '.join(sorted(layer_types))} (layer_types)")
    require(not getattr(config, "mlp_bias", False), "its feed-forward blocks have biases (mlp_bias)")
    require(getattr(config, "quantization_config", None) is None, "its weights are quantized (quantization_config)")
    rope = _rope(config)
    require(rope.get("rope_type") in SCALINGS, f"RoPE is stretched by the rule {rope.get('rope_type')!r:.40} (rope_scaling)")
    require(type(rope.get("rope_theta")) in (int, float), "RoPE has no base (rope_theta)")
    require(rope.get("partial_rotary_factor", 1.0) == 1.0, "it rotates a part of each head only (partial_rotary_factor)")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "logit_scale"):
        require(getattr(config, name, None) is None, f"it changes its logits ({name})")


def _window(config: "PreTrainedConfig") -> int | None:
    """Tokens that an attention layer sees at most; None if every layer sees all."""
    layer_types = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    slides = getattr(config, "use_sliding_window", True) and "sliding_attention" in layer_types
    return getattr(config, "sliding_window", None) if slides else None


def _rope(config: "PreTrainedConfig") -> dict[str, Any]:
    return {"rope_type": "default", **(config.rope_parameters or {})}


def _encoder(folder: Path, config: "PreTrainedConfig", family: Family) -> EncoderConfig:
    rope = _rope(config)
    scaling: dict[str, Any] = {"rotary_scaling": SCALINGS[rope["rope_type"]]}
    if scaling["rotary_scaling"] != "none":
        scaling["rotary_factor"] = float(rope["factor"])
    if scaling["rotary_scaling"] == "llama3":
        scaling |= {
            "rotary_low_frequency_factor": float(rope["low_freq_factor"]),
            "rotary_high_frequency_factor": float(rope["high_freq_factor"]),
            "rotary_original_length": int(rope["original_max_position_embeddings"]),
        }
    biases = {"always": True, "never": False}.get(family.biases, bool(getattr(config, "attention_bias", False)))
    try:
        return EncoderConfig(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_key_value_heads or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            rotary_base=float(rope["rope_theta"]),
            norm_epsilon=config.rms_norm_eps,
            init_std=config.initializer_range,
            tie_embeddings=bool(config.tie_word_embeddings),
            max_position_embeddings=config.max_position_embeddings,
            qkv_bias=biases,
            qk_norm=family.qk_norm,
            **scaling,
        )
    except UserError as error:
        raise UserError(f"{folder} cannot be imported: {error}") from None
