"""Train a SentencePiece tokenizer that can serve causal and masked pretraining alike.

It loses nothing (byte fallback, no normalisation, spaces kept), so `decode(encode(text)) == text`; it has a mask token; digits
stand alone. The same inputs and options give the same model: sampling is seeded and training is single-threaded.
"""

import io
import os
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.data.readers import ReaderSettings, Reject, RejectList, check_regular, read_documents, rejects_summary
from megatron_ext.errors import UserError

MODEL_TYPES = ("unigram", "bpe")
PAD, UNK, BOS, EOS, MASK = "[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]"
SMALLEST_VOCABULARY = 512  # 256 bytes, the special tokens, ASCII, and room for pieces
LONGEST_SENTENCE_BYTES = 4192  # SentencePiece skips longer ones


@dataclass(frozen=True)
class TrainedTokenizer:
    """What a tokenizer was trained on."""

    lines: int
    rejected: dict[str, int]
    """Cause -> records that gave no text."""


def train_tokenizer(
    inputs: list[Path],
    output_prefix: Path,
    *,
    vocab_size: int,
    model_type: str = "unigram",
    reader: ReaderSettings | None = None,
    sample_sentences: int = 2_000_000,
    seed: int = 1,
    rejects_path: Path | None = None,
) -> TrainedTokenizer:
    """Write `output_prefix.model` and `output_prefix.vocab`.

    Args:
        inputs: files of the formats in `readers`.
        output_prefix: path of the two files without their endings.
        vocab_size: pieces in all, with bytes and special tokens.
        model_type: `unigram` or `bpe`.
        reader: how texts are read out of the inputs.
        sample_sentences: at most so many lines are trained on, drawn from all inputs with equal chance.
        seed: of that draw.
        rejects_path: where rejected records are listed, if there are any; None takes `output_prefix.rejects.jsonl`.

    Returns:
        The number of lines trained on, and what was rejected.

    Raises:
        UserError: a wrong option or input, no text (the rejects are listed), a vocabulary that the text is too small for, or a
            place that cannot be written to.
    """
    if model_type not in MODEL_TYPES:
        raise UserError(f"model type {model_type!r} (allowed: {', '.join(MODEL_TYPES)})")
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab size {vocab_size} (allowed: {SMALLEST_VOCABULARY} or more)")
    if sample_sentences < 1:
        raise UserError(f"sample of {sample_sentences} sentences (allowed: 1 or more)")
    for path in inputs:
        check_regular(path)
    rejects_path = rejects_path or Path(f"{output_prefix}.rejects.jsonl")
    try:
        output_prefix.parent.mkdir(parents=True, exist_ok=True)
        rejects_path.parent.mkdir(parents=True, exist_ok=True)
        sentences, rejected = _read(inputs, reader or ReaderSettings(), sample_sentences, seed, rejects_path)
        model = _train(sentences, vocab_size, model_type)
        _publish(Path(f"{output_prefix}.vocab"), _vocabulary(model).encode("utf-8"))
        _publish(Path(f"{output_prefix}.model"), model)
    except OSError as error:  # inputs that cannot be read are rejects
        raise UserError(f"output {output_prefix}: cannot be written ({error.strerror or error}: {error.filename})") from error
    return TrainedTokenizer(len(sentences), rejected)


def _read(inputs: list[Path], reader: ReaderSettings, size: int, seed: int, rejects_path: Path) -> tuple[list[str], dict[str, int]]:
    """The sampled lines, and the counts of the rejects, which are listed at `rejects_path` if there are any.

    Raises `UserError` if no line is left.
    """
    aside = rejects_path.with_name(f"{rejects_path.name}.{os.getpid()}.part")
    try:
        with open(aside, "w", encoding="ascii") as stream:
            rejects = RejectList(stream)
            sentences = _sample(_sentences(inputs, reader, rejects), size, seed)
        rejected = dict(sorted(rejects.counts.items()))
        if rejected:
            os.replace(aside, rejects_path)
    finally:
        aside.unlink(missing_ok=True)
    if not sentences:
        names = f"input {inputs[0]}" if len(inputs) == 1 else f"{len(inputs)} inputs"
        raise UserError(f"no text in {names}: {rejects_summary(rejected, rejects_path)}")
    return sentences, rejected


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


def _sentences(inputs: list[Path], reader: ReaderSettings, rejects: RejectList) -> Iterator[str]:
    """The lines of all documents, long ones cut between words."""
    for path in inputs:
        for record in read_documents(path, reader):
            if isinstance(record, Reject):
                rejects.add(path, record)
                continue
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
