"""Properties of tokenizers for any text: nothing is lost, no special id is made from text, and both readings agree."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.data.tokenizer_training import train_tokenizer
from megatron_ext.errors import UserError
from tests.conftest import Corpus
from tests.unit.properties import TEXTS, examples
from tests.unit.test_tokenizer import equal_score

MARKS = [
    "[MASK]",
    "[EOS]",
    "[PAD]",
    "[UNK]",
    "</s>",
    "<unk>",
    "<0x41>",
    "<0x0A>",
    "▁",
    " ",
    "  ",
    "\n",
    "\t",
    "é",
    "e\u0301",
    "🙂",
    "ba",
    "doki",
]
TEXT = st.lists(TEXTS | st.sampled_from(MARKS), max_size=6).map("".join)
SPECIAL = re.compile(r"\[(MASK|EOS|PAD|UNK|BOS)\]")


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def model(request: pytest.FixtureRequest, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("model") / request.param
    train_tokenizer([corpus.text], prefix, vocab_size=530, model_type=request.param)
    return Path(f"{prefix}.model")


@pytest.fixture(scope="module")
def tokenizers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """The SentencePiece model, and the folder it is exported to, both through the wrapper."""
    folder = tmp_path_factory.mktemp("folder")
    tokenizer = load_tokenizer(model)
    tokenizer.to_fast().save_pretrained(folder)
    return tokenizer, load_tokenizer(folder)


@examples(150)
@given(text=TEXT)
def test_text_survives_and_makes_no_special_ids(tokenizers: tuple[Tokenizer, Tokenizer], text: str) -> None:
    """The one thing that SentencePiece does not keep: its space symbol comes back as a space."""
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        assert not tokenizer.special_ids & set(ids)
        assert tokenizer.decode(ids) == text.replace("▁", " ")


@examples(150)
@given(text=TEXT)
def test_the_converted_tokenizer_gives_the_same_ids(model: Path, tokenizers: tuple[Tokenizer, Tokenizer], text: str) -> None:
    """Apart from unigram segmentations of equal score (above all of runs of spaces), which either may cut as it likes."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected = processor.encode(text)
    own, folder = (tokenizer.encode(text) for tokenizer in tokenizers)
    assert own == expected
    assert folder == expected or (model.stem == "unigram" and equal_score(processor, expected, folder))


def test_every_process_gives_the_same_ids(model: Path, tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
    generator = random.Random(5)
    texts = ["".join(chr(generator.choice([32, 97, 111, 233, 0x4E00, 0x1F642, 0x301])) for _ in range(40)) for _ in range(50)]
    program = (
        "import json, sys; from megatron_ext.data.tokenizer import load_tokenizer; t = load_tokenizer(sys.argv[1]);"
        "print(json.dumps([t.fingerprint, [t.encode(text) for text in json.load(sys.stdin)]]))"
    )
    command = [sys.executable, "-c", program, str(model)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, timeout=60, check=True)
    tokenizer = tokenizers[0]
    assert json.loads(done.stdout) == [tokenizer.fingerprint, [tokenizer.encode(text) for text in texts]]


@examples(200)
@given(data=st.data())
def test_a_damaged_model_loads_or_is_named(model: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(model.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(1, 4))):
        if content:  # the options of the model are in its last bytes: damage them as often as the pieces
            last = len(content) - 1
            place = data.draw(st.integers(0, last) | st.integers(max(0, last - 300), last))
            content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.model"
    path.write_bytes(content)
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        assert str(error).startswith(f"tokenizer {path}: ") and str(error).isprintable()
        return
    ids = tokenizer.encode("ba doki [MASK] é")
    assert all(0 <= index < tokenizer.vocab_size for index in ids)
    assert len(tokenizer.pieces_start_word) == tokenizer.vocab_size
