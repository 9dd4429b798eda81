"""Train a SentencePiece tokenizer that can serve causal and masked pretraining alike.

It loses nothing (byte fallback, no normalisation, spaces kept), so `decode(encode(text)) == text`; it has a mask token; digits
stand alone. The same inputs and options give the same model: sampling is seeded and training is single-threaded.
"""

import io
import os
import random
import string
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.data.readers import ReaderSettings, Reject, read_documents
from megatron_ext.errors import UserError

MODEL_TYPES = ("unigram", "bpe")
PAD, UNK, BOS, EOS, MASK = "[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]"
SMALLEST_VOCABULARY = 512  # 256 bytes, the special tokens, ASCII, and room for pieces
LONGEST_SENTENCE_BYTES = 4192  # SentencePiece skips longer ones


def train_tokenizer(
    inputs: list[Path],
    output_prefix: Path,
    *,
    vocab_size: int,
    model_type: str = "unigram",
    reader: ReaderSettings | None = None,
    sample_sentences: int = 2_000_000,
    seed: int = 1,
) -> int:
    """Write `output_prefix.model` and `output_prefix.vocab`.

    Args:
        inputs: files of the formats in `readers`.
        output_prefix: path of the two files without their endings.
        vocab_size: pieces in all, with bytes and special tokens.
        model_type: `unigram` or `bpe`.
        reader: how texts are read out of the inputs.
        sample_sentences: at most so many lines are trained on, drawn from all inputs with equal chance.
        seed: of that draw.

    Returns:
        The number of lines trained on.

    Raises:
        UserError: a wrong option, no text, or a vocabulary that the text is too small for.
    """
    if model_type not in MODEL_TYPES:
        raise UserError(f"model type {model_type!r} (allowed: {', '.join(MODEL_TYPES)})")
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab size {vocab_size} (allowed: {SMALLEST_VOCABULARY} or more)")
    sentences = _sample(_sentences(inputs, reader or ReaderSettings()), sample_sentences, seed)
    if not sentences:
        raise UserError(f"no text in the inputs {', '.join(map(str, inputs))}")
    model = _train(sentences, vocab_size, model_type)
    output_prefix.parent.mkdir(parents=True, exist_ok=True)
    _publish(Path(f"{output_prefix}.vocab"), _vocabulary(model).encode("utf-8"))
    _publish(Path(f"{output_prefix}.model"), model)
    return len(sentences)


def _train(sentences: list[str], vocab_size: int, model_type: str) -> bytes:
    """The bytes of the model file. Trained in memory: given a path, the trainer would write that path into the model."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            # Without them a rare bracket would be no piece, and "[MASK]" in a text would be harder to keep apart.
            required_chars=string.ascii_letters + string.digits + string.punctuation,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=PAD,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            control_symbols=[MASK],
            max_sentence_length=LONGEST_SENTENCE_BYTES,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].rpartition("] ")[2]
        raise UserError(f"vocab size {vocab_size} does not fit the text: {reason}") from error
    return model.getvalue()


def _vocabulary(model: bytes) -> str:
    """One line per piece: the piece, a tab, its score."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    return "".join(f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n" for i in range(processor.vocab_size()))


def _publish(path: Path, content: bytes) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    aside.write_bytes(content)
    os.replace(aside, path)


def _sentences(inputs: list[Path], reader: ReaderSettings) -> Iterator[str]:
    """The lines of all documents, long ones cut between words."""
    for path in inputs:
        for record in read_documents(path, reader):
            if not isinstance(record, Reject):
                for line in record[1].splitlines():
                    yield from _cut(line.replace("\0", " "))  # SentencePiece's trainer takes no NUL


def _cut(line: str) -> Iterator[str]:
    """Parts of a line that are short enough for the trainer, spaces kept."""
    longest = LONGEST_SENTENCE_BYTES // 4  # characters of four bytes at most
    while len(line) > longest:
        end = line.rfind(" ", 1, longest)
        end = end if end > 0 else longest
        yield line[:end]
        line = line[end:]
    if line.strip():
        yield line


def _sample(sentences: Iterator[str], size: int, seed: int) -> list[str]:
    """A seeded uniform sample of at most `size`, in bounded memory (reservoir sampling, algorithm R of Vitter 1985)."""
    generator = random.Random(seed)
    kept: list[str] = []
    for index, sentence in enumerate(sentences):
        if index < size:
            kept.append(sentence)
        elif (slot := generator.randrange(index + 1)) < size:
            kept[slot] = sentence
    return kept
