"""SentencePiece and Hugging Face tokenizers behind one interface.

`encode` never returns a control id, whatever the text says: a page that quotes "[MASK]" or "</s>" is text. The exported
fast tokenizer does read such text as special tokens, because fill-mask needs it; on all other text the two agree (for
SentencePiece: up to the differences that `sentencepiece_conversion` names).
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_ext.data.sentencepiece_conversion import (
    BYTE,
    NORMAL,
    SPACE_SYMBOL,
    USER_DEFINED,
    check_convertible,
    read_model_proto,
    to_tokenizers,
)
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MASK_PIECES = ("[MASK]", "<mask>", "<|mask|>")
BYTE_LEVEL_WHITESPACE = "ĠĊĉč"  # space, line feed, tab, carriage return in the byte-level alphabet
LARGEST_VOCABULARY = 2**24  # ids above it mean a damaged file: tables are made with a place for every id
RARE_TEXT = "text \U0001f642 \U0010fffd"  # no vocabulary has the last character
WHITESPACE_BYTES = ("<0x20>", "<0x0A>", "<0x09>", "<0x0D>")


class Tokenizer(Protocol):
    """What training, preprocessing and export need to know of a tokenizer.

    `encode` adds no special tokens. `to_fast` adds none by default either, as pretraining does, unless the source is a
    Hugging Face tokenizer that is configured to.
    """

    source: Path
    vocab_size: int  # added tokens included; every id is below it
    mask_id: int | None
    pad_id: int | None
    bos_id: int | None
    eos_id: int | None
    special_ids: frozenset[int]  # control, unknown and unassigned ids: never masked, never sampled
    fingerprint: str  # SHA-256 (hexadecimal) over all that decides the ids

    @property
    def pieces_start_word(self) -> np.ndarray:
        """bool [vocab_size]: True where the piece starts a new word, and for special ids.

        The first piece of a text starts a word too, whatever its mark. Scripts without spaces have no marks.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """[n] int32 for each text, the same ids without a Python object for each; in this thread alone."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        ...

    def piece(self, index: int) -> str:
        """The vocabulary entry of an id, as the tokenizer spells it; empty for an id without one."""
        ...

    def to_fast(self) -> "PreTrainedTokenizerFast":
        """A new `transformers` tokenizer with the same ids, for the exported model."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from local files.

    Args:
        path: a SentencePiece `.model` file, or a folder with a Hugging Face tokenizer.

    Raises:
        UserError: the path is missing, unreadable, or a model that could not be exported later.
    """
    path = Path(path)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()  # a pipe or a device is neither
    except OSError as error:  # a name too long
        raise UserError(f"tokenizer {path}: {error.strerror}") from None
    if is_folder:
        return HuggingFaceTokenizer(path)
    if not is_file:
        raise UserError(f"tokenizer {path}: no such file or folder (allowed: a SentencePiece .model file or a folder)")
    return SentencePieceTokenizer(path)


class SentencePieceTokenizer:
    """A SentencePiece `.model` file (see `Tokenizer`)."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._proto, content = read_model_proto(path)
        check_convertible(self._proto, path)  # now, rather than when a trained model is to be exported
        try:
            self._processor = SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(f"tokenizer {path}: a damaged SentencePiece model ({error})") from None
        self.source = path
        self.vocab_size = self._processor.vocab_size()
        self.pad_id, self.bos_id, self.eos_id = (
            index if index >= 0 else None
            for index in (self._processor.pad_id(), self._processor.bos_id(), self._processor.eos_id())
        )
        self._pieces = [piece.piece for piece in self._proto.pieces]
        self.mask_id = next((self._pieces.index(piece) for piece in MASK_PIECES if piece in self._pieces), None)
        self.special_ids = frozenset(
            index
            for index, piece in enumerate(self._proto.pieces)
            if piece.type not in (NORMAL, USER_DEFINED, BYTE) or index == self.mask_id
        )
        self.fingerprint = hashlib.sha256(content).hexdigest()

    @cached_property
    def pieces_start_word(self) -> np.ndarray:
        """See `Tokenizer`."""
        return _start_flags(self._pieces, (SPACE_SYMBOL, "\n", "\t", "\r"), self.special_ids)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self._processor.encode(text)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [self._processor.encode(text, return_type="numpy") for text in texts]  # its own batches start threads

    def decode(self, ids: list[int]) -> str:
        """See `Tokenizer`."""
        return self._processor.decode([int(index) for index in ids])

    def piece(self, index: int) -> str:
        """See `Tokenizer`."""
        return self._pieces[index]

    def to_fast(self) -> "PreTrainedTokenizerFast":
        """See `Tokenizer`."""
        from transformers import PreTrainedTokenizerFast

        def piece(index: int | None) -> str | None:
            return None if index is None else self._pieces[index]

        return PreTrainedTokenizerFast(
            tokenizer_object=to_tokenizers(self._proto, self.source, piece(self.mask_id)),
            bos_token=piece(self.bos_id),
            eos_token=piece(self.eos_id),
            unk_token=piece(self._processor.unk_id()),
            pad_token=piece(self.pad_id),
            mask_token=piece(self.mask_id),
            clean_up_tokenization_spaces=False,
        )


