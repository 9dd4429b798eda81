"""A SentencePiece model rebuilt as a `tokenizers` pipeline that gives the same ids.

Why not leave this to `transformers`: its converter adds the leading space through `Metaspace`, which skips it where a text
already begins with a space, and strips every Unicode whitespace where SentencePiece strips U+0020 only.

Equal ids, for unigram and BPE, with or without byte fallback, for any text, apart from three known differences:

- Special-token text. SentencePiece never makes a control symbol from text; here "[MASK]" in a text is the mask token,
  which fill-mask needs. The mask token takes the spaces before it along, so "the [MASK] sat" keeps "▁sat" whole.
- Models with a normalisation table (nmt_nfkc and its like). `tokenizers` looks the table up per grapheme cluster,
  SentencePiece by longest match: letters followed by combining marks (decomposed Vietnamese most of all), Hangul in
  single jamo and, unless extra spaces are removed, "\r\n" can differ; text in composed form does not.
  Models without a table, which `tools/train_tokenizer.py` trains, have no such case.
- Unigram scores are summed in float32 by SentencePiece and in float64 here: segmentations of equal score ("b|bb" and
  "bb|b") can be decided differently, and in texts of many thousand tokens also those of nearly equal score.

Refused, because `tokenizers` cannot do the same: word and character models, whitespace as a suffix, unescaped whitespace,
unused pieces, pieces with characters that are not pieces themselves, BPE pieces of equal score, and user-defined
symbols together with a leading space or whitespace removal.
"""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import Tokenizer as TokenizersPipeline

LARGEST_MODEL_BYTES = 256 * 2**20
SPACE_SYMBOL = "▁"
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type


