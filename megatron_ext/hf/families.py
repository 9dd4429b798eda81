"""The Hugging Face families that checkpoints come from and go to: which shapes each has, and how its configuration says so."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_ext.errors import UserError
from megatron_ext.model.presets import EncoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

    from megatron_ext.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Family:
    """One way to be a Hugging Face model."""

    name: str
    model_type: str
    """What `config.json` calls it."""
    architecture: str
    """Class in transformers."""
    config_class: str
    causal: bool
    """A position sees only itself and what came before."""
    biases: Literal["never", "always", "optional"]
    """On queries, keys and values. Optional ones come with a bias on the attention's output, which ours do not have: zeros."""
    qk_norm: bool = False
    """Queries and keys are normed per head."""
    fixed: tuple[tuple[str, Any], ...] = ()
    """Fields of the configuration that are the same for every model of ours."""
    tokenizer_class: str | None = None
    """With which transformers reads the tokenizer of every such model; None if a folder's own class is believed."""

    def refusal(self, encoder: EncoderConfig) -> str | None:
        """Why a model of this shape cannot be of the family; None if it can."""
        if encoder.qk_norm != self.qk_norm:
            return f"{self.architecture} {'always' if self.qk_norm else 'never'} norms queries and keys"
        if self.biases != "optional" and encoder.qkv_bias != (self.biases == "always"):
            return f"{self.architecture} {self.biases} has biases on queries, keys and values"
        return None

    def check_tokenizer(self, tokenizer: "Tokenizer") -> None:
        """Hold a tokenizer against the class that transformers would read it with.

        Raises:
            UserError: the class cuts texts in another way, so that every text would have other ids.
        """
        if self.tokenizer_class is None:
            return
        import transformers

        forced = getattr(transformers, self.tokenizer_class)()
        if _cutting(forced) != _cutting(tokenizer.to_fast()):
            raise UserError(
                f"tokenizer {tokenizer.source} cannot go with the family {self.name}: transformers reads every {self.model_type} "
                f"tokenizer as a {self.tokenizer_class}, which would give other ids; use another family, such as auto"
            )

    def zero_tensors(self, encoder: EncoderConfig) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors that the class wants and our model does not have; they are all zeros."""
        if not (encoder.qkv_bias and self.biases == "optional"):
            return {}
        return {f"model.layers.{index}.self_attn.o_proj.bias": (encoder.hidden_size,) for index in range(encoder.num_layers)}

    def config(self, encoder: EncoderConfig, vocab_size: int, dtype: str, ids: dict[str, int | None]) -> "PreTrainedConfig":
        """The transformers configuration of a model of this shape.

        Args:
            encoder: the shape.
            vocab_size: rows of the exported embedding.
            dtype: of the exported weights.
            ids: `pad_token_id`, `bos_token_id`, `eos_token_id` and, for a masked model, `mask_token_id`.
        """
        import transformers

        fields: dict[str, Any] = {
            "architectures": [self.architecture],
            "dtype": dtype,
            "vocab_size": vocab_size,
            "hidden_size": encoder.hidden_size,
            "intermediate_size": encoder.ffn_hidden_size,
            "num_hidden_layers": encoder.num_layers,
            "num_attention_heads": encoder.num_attention_heads,
            "num_key_value_heads": encoder.num_query_groups,
            "head_dim": encoder.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": encoder.max_position_embeddings,
            "rope_parameters": rope_parameters(encoder),
            "rms_norm_eps": encoder.norm_epsilon,
            "initializer_range": encoder.init_std,
            "tie_word_embeddings": encoder.tie_embeddings,
            **({"attention_bias": encoder.qkv_bias} if self.biases == "optional" else {}),
            **dict(self.fixed),
            **ids,
        }
        return getattr(transformers, self.config_class)(**fields)


FULL_ATTENTION = (("sliding_window", None), ("use_sliding_window", False))
FAMILIES = {
    family.name: family
    for family in (
        Family("eurobert", "eurobert", "EuroBertForMaskedLM", "EuroBertConfig", False, "optional", fixed=(("mlp_bias", False),)),
        Family("llama", "llama", "LlamaForCausalLM", "LlamaConfig", True, "optional", fixed=(("mlp_bias", False),)),
        Family("mistral", "mistral", "MistralForCausalLM", "MistralConfig", True, "never", fixed=FULL_ATTENTION[:1]),
        Family("qwen2", "qwen2", "Qwen2ForCausalLM", "Qwen2Config", True, "always", False, FULL_ATTENTION, "Qwen2Tokenizer"),
        Family("qwen3", "qwen3", "Qwen3ForCausalLM", "Qwen3Config", True, "optional", True, FULL_ATTENTION),
        # transformers has no bidirectional class with these norms; `is_causal` in the configuration takes the causal mask away.
        Family(
            "qwen3-bidirectional",
            "qwen3",
            "Qwen3ForCausalLM",
            "Qwen3Config",
            False,
            "optional",
            True,
            (*FULL_ATTENTION, ("is_causal", False)),
        ),
    )
}


def _cutting(fast: "PreTrainedTokenizerFast") -> list[Any]:
    """What decides the pieces, besides the vocabulary; the places of pieces in the text do not."""
    pipeline = json.loads(fast.backend_tokenizer.to_str())
    stages = json.loads(
        json.dumps([pipeline["model"]["type"], pipeline["normalizer"], pipeline["pre_tokenizer"]]),
        object_hook=lambda stage: {name: value for name, value in stage.items() if name != "trim_offsets"},
    )
    return [*stages, pipeline["model"].get("byte_fallback", False)]


def choose_family(name: str, encoder: EncoderConfig, causal: bool, origin: str | None) -> Family:
    """The family to export to.

    Args:
        name: `auto`, or a name in `FAMILIES`.
        encoder: the model's shape.
        causal: attention of the checkpoint's last step.
        origin: family that the model was imported from, if it was.

    Raises:
        UserError: unknown family, or one that cannot be this model.
    """
    if name != "auto" and name not in FAMILIES:
        raise UserError(f"the family is '{name}': allowed are auto, {', '.join(FAMILIES)}")
    if name == "auto":
        wanted = [FAMILIES[origin]] if origin in FAMILIES else []
        fitting = [family for family in (*wanted, *FAMILIES.values()) if family.causal == causal and not family.refusal(encoder)]
        return fitting[0]
    family = FAMILIES[name]
    if family.causal and not causal:
        fitting_name = choose_family("auto", encoder, False, None).name
        raise UserError(
            f"the family is {name}, but the checkpoint's last step was bidirectional: a causal model would hide from each "
            f"position what it was trained to see; use {fitting_name}"
        )
    if refusal := family.refusal(encoder):
        raise UserError(f"the family is {name}, but {refusal}, unlike this checkpoint")
    return family


def rope_parameters(encoder: EncoderConfig) -> dict[str, Any]:
    """RoPE as transformers' configurations describe it."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": float(encoder.rotary_base)}
    if encoder.rotary_scaling != "none":
        parameters |= {"rope_type": encoder.rotary_scaling, "factor": encoder.rotary_factor}
    if encoder.rotary_scaling == "llama3":
        parameters |= {
            "low_freq_factor": encoder.rotary_low_frequency_factor,
            "high_freq_factor": encoder.rotary_high_frequency_factor,
            "original_max_position_embeddings": encoder.rotary_original_length,
        }
    return parameters
