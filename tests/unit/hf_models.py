"""Small random models of every family that is converted, built by transformers itself, as a hub download would lie on disk."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.unit.hf_tokenizers import WRITERS

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ODD = {
    "vocab_size": 1003,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "max_position_embeddings": 512,
}
"""A head width that is not hidden_size / heads, three heads a group, a vocabulary that nothing divides."""


@dataclass(frozen=True)
class Recipe:
    """A model to build."""

    config_class: str
    model_class: str
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    tokenizer: str = "with mask"
    """A name in `hf_tokenizers.WRITERS`."""


RECIPES = {
    "llama 2": Recipe("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 6, "head_dim": 16}, tokenizer="llama 2"),
    "llama 3.x": Recipe("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA3}, tokenizer="llama 3"),
    "llama linear": Recipe(
        "LlamaConfig", "LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
    ),
    "smollm tied": Recipe("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}, torch.bfloat16),
    "mistral": Recipe("MistralConfig", "MistralForCausalLM", {"sliding_window": None}, tokenizer="mistral"),
    "qwen2": Recipe("Qwen2Config", "Qwen2ForCausalLM", {"head_dim": 16}, tokenizer="qwen"),
    "qwen2 tied": Recipe("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}, torch.bfloat16, "qwen"),
    "qwen3": Recipe("Qwen3Config", "Qwen3ForCausalLM", tokenizer="qwen"),
    "qwen3 tied": Recipe("Qwen3Config", "Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3 bidirectional": Recipe("Qwen3Config", "Qwen3ForCausalLM", {"is_causal": False}),
    "eurobert": Recipe("EuroBertConfig", "EuroBertForMaskedLM", {"mask_token_id": 4, "pad_token_id": 3}),
}


def write_model(folder: Path, recipe: Recipe, max_shard_size: str = "5GB", tokenizer: Any = None) -> torch.nn.Module:
    """Build a random model, save it with its family's tokenizer or a given one, and return it."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, recipe.config_class)(**{**ODD, **recipe.changes})
    model = getattr(transformers, recipe.model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: ones and zeros would hide what is mixed up
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(recipe.dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is None:
        WRITERS[recipe.tokenizer](folder)
    else:
        tokenizer.save_pretrained(folder)
    return model


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor over all the safetensors files of a folder."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
