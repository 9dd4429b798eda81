"""A tiny EuroBERT with random weights and a tokenizer of whole words, and rows to fine-tune it on."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import EuroBertConfig, EuroBertForMaskedLM, PreTrainedTokenizerFast

WORDS = [
    "<pad>",
    "<eos>",
    "<unk>",
    *[
        "the",
        "a",
        "film",
        "was",
        "good",
        "bad",
        "dull",
        "bright",
        "ann",
        "bob",
        "paris",
        "rome",
        "lives",
        "in",
        "works",
        "who",
        "where",
        "is",
        "it",
        "and",
        "not",
        "very",
    ],
]


def make_encoder_folder(folder: Path) -> Path:
    """Write it as a Hugging Face folder."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = EuroBertConfig(vocab_size=len(WORDS), **sizes, max_position_embeddings=64, pad_token_id=0, initializer_range=0.2)
    EuroBertForMaskedLM(config).save_pretrained(folder)
    return folder
