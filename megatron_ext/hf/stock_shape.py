"""Reads the arguments that Megatron-LM stored as one of our shapes, or says by name why the model cannot be one."""

from pathlib import Path
from typing import Any

from megatron_ext.config import ModelConfig
from megatron_ext.errors import UserError
from megatron_ext.hf.stored_arguments import NotPlain
from megatron_ext.model.presets import EncoderConfig, build_encoder_config

OPTION = "--model-config"
LARGEST_NUMBER = 1e30

WANTED = {
    "normalization": ("RMSNorm", "only RMS norms are known"),
    "swiglu": (True, "only SwiGLU feed-forward blocks are known"),
    "position_embedding_type": ("rope", "only rotary positions are known"),
}
"""Arguments that decide what the tensors mean and that no tensor shows: name -> value, what is allowed."""

REFUSED: dict[str, tuple[Any, str]] = {
    "add_bias_linear": (False, "its projections have biases; only those of queries, keys and values may (add_qkv_bias)"),
    "apply_layernorm_1p": (False, "its norms add one to their weights"),
    "layernorm_zero_centered_gamma": (False, "its norms add one to their weights"),
    "apply_residual_connection_post_layernorm": (False, "its residuals start after the norm"),
    "qk_l2_norm": (False, "it norms queries and keys without weights"),
    "num_experts": (None, "it is a mixture of experts"),
    "num_moe_experts": (None, "it is a mixture of experts"),
    "multi_latent_attention": (False, "its attention is latent"),
    "experimental_attention_variant": (None, "its attention is another one"),
    "linear_attention_freq": (None, "some of its layers have linear attention"),
    "linear_attention_type": (None, "some of its layers have linear attention"),
    "attention_output_gate": (False, "it gates what its attention gives"),
    "softmax_type": ("vanilla", "its attention has sinks"),
    "softmax_scale": (None, "it scales attention by a number of its own"),
    "window_size": (None, "its attention slides a window"),
    "rotary_percent": (1.0, "it rotates a part of each head only"),
    "rotary_interleaved": (False, "it rotates neighbouring features instead of halves"),
    "no_rope_freq": (None, "some of its layers have no RoPE"),
    "mrope_section": (None, "its positions have several axes"),
    "squared_relu": (False, "its feed-forward blocks have another activation"),
    "openai_gelu": (False, "its feed-forward blocks have another activation"),
    "quick_geglu": (False, "its feed-forward blocks have another activation"),
    "glu_linear_offset": (0.0, "its feed-forward blocks have another gate"),
    "activation_func_clamp_value": (None, "its feed-forward blocks clamp"),
    "heterogeneous_layers_config_path": (None, "its layers differ in shape"),
    "hybrid_override_pattern": (None, "some of its layers are no attention"),
    "hybrid_layer_pattern": (None, "some of its layers are no attention"),
    "mtp_num_layers": (None, "it has layers that predict later tokens"),
    "retro_add_retriever": (False, "it retrieves"),
    "use_mup": (False, "it scales its activations by width"),
    "spec": (None, "its layers are built by a specification of its own"),
}
"""Arguments that older versions lack, and then mean this value: name -> value, why another one is refused."""

LLAMA3 = {
    "rotary_scaling": "llama3",
    "rotary_factor": 8.0,
    "rotary_low_frequency_factor": 1.0,
    "rotary_high_frequency_factor": 4.0,
    "rotary_original_length": 8192,
}
"""What megatron-core does when it is told no more than to stretch."""

NEEDED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("rotary_base", "norm_epsilon", "tie_embeddings", "max_position_embeddings"),
)
"""What a model section must say if it names no preset and nothing else says it."""


def stock_encoder(checkpoint: Path, arguments: dict[str, Any] | None, given: dict[str, Any] | None) -> EncoderConfig:
    """The shape of a stock checkpoint.

    Args:
        checkpoint: for error messages.
        arguments: what Megatron-LM stored, if it did.
        given: the fields that the user's `model` section sets, if there is one; what both say must be the same.

    Raises:
        UserError: the model is none that can be represented, its shape is not known, or the two contradict each other.
    """
    if arguments is None and given is None:
        raise UserError(
            f"checkpoint {checkpoint} holds no arguments of its training: give its shape with {OPTION} FILE.yaml (a section "
            "`model` as in a training's configuration)"
        )
    stated = _expand(given or {})
    stored = {} if arguments is None else _fields(checkpoint, arguments, stated)
    for name in sorted(stored.keys() & stated.keys()):
        if stored[name] != stated[name]:
            raise UserError(
                f"{OPTION} says model.{name} {stated[name]}, but the arguments in checkpoint {checkpoint} say {stored[name]}"
            )
    fields = stored | stated
    if missing := [name for name in NEEDED if name not in fields]:
        raise UserError(f"{OPTION} lacks {', '.join(f'model.{name}' for name in missing)}, which nothing else tells")
    return build_encoder_config(ModelConfig(**fields))


