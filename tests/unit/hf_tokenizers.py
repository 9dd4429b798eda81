"""Small tokenizers of the kinds that come with models, in the files that a hub download has."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.hf.verify import verification_texts

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 1003
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|eot_id|>",
)


def sample_lines() -> list[str]:
    """Text to train on: the repository's documents and the verification text."""
    return [line for path in sorted((ROOT / "docs").glob("*.md")) for line in path.read_text(encoding="utf-8").splitlines()] + (
        verification_texts() * 4
    )


@cache
def sentencepiece_model(**options: Any) -> bytes:
    """A SentencePiece BPE model of 1,003 pieces, without a mask token unless the options add one."""
    import sentencepiece

    with TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("\n".join(sample_lines()), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=f"{folder}/tokenizer",
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            minloglevel=2,
            **options,
        )
        return Path(folder, "tokenizer.model").read_bytes()


@cache
def byte_level_bpe(words: str, size: int) -> str:
    """`tokenizer.json` of a byte-level BPE of so many pieces, without special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    pipeline = Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    pipeline.decoder = decoders.ByteLevel()
    if words == QWEN_WORDS:
        pipeline.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    pipeline.train_from_iterator(sample_lines(), trainer)
    assert pipeline.get_vocab_size() == size
    return pipeline.to_str()


def _write_byte_level(folder: Path, words: str, special: tuple[str, ...], config: dict[str, Any], processor: Any) -> None:
    from tokenizers import AddedToken, Tokenizer

    pipeline = Tokenizer.from_str(byte_level_bpe(words, VOCAB_SIZE - len(special)))
    pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    pipeline.post_processor = processor
    tree = json.loads(pipeline.to_str())
    vocabulary, merges = tree["model"]["vocab"], tree["model"]["merges"]
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
    added = {str(token["id"]): {"content": token["content"], **flags} for token in tree["added_tokens"]}
    config = {**config, "added_tokens_decoder": added, "clean_up_tokenization_spaces": False, "model_max_length": 512}
    (folder / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if config["tokenizer_class"] == "Qwen2Tokenizer":
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]), encoding="utf-8")


def write_qwen(folder: Path) -> None:
    """As beside Qwen2 and Qwen3: byte-level, one digit a piece, no free id."""
    from tokenizers import processors

    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "errors": "replace",
        "split_special_tokens": False,
    }
    _write_byte_level(folder, QWEN_WORDS, QWEN_SPECIAL, config, processors.ByteLevel(trim_offsets=False))


def write_llama3(folder: Path) -> None:
    """As beside Llama 3: byte-level, up to three digits a piece, ids held in reserve, begins each text with a token."""
    from tokenizers import processors

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    special = [("<|begin_of_text|>", VOCAB_SIZE - len(LLAMA3_SPECIAL))]
    template = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=special)
    processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    _write_byte_level(folder, LLAMA3_WORDS, LLAMA3_SPECIAL, config, processor)
    names = {name: config[name] for name in ("bos_token", "eos_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))


def _write_llama_class(folder: Path, with_json: bool, **options: Any) -> None:
    from transformers import LlamaTokenizer

    content = sentencepiece_model(**options)
    control = ["<unk>", "<s>", "</s>", *options.get("control_symbols", "").split(",")]
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "added_tokens_decoder": {str(index): {"content": piece, **flags} for index, piece in enumerate(control) if piece},
    }
    names = {name: config[name] for name in ("bos_token", "eos_token", "unk_token")}
    (folder / "tokenizer.model").write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    if with_json:
        LlamaTokenizer.from_pretrained(str(folder)).backend_tokenizer.save(str(folder / "tokenizer.json"))


def write_llama2(folder: Path) -> None:
    """As beside Llama 2 in its first form: a SentencePiece model alone."""
    _write_llama_class(folder, with_json=False)


def write_mistral(folder: Path) -> None:
    """As beside Mistral 0.3: a SentencePiece model with ids held in reserve, and what transformers made of it."""
    _write_llama_class(folder, with_json=True, control_symbols="[INST],[/INST],[control_8],[control_9]")


def write_with_mask(folder: Path) -> None:
    """As this project exports its own: made of a SentencePiece model, with a mask token."""
    with TemporaryDirectory() as elsewhere:
        path = Path(elsewhere, "tokenizer.model")
        path.write_bytes(sentencepiece_model(pad_id=3, control_symbols="[MASK]"))
        load_tokenizer(path).to_fast().save_pretrained(folder)


WRITERS: dict[str, Callable[[Path], None]] = {
    "qwen": write_qwen,
    "llama 2": write_llama2,
    "llama 3": write_llama3,
    "mistral": write_mistral,
    "with mask": write_with_mask,
}