def read_model_proto(path: Path) -> tuple["ModelProto", bytes]:
    """Read a SentencePiece `.model` file: parsed, and as it is. Raises `UserError` if it is not one, or was cut short."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto()
    try:
        if path.stat().st_size > LARGEST_MODEL_BYTES:
            raise UserError(f"tokenizer {path}: larger than any SentencePiece model file ({LARGEST_MODEL_BYTES:,} bytes)")
        content = path.read_bytes()
        proto.ParseFromString(content)
        sound = all(isinstance(piece.piece, str) and math.isfinite(piece.score) for piece in proto.pieces)
    except (DecodeError, UnicodeDecodeError):
        raise UserError(f"tokenizer {path}: not a SentencePiece model file") from None
    except OSError as error:
        raise UserError(f"tokenizer {path}: cannot be read ({error.strerror})") from None
    if not proto.pieces:
        raise UserError(f"tokenizer {path}: a SentencePiece model without pieces")
    if not sound:
        raise UserError(f"tokenizer {path}: a damaged SentencePiece model (a piece is no text, or its score no number)")
    if not (proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")):  # they are written after the pieces
        raise UserError(f"tokenizer {path}: a SentencePiece model that was cut short")
    return proto, content


def to_tokenizers(proto: "ModelProto", source: Path, mask_piece: str | None) -> "TokenizersPipeline":
    """Build the `tokenizers` pipeline of a SentencePiece model.

    Args:
        proto: the parsed model.
        source: its path, for error messages.
        mask_piece: the mask token, which swallows the spaces before it; None where the model has none.

    Returns:
        A pipeline that adds no BOS or EOS. Ids are those of the SentencePiece model.

    Raises:
        UserError: where the model uses an option that `tokenizers` cannot reproduce (see the module's text).
    """
    from tokenizers import AddedToken, Tokenizer

    check_convertible(proto, source)
    pipeline = Tokenizer(_unigram(proto) if proto.trainer_spec.model_type == UNIGRAM else _bpe(proto))
    pipeline.normalizer = _normalizer(proto)
    pipeline.pre_tokenizer = _pre_tokenizer(proto)
    pipeline.decoder = _decoder(proto)
    pipeline.add_special_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True, lstrip=piece.piece == mask_piece)
            for piece in proto.pieces
            if piece.type in (CONTROL, UNKNOWN)
        ]
    )
    user_defined = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    pipeline.add_tokens([AddedToken(piece, normalized=False, special=piece == mask_piece) for piece in user_defined])
    return pipeline


def check_convertible(proto: "ModelProto", source: Path) -> None:
    """Raise `UserError` if the model uses an option that `tokenizers` cannot reproduce exactly."""
    for refusal in _refusals(proto):
        raise UserError(f"tokenizer {source}: {refusal}; use a Hugging Face tokenizer folder instead")


def _refusals(proto: "ModelProto"):
    """Yield one phrase per option that cannot be reproduced."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    types = {piece.type for piece in proto.pieces}
    if trainer.model_type not in (UNIGRAM, BPE):
        yield f"model type {trainer.model_type} is not convertible (allowed: unigram, BPE)"
    if trainer.treat_whitespace_as_suffix:
        yield "treat_whitespace_as_suffix is not convertible"
    if not normalizer.escape_whitespaces:
        yield "escape_whitespaces=false is not convertible"
    if UNUSED in types:
        yield "unused pieces are not convertible"
    if USER_DEFINED in types and (normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces):
        yield "user-defined symbols with add_dummy_prefix or remove_extra_whitespaces are not convertible"
    yield from _piece_refusals(proto)


def _piece_refusals(proto: "ModelProto"):
    """Yield one phrase per kind of piece that would be segmented differently."""
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    for piece in normal:
        if any(character not in normal for character in piece):
            yield f"piece {piece!r} has a character that is not a piece itself"
            break
    if proto.trainer_spec.model_type == BPE:
        scores = Counter(score for piece, score in normal.items() if len(piece) > 1)
        if scores and scores.most_common(1)[0][1] > 1:
            yield f"several BPE pieces have the same score {scores.most_common(1)[0][0]}"


def _unknown_id(proto: "ModelProto") -> int:
    return next(index for index, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)


def _unigram(proto: "ModelProto"):
    """The unigram model; reserved pieces get a score no path can want, as SentencePiece never matches them in text."""
    from tokenizers.models import Unigram

    lowest = min([piece.score for piece in proto.pieces if piece.type == NORMAL] + [-1.0])
    longest = max(len(piece.piece) for piece in proto.pieces)
    reserved = lowest * (longest + 1)
    vocab = [(piece.piece, piece.score if piece.type == NORMAL else reserved) for piece in proto.pieces]
    return Unigram(vocab, unk_id=_unknown_id(proto), byte_fallback=proto.trainer_spec.byte_fallback)


def _bpe(proto: "ModelProto"):
    """The BPE model: SentencePiece stores no merges, any two neighbours that form a piece may merge, best score first."""
    from tokenizers.models import BPE as BytePairEncoding

    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return BytePairEncoding(
        vocab=ids,
        merges=merges,
        unk_token=proto.pieces[_unknown_id(proto)].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _normalizer(proto: "ModelProto"):
    """Character table, then the removal of extra spaces (U+0020 only)."""
    from tokenizers import Regex, normalizers

    spec = proto.normalizer_spec
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(rf"[ {SPACE_SYMBOL}]+\z"), "")]
        # With a leading space to come, the one space that is left in front of a text stands for it.
        steps += [] if spec.add_dummy_prefix else [normalizers.Replace(Regex(r"\A +"), "")]
    else:
        steps.append(normalizers.Replace(" ", SPACE_SYMBOL))
    return normalizers.Sequence(steps)


def _pre_tokenizer(proto: "ModelProto"):
    """The leading space and the space symbol; no split, as pieces may hold runs of spaces.

    `Metaspace` adds its symbol unless the text begins with it. Here that symbol is a plain space, which after `_normalizer`
    stands in front only where SentencePiece would drop it.
    """
    from tokenizers.pre_tokenizers import Metaspace, Sequence

    steps = [Metaspace(replacement=SPACE_SYMBOL, prepend_scheme="never", split=False)]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.insert(0, Metaspace(replacement=" ", prepend_scheme="first", split=False))
    return Sequence(steps + _byte_name_splits(proto))


def _byte_name_splits(proto: "ModelProto"):
    """Cut a text such as "<0x41>" at brackets that are no piece, or unigram prefers the byte piece of that name.

    The cut changes nothing else: where a bracket is no piece, no piece contains it.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    known = {piece.piece for piece in proto.pieces if piece.type == NORMAL}
    patterns = {"<": "<(?=0x[0-9A-F]{2}>)", ">": "(?<=<0x[0-9A-F]{2})>"}
    if not proto.trainer_spec.byte_fallback or proto.trainer_spec.model_type != UNIGRAM:
        return []
    return [Split(Regex(pattern), "isolated") for bracket, pattern in patterns.items() if bracket not in known]


def _decoder(proto: "ModelProto"):
    """Pieces to text: spaces, bytes, and the leading space taken off again."""
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE_SYMBOL, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
