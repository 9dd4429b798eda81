"""Proof that an exported fast tokenizer gives the ids of the training, on texts that tokenizers stumble over.

Two differences are known, follow from how SentencePiece and `tokenizers` work (`data.sentencepiece_conversion`), and are counted
instead of refused: a unigram model may cut a run such as twenty spaces into the same pieces in another order, as every order
has the same score; and a model with a normalization table may read decomposed letters and some line ends otherwise.
"""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.data.tokenizer import SentencePieceTokenizer, Tokenizer
from megatron_ext.hf.verification_error import VerificationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Case:
    """A text whose token ids are compared."""

    name: str
    text: str
    normalization: bool = False
    """A normalization table changes it, and the two sides look theirs up differently."""


@dataclass(frozen=True)
class TokenizerReport:
    """What the comparison of ids found."""

    texts: int
    """Running texts with equal ids."""
    cases: int
    """Hard cases that were compared."""
    reordered: int
    """Places where a unigram model cuts a run into the same pieces in another order."""
    renormalized: int
    """Hard cases that a normalization table makes other ids of."""


def verification_texts() -> list[str]:
    """Article 1 of the Universal Declaration of Human Rights (United Nations, public domain), one language a text."""
    return _lines("verification_text.txt")


@cache
def verification_cases() -> tuple[Case, ...]:
    """Joined emoji, combining marks, rare scripts, control characters, white space of all kinds, code, addresses, and so on.

    None spells a special token: the training reads "[MASK]" as text and the exported tokenizer as the mask, on purpose.
    """
    return tuple(Case(**json.loads(line)) for line in _lines("verification_cases.txt"))


def compare_tokenizers(folder: Path, tokenizer: Tokenizer) -> TokenizerReport:
    """Compare the ids of every text, and the mask token's.

    Args:
        folder: with the exported tokenizer.
        tokenizer: of the training.

    Raises:
        VerificationError: ids differ in another way than the two that are known.
    """
    from transformers import AutoTokenizer

    # The texts are compared whole, however little the model takes: no warning about their length.
    fast = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, model_max_length=10**6)
    if fast.mask_token_id != tokenizer.mask_id:
        raise VerificationError(
            f"verification failed: the exported tokenizer's mask id is {fast.mask_token_id}, the training's {tokenizer.mask_id}"
        )
    texts = [Case(f"line {number} of verification_text.txt", text) for number, text in enumerate(verification_texts(), start=1)]
    may_reorder, has_table = _known_differences(fast, tokenizer)
    reordered = renormalized = 0
    for case in (*texts, *verification_cases()):
        trained, exported = tokenizer.encode(case.text), fast(case.text, add_special_tokens=False)["input_ids"]
        places = 0 if exported == trained else reordered_places(tokenizer, trained, exported) if may_reorder else None
        if places is not None:
            reordered += places
        elif case.normalization and has_table:
            renormalized += 1
        else:
            raise VerificationError(_complaint(case, tokenizer, trained, exported))
    return TokenizerReport(len(texts), len(verification_cases()), reordered, renormalized)


def reordered_places(tokenizer: Tokenizer, trained: list[int], exported: list[int]) -> int | None:
    """Count the stretches in which the same pieces spell the same text in another order.

    Returns:
        Their number; None if the ids differ in any other way.
    """
    if len(trained) != len(exported):
        return None
    places, start = 0, None
    balance: Counter[int] = Counter()
    for index, (ours, theirs) in enumerate(zip(trained, exported, strict=True)):
        if start is None:
            if ours == theirs:
                continue
            start = index
        balance[ours] += 1
        balance[theirs] -= 1
        if not any(balance.values()):
            spelled = {"".join(map(tokenizer.piece, ids[start : index + 1])) for ids in (trained, exported)}
            if len(spelled) > 1:
                return None
            places, start = places + 1, None
    return places if start is None else None


def _known_differences(fast: "PreTrainedTokenizerFast", tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether equal scores may be decided otherwise, and whether there is a normalization table.

    A tokenizer that was a Hugging Face one in training is exported as it is: nothing may differ.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return False, False
    pipeline = json.loads(fast.backend_tokenizer.to_str())
    return pipeline["model"]["type"] == "Unigram", '"Precompiled"' in json.dumps(pipeline["normalizer"])


def _complaint(case: Case, tokenizer: Tokenizer, trained: list[int], exported: list[int]) -> str:
    pairs = enumerate(zip(trained, exported, strict=False))
    place = next((index for index, (ours, theirs) in pairs if ours != theirs), min(len(trained), len(exported)))
    return (
        f"verification failed: the exported tokenizer gives other ids than {tokenizer.source} for {case.name}, from token {place} "
        f"on: {exported[place : place + 3]}, not {trained[place : place + 3]}"
    )


def _lines(name: str) -> list[str]:
    return Path(__file__).with_name(name).read_text(encoding="utf-8").split("\n")[:-1]