class HuggingFaceTokenizer:
    """A folder that `transformers.AutoTokenizer` reads as a fast tokenizer (see `Tokenizer`)."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as TokenizersPipeline

        _refuse_custom_code(path)
        self.source = path
        fast = self.to_fast()
        self._pieces = {index: piece for piece, index in fast.get_vocab().items()}
        self.vocab_size = max(self._pieces, default=-1) + 1
        if not 0 < self.vocab_size <= LARGEST_VOCABULARY:
            raise UserError(f"tokenizer {path}: {self.vocab_size} ids (allowed: 1 to {LARGEST_VOCABULARY})")
        try:
            self._pipeline = TokenizersPipeline.from_str(fast.backend_tokenizer.to_str())
            self._pipeline.no_truncation()
            self._pipeline.no_padding()
            self._pipeline.encode_special_tokens = True
            self.encode(RARE_TEXT)
        except Exception as error:  # tokenizers raises plain exceptions, some of them only for characters it does not know
            raise UserError(f"tokenizer {path}: cannot encode text ({_reason(error)})") from error
        self.mask_id, self.pad_id = fast.mask_token_id, fast.pad_token_id
        self.bos_id = fast.bos_token_id if fast.bos_token_id is not None else fast.cls_token_id
        self.eos_id = fast.eos_token_id if fast.eos_token_id is not None else fast.sep_token_id
        added = {index for index, token in fast.added_tokens_decoder.items() if token.special}
        unassigned = set(range(self.vocab_size)) - self._pieces.keys()
        self.special_ids = frozenset(added | set(fast.all_special_ids) | unassigned)

    @cached_property
    def fingerprint(self) -> str:
        """See `Tokenizer`: the canonical pipeline and the special ids; truncation and padding change no id."""
        identity = {
            "pipeline": json.loads(self._pipeline.to_str()),
            "special": sorted(self.special_ids),
            "named": [self.mask_id, self.pad_id, self.bos_id, self.eos_id],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @cached_property
    def pieces_start_word(self) -> np.ndarray:
        """See `Tokenizer`."""
        pieces = [self._pieces.get(index, "") for index in range(self.vocab_size)]
        pipeline = json.loads(self._pipeline.to_str())
        if pipeline["model"]["type"] == "WordPiece":
            prefix = pipeline["model"]["continuing_subword_prefix"]
            return np.array([i in self.special_ids or not p.startswith(prefix) for i, p in enumerate(pieces)], dtype=bool)
        if pipeline["model"]["type"] == "WordLevel":
            return np.ones(self.vocab_size, dtype=bool)
        stages = json.dumps([pipeline["normalizer"], pipeline["pre_tokenizer"], pipeline["decoder"]])
        byte_level = '"ByteLevel"' in stages
        marks = tuple(BYTE_LEVEL_WHITESPACE) if byte_level else (SPACE_SYMBOL, " ", "\n", "\t", "\r")
        return _start_flags(pieces, marks, self.special_ids)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self._pipeline.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """See `Tokenizer`."""
        return self._pipeline.decode([int(index) for index in ids], skip_special_tokens=False)

    def piece(self, index: int) -> str:
        """See `Tokenizer`."""
        return self._pieces.get(index, "")

    def to_fast(self) -> "PreTrainedTokenizerFast":
        """See `Tokenizer`. Raises `UserError` if the folder holds no fast tokenizer."""
        from transformers import AutoTokenizer

        try:
            # Code that comes with a folder is not run, and nobody is asked whether it should be.
            fast = AutoTokenizer.from_pretrained(str(self.source), local_files_only=True, use_fast=True, trust_remote_code=False)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for a folder it cannot read
            raise UserError(f"tokenizer {self.source}: not a Hugging Face tokenizer folder ({_reason(error)})") from error
        if not fast.is_fast:
            raise UserError(f"tokenizer {self.source}: only a slow (Python) tokenizer; a tokenizer.json is needed")
        return fast


def _reason(error: Exception) -> str:
    """The first line of another library's message, short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _start_flags(pieces: list[str], marks: tuple[str, ...], special_ids: frozenset[int]) -> np.ndarray:
    """Bool [len(pieces)]: the piece begins with a whitespace mark, is a whitespace byte, or is special."""
    return np.array([i in special_ids or p.startswith(marks) or p in WHITESPACE_BYTES for i, p in enumerate(pieces)], dtype=bool)


def _refuse_custom_code(folder: Path) -> None:
    """A folder may name Python code of its own; transformers would run it, ask for leave, or load something else instead."""
    for name in ("tokenizer_config.json", "config.json"):
        path = folder / name
        try:
            tree = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"tokenizer {folder}: {name} cannot be read as JSON ({str(error).splitlines()[0]})") from None
        if not isinstance(tree, dict):
            raise UserError(f"tokenizer {folder}: {name} is not a JSON object")
        if tree.get("auto_map"):
            raise UserError(f"tokenizer {folder}: {name} asks for code of its own (auto_map), which is never run")
