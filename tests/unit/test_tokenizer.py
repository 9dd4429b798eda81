"""Tokenizers: the exported fast tokenizer against SentencePiece itself, and what both promise to the objective."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as TokenizersPipeline
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.data.tokenizer_training import train_tokenizer
from megatron_ext.errors import UserError

SYLLABLES = ["ka", "to", "ri", "men", "sol", "ve", "an", "ging", "ed", "un", "der", "st"]
ODD_TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    " leading",
    "  two  and   three ",
    "tab\tand\r\nlines\n\n\n  indented",
    "▁ literal ▁▁ mark▁",
    "nul \x00 byte",
    "<0x41> is no byte <0x0A>",
    "\u3000wide\u3000space\u00a0hard",
    "日本語のテキスト。한국어 नमस्ते مرحبا",
    "🙂👩‍👩‍👧‍👦 🇩🇪 ❤️",
    "naïve café Ａｂｃ ﬁ ½",
    "1234567890 3.14",
    "\ufeffmark",
]


def random_texts(count: int) -> list[str]:
    generator = random.Random(7)
    return [
        " ".join("".join(generator.choices(SYLLABLES, k=generator.randint(1, 4))) for _ in range(generator.randint(3, 25)))
        for _ in range(count)
    ]


def all_texts() -> list[str]:
    generator = random.Random(8)
    alphabet = "kaetri<>0x4é日🙂\t\n -=▁.,  "
    mixed = ["".join(generator.choice(alphabet) for _ in range(generator.randint(1, 40))) for _ in range(300)]
    return ODD_TEXTS + mixed + random_texts(100)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in random_texts(1500)))
    return path


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def model(request, corpus) -> Path:
    prefix = corpus.parent / request.param
    train_tokenizer([corpus], prefix, vocab_size=600, model_type=request.param)
    return Path(f"{prefix}.model")


@pytest.fixture(scope="module", params=[("unigram", True), ("unigram", False), ("bpe", True), ("bpe", False)])
def foreign_model(request, corpus) -> Path:
    """Models as other projects train them: NFKC, with and without removal of extra spaces; no byte fallback, no mask."""
    model_type, remove_spaces = request.param
    prefix = corpus.parent / f"foreign_{model_type}_{remove_spaces}"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(random_texts(800)),
        model_prefix=str(prefix),
        vocab_size=200,
        model_type=model_type,
        remove_extra_whitespaces=remove_spaces,
        minloglevel=2,
    )
    return Path(f"{prefix}.model")


def equal_score(processor, first: list[int], second: list[int]) -> bool:
    """Unigram may break exact ties differently: the one difference that is allowed."""
    total = [sum(processor.get_score(index) for index in ids if not processor.is_byte(index)) for ids in (first, second)]
    return processor.decode(first) == processor.decode(second) and abs(total[0] - total[1]) < 1e-3


def assert_same_ids(model: Path, texts: list[str]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    fast = load_tokenizer(model).to_fast()
    for text in texts:
        expected, found = processor.encode(text), fast(text, add_special_tokens=False).input_ids
        tie = "unigram" in model.name and equal_score(processor, expected, found)
        assert found == expected or tie, f"{text!r}: {fast.convert_ids_to_tokens(found)}"


def test_fast_tokenizer_gives_sentencepiece_ids(model):
    assert_same_ids(model, all_texts())


def test_fast_tokenizer_gives_sentencepiece_ids_of_foreign_models(foreign_model):
    assert_same_ids(foreign_model, [text for text in all_texts() if "\r\n" not in text])


def test_text_survives(model):
    tokenizer, fast = load_tokenizer(model), load_tokenizer(model).to_fast()
    for text in all_texts():
        if "▁" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert fast.decode(tokenizer.encode(text)) == text


def test_special_ids_and_mask_in_text(model):
    tokenizer = load_tokenizer(model)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id] == [0, 2, 3, 4]
    assert tokenizer.special_ids == {i for i in range(600) if processor.is_control(i) or processor.is_unknown(i)}
    assert not tokenizer.special_ids & set(tokenizer.encode("[MASK] [EOS] [PAD]"))
    fast = tokenizer.to_fast()
    ids = fast("kato [MASK] men").input_ids
    assert ids == [*tokenizer.encode("kato"), tokenizer.mask_id, *tokenizer.encode("men")]


def test_export_reloads_as_it_was(model, tmp_path):
    tokenizer = load_tokenizer(model)
    tokenizer.to_fast().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "eurobert"}')
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert all(reloaded(text).input_ids == tokenizer.to_fast()(text).input_ids for text in all_texts())
    folder = load_tokenizer(tmp_path)
    assert (folder.vocab_size, folder.mask_id, folder.eos_id) == (600, tokenizer.mask_id, tokenizer.eos_id)
    assert folder.special_ids == tokenizer.special_ids
    assert (folder.pieces_start_word == tokenizer.pieces_start_word).all()
    assert not folder.special_ids & set(folder.encode("[MASK] [EOS]"))


def test_word_starts_count_the_words(model):
    tokenizer = load_tokenizer(model)
    for text in random_texts(20):
        assert tokenizer.pieces_start_word[tokenizer.encode(text)].sum() == len(text.split())


def test_word_starts_of_wordpiece_and_byte_level(tmp_path):
    vocabulary = {"[UNK]": 0, "[MASK]": 1, "play": 2, "##ing": 3}
    wordpiece = TokenizersPipeline(models.WordPiece(vocabulary, unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.Whitespace()
    byte_level = TokenizersPipeline(models.BPE({"a": 0, "Ġ": 1, "Ġa": 2, "<mask>": 3}, [("Ġ", "a")]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, pipeline, mask in (("wordpiece", wordpiece, "[MASK]"), ("bytes", byte_level, "<mask>")):
        pipeline.add_special_tokens([AddedToken(mask, special=True)])
        PreTrainedTokenizerFast(tokenizer_object=pipeline, mask_token=mask).save_pretrained(tmp_path / name)
    assert load_tokenizer(tmp_path / "wordpiece").pieces_start_word.tolist() == [True, True, True, False]
    assert load_tokenizer(tmp_path / "bytes").pieces_start_word.tolist() == [False, True, True, True]
    assert load_tokenizer(tmp_path / "bytes").mask_id == 3
    assert load_tokenizer(tmp_path / "bytes").eos_id is None


def test_training_is_reproducible_and_fingerprint_tells_models_apart(corpus, model, tmp_path):
    train_tokenizer([corpus], tmp_path / "again", vocab_size=600, model_type=model.stem)
    train_tokenizer([corpus], tmp_path / "other", vocab_size=590, model_type=model.stem)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()
    assert load_tokenizer(tmp_path / "again.model").fingerprint == load_tokenizer(model).fingerprint
    assert load_tokenizer(tmp_path / "other.model").fingerprint != load_tokenizer(model).fingerprint


def test_mistakes_are_named(corpus, tmp_path):
    garbage = tmp_path / "garbage.model"
    garbage.write_bytes(b"\xff\xff no model")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing.model", garbage, tmp_path / "empty"):
        with pytest.raises(UserError, match=str(path)):
            load_tokenizer(path)
    with pytest.raises(UserError, match="does not fit"):
        train_tokenizer([corpus], tmp_path / "large", vocab_size=500_000)
    assert not list(tmp_path.glob("large*"))


def test_inconvertible_model_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(random_texts(300)),
        model_prefix=str(tmp_path / "suffix"),
        vocab_size=100,
        treat_whitespace_as_suffix=True,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="suffix"):
        load_tokenizer(tmp_path / "suffix.model")
