"""Model shapes: the study's sizes and small ones, as functions that return the encoder's configuration."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megatron_ext.checkpoint_files import read_run_file
from megatron_ext.config import ModelConfig, RotaryScaling
from megatron_ext.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of an encoder: RMSNorm, SwiGLU, RoPE; the causal and the bidirectional model share it."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    rotary_base: float = 10_000.0
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    tie_embeddings: bool = False
    max_position_embeddings: int = 2048
    qkv_bias: bool = False
    """The projections to queries, keys and values have biases, as in Qwen2."""
    qk_norm: bool = False
    """Queries and keys are normed per head before they are rotated, as in Qwen3."""
    rotary_scaling: RotaryScaling = "none"
    """How the angles are stretched to longer texts; see `rotary.rotary_frequencies`."""
    rotary_factor: float = 1.0
    rotary_low_frequency_factor: float = 1.0
    rotary_high_frequency_factor: float = 4.0
    rotary_original_length: int = 8192

    def __post_init__(self) -> None:
        _check_rotary_scaling(self)
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"model.num_query_groups {self.num_query_groups} does not divide "
                f"model.num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} does not divide by model.num_attention_heads "
                f"{self.num_attention_heads}: no Hugging Face class takes such a shape, whatever model.head_dim is"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}: rotary embeddings need an even width")


def _check_rotary_scaling(encoder: EncoderConfig) -> None:
    if encoder.rotary_scaling not in get_args(RotaryScaling):
        raise UserError(f"model.rotary_scaling is '{encoder.rotary_scaling}': allowed are {', '.join(get_args(RotaryScaling))}")
    if encoder.rotary_factor < 1 or (encoder.rotary_scaling == "none" and encoder.rotary_factor != 1):
        raise UserError(
            f"model.rotary_factor is {encoder.rotary_factor} with model.rotary_scaling {encoder.rotary_scaling}: it must be at "
            "least 1, and 1 without scaling"
        )
    low, high = encoder.rotary_low_frequency_factor, encoder.rotary_high_frequency_factor
    if not 0 < low < high:
        raise UserError(
            f"model.rotary_low_frequency_factor {low} and model.rotary_high_frequency_factor {high}: both must be positive, and "
            "the second one larger"
        )


def _shape(layers: int, hidden: int, ffn: int, heads: int, groups: int, **other: float | bool) -> EncoderConfig:
    return EncoderConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads,
        **other,
    )


def nano() -> EncoderConfig:
    """For tests: a second of training on one core."""
    return _shape(4, 64, 160, 4, 2, max_position_embeddings=128)


def tiny() -> EncoderConfig:
    """For the demo: minutes on a laptop."""
    return _shape(4, 256, 704, 4, 4, max_position_embeddings=512)


def preset_210m() -> EncoderConfig:
    """The study's 210M (arXiv 2507.00994)."""
    return _shape(12, 768, 3072, 12, 12)


def preset_610m() -> EncoderConfig:
    """The study's 610M."""
    return _shape(26, 1152, 4096, 18, 6)


def preset_1b() -> EncoderConfig:
    """The study's 1B."""
    return _shape(28, 1728, 5120, 18, 6)


def preset_2b() -> EncoderConfig:
    """EuroBERT's 2.1B (arXiv 2503.05500)."""
    return _shape(32, 2304, 6144, 18, 6)


STORED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim"),
    *("tie_embeddings", "qkv_bias", "qk_norm"),
)
"""Fields that the weights in a checkpoint decide."""

LOGITS_PER_CHUNK = {"cpu": 2**25, "gpu": 2**28}
"""Logits that the head has alive at a time on one rank: 128 MiB of float32, or on a GPU 512 MiB of bfloat16. Each chunk adds to the
gradient of the whole head once more, which costs a GPU more than it costs a CPU."""

DEFAULT_PRESET = "tiny"
PRESETS: dict[str, Callable[[], EncoderConfig]] = {
    "nano": nano,
    "tiny": tiny,
    "210m": preset_210m,
    "610m": preset_610m,
    "1b": preset_1b,
    "2b": preset_2b,
}


def build_encoder_config(model: ModelConfig) -> EncoderConfig:
    """The preset's or the checkpoint's shape with the configured fields put in its place.

    A changed width or head count changes `head_dim` with it, unless `head_dim` is given too.

    Raises:
        UserError: unknown preset, sizes that do not fit together, or that the checkpoint does not have.
    """
    origins = ("preset", "checkpoint")
    given = {name: value for name, value in dataclasses.asdict(model).items() if name not in origins and value is not None}
    if model.checkpoint is not None:
        return _change_checkpoint(model.checkpoint, given)
    name = model.preset or DEFAULT_PRESET
    if name not in PRESETS:
        raise UserError(f"model.preset is '{name}': allowed are {', '.join(PRESETS)}")
    preset = PRESETS[name]()
    if "head_dim" not in given and given.keys() & {"hidden_size", "num_attention_heads"}:
        hidden = given.get("hidden_size", preset.hidden_size)
        heads = given.get("num_attention_heads", preset.num_attention_heads)
        given["head_dim"] = hidden // heads
    return dataclasses.replace(preset, **given)


def _change_checkpoint(checkpoint: str, given: dict[str, Any]) -> EncoderConfig:
    encoder = EncoderConfig(**read_run_file(Path(checkpoint))["encoder"])
    for name in STORED:
        if given.get(name, getattr(encoder, name)) != getattr(encoder, name):
            raise UserError(f"model.{name} is {given[name]}, but the weights in model.checkpoint have {getattr(encoder, name)}")
    return dataclasses.replace(encoder, **given)


def padded_vocab_size(vocab_size: int, tensor_parallel: int, multiple: int = 128) -> int:
    """Vocabulary rounded up so that each tensor-parallel rank holds a multiple of 128 rows (of 16 for FP8 and tensor cores)."""
    step = multiple * tensor_parallel
    return (vocab_size + step - 1) // step * step
