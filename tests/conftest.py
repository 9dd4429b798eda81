"""A small real-looking corpus, tokenizer and data set, made once for all tests."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

# Read when torch is loaded, here and in what the tests start. By default threads that wait for each other keep their cores busy,
# which other tests need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@dataclass(frozen=True)
class Corpus:
    """Paths of the shared test data."""

    text: Path
    tokenizer: Path
    prefix: Path


def write_text(path: Path, documents: int, seed: int, vocabulary: int = 300) -> None:
    """JSONL of made-up sentences: words with Zipf frequencies, documents of 5 to 120 words."""
    import json

    generator = np.random.default_rng(seed)
    syllables = ["ba", "do", "ki", "lu", "me", "na", "po", "ri", "su", "te", "vo", "ze"]
    words = ["".join(generator.choice(syllables, size=generator.integers(1, 5))) for _ in range(vocabulary)]
    weights = 1 / np.arange(1, vocabulary + 1)
    with open(path, "w") as file:
        for _ in range(documents):
            chosen = generator.choice(words, size=generator.integers(5, 120), p=weights / weights.sum())
            file.write(json.dumps({"text": " ".join(chosen)}) + "\n")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """400 documents, tokenized with a SentencePiece model of 540 pieces."""
    from megatron_ext.data.corpus import preprocess
    from megatron_ext.data.readers import ReaderSettings
    from megatron_ext.data.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text.jsonl"
    write_text(text, documents=400, seed=1)
    train_tokenizer(
        [text], folder / "tokenizer", vocab_size=540, model_type="unigram", reader=ReaderSettings(), sample_sentences=1000, seed=1
    )
    tokenizer = folder / "tokenizer.model"
    preprocess([text], folder / "data", tokenizer, workers=1, progress=False)
    return Corpus(text, tokenizer, folder / "data")


@pytest.fixture(scope="session")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny EuroBERT, to be fine-tuned."""
    from tests.small_encoder import make_encoder_folder

    return make_encoder_folder(tmp_path_factory.mktemp("encoder"))
