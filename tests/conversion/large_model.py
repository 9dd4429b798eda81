"""Writes a large random Llama as a hub download would lie on disk: row by row, so that writing it takes little memory."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

ROWS = 4096
"""Of a tensor, made at a time."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    layers: int = 16
    hidden: int = 2048
    ffn: int = 8192
    heads: int = 32
    groups: int = 8
    vocabulary: int = 128_256

    def tensors(self) -> list[dict[str, tuple[int, ...]]]:
        """Names and shapes, cut into what belongs into one file: the embedding, the layers in two halves, the head."""
        width = self.hidden // self.heads * self.groups
        layer = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (width, self.hidden),
            "self_attn.v_proj": (width, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }
        files: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (self.vocabulary, self.hidden)}, {}, {}]
        for index in range(self.layers):
            file = files[1 + 2 * index // self.layers]
            file.update({f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()})
        files[2]["model.norm.weight"] = (self.hidden,)
        return [*files, {"lm_head.weight": (self.vocabulary, self.hidden)}]

    def config(self) -> dict[str, object]:
        """What config.json holds."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


def write_large_model(folder: Path, shape: Shape) -> int:
    """Write config.json, bfloat16 weights in four files, their index and a tokenizer of some hundred ids.

    Args:
        folder: an existing, empty directory.
        shape: the model's sizes.

    Returns:
        Bytes of the largest tensor.
    """
    generator = torch.Generator().manual_seed(0)
    files = shape.tensors()
    index = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        index.update(dict.fromkeys(tensors, name))
        _write_file(folder / name, tensors, generator)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    write_tokenizer(folder)
    return max(2 * torch.Size(size).numel() for tensors in files for size in tensors.values())


def _write_file(path: Path, tensors: dict[str, tuple[int, ...]], generator: torch.Generator) -> None:
    header, end = {}, 0
    for name, size in tensors.items():
        start, end = end, end + 2 * torch.Size(size).numel()
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in tensors.values():
            for start in range(0, size[0], ROWS):
                part = torch.empty(min(ROWS, size[0] - start), *size[1:], dtype=torch.bfloat16)
                file.write(part.normal_(std=0.02, generator=generator).view(-1).view(torch.uint8).numpy())


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes, with the usual special tokens and a mask token, into a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<pad>", "[MASK]", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(zip(("bos_token", "eos_token", "pad_token", "mask_token", "unk_token"), specials, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