def _expand(given: dict[str, Any]) -> dict[str, Any]:
    """What a model section states: with a preset, all of it."""
    fields = {name: value for name, value in given.items() if value is not None}
    return vars(build_encoder_config(ModelConfig(**fields))) if "preset" in fields else fields


def _fields(checkpoint: Path, arguments: dict[str, Any], stated: dict[str, Any]) -> dict[str, Any]:
    """Fields of the model's configuration that the arguments fix."""
    reader = _Arguments(checkpoint, arguments)
    reader.check()
    heads, hidden = reader.size("num_attention_heads"), reader.size("hidden_size")
    return {
        "num_layers": reader.size("num_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": reader.size("ffn_hidden_size"),
        "num_attention_heads": heads,
        "num_query_groups": reader.size("num_query_groups") if reader.flag("group_query_attention") else heads,
        "head_dim": hidden // heads if arguments.get("kv_channels") is None else reader.size("kv_channels"),
        "rotary_base": reader.number("rotary_base"),
        "norm_epsilon": reader.number("norm_epsilon" if "norm_epsilon" in arguments else "layernorm_epsilon"),
        "tie_embeddings": not reader.flag("untie_embeddings_and_output_weights"),
        "max_position_embeddings": reader.size("max_position_embeddings"),
        "qkv_bias": reader.flag("add_qkv_bias"),
        "qk_norm": reader.flag("qk_layernorm"),
        **({"init_std": reader.number("init_method_std")} if "init_method_std" in arguments else {}),
        **reader.scaling(stated),
    }


class _Arguments:
    """Stored arguments, read one at a time and strictly."""

    def __init__(self, checkpoint: Path, values: dict[str, Any]):
        self._checkpoint = checkpoint
        self._values = values

    def check(self) -> None:
        """Refuse what our model is not."""
        for name, (wanted, allowed) in WANTED.items():
            if name not in self._values:
                raise UserError(f"checkpoint {self._checkpoint}: its arguments lack {name}; {allowed}")
            if self._values[name] != wanted:
                self._refuse(name, allowed)
        for name, (wanted, reason) in REFUSED.items():
            if self._values.get(name, wanted) not in (wanted, None):
                self._refuse(name, reason)

    def size(self, name: str) -> int:
        """A whole number above 0."""
        value = self._values.get(name)
        if type(value) is not int or not 0 < value < 2**24:
            self._refuse(name, "a whole number from 1 to 2^24 is needed")
        return value

    def number(self, name: str) -> float:
        """A number above 0."""
        value = self._values.get(name)
        if type(value) not in (int, float) or not 0 < value < LARGEST_NUMBER:
            self._refuse(name, "a number above 0 is needed")
        return float(value)

    def flag(self, name: str) -> bool:
        """A flag; Megatron-LM's are all off unless given."""
        value = self._values.get(name, False)
        if type(value) is not bool:
            self._refuse(name, "true or false is needed")
        return value

    def scaling(self, stated: dict[str, Any]) -> dict[str, Any]:
        """How RoPE is stretched; nothing where that depends on the script that trained, and the user says it."""
        stretches = self.flag("use_rope_scaling")
        interpolates = self._values.get("rotary_seq_len_interpolation_factor") is not None
        if not stretches and not interpolates:
            return {"rotary_scaling": "none"}
        if not interpolates and self._values.get("rope_scaling_factor", 8.0) == 8.0:
            return LLAMA3
        if "rotary_scaling" not in stated:
            name = "rotary_seq_len_interpolation_factor" if interpolates else "rope_scaling_factor"
            reason = f"not every training script passes it to the model: say with {OPTION} what yours did (model.rotary_scaling)"
            self._refuse(name, reason)
        return {}

    def _refuse(self, name: str, reason: str) -> None:
        value = self._values.get(name)
        if isinstance(value, NotPlain):
            shown = f"a {value.kind}"
        else:
            shown = "a number beyond all use" if type(value) is int and abs(value) > LARGEST_NUMBER else f"{value!r:.60}"
        raise UserError(f"checkpoint {self._checkpoint} cannot be imported: {name} is {shown}; {reason}")
