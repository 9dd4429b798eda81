"""Proof that an exported folder is the trained model: same token ids, same logits, same direction of attention.

A wrong row permutation of the queries, or an encoder that silently runs causal, loads without a word and costs quality only.
So the folder is reloaded as a user would load it, in float32, and held against logits that the training code computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError
from megatron_ext.hf.families import Family

ReferenceLogits = Callable[[Path, list[list[int]]], list[Tensor]]
"""(checkpoint, token rows) -> float32 logits [length, vocab_size] of each row, with the attention of the last objective."""

Rounding = tuple[float, float]
"""Largest and mean absolute change of a logit when the weights are rounded."""

LIMIT = 1e-4
"""Largest difference of a logit when both sides hold the same weights: float32 summation order only."""

PROBE_LENGTH = 16
LONG_ROW = 256
MASK_EVERY = 7
UNMOVED = 1e-6
"""Change of the first position's logits up to which it did not see the last token."""


class VerificationError(Exception):
    """The exported model is not the trained one; the message names the check and the largest difference."""


@dataclass(frozen=True)
class VerificationReport:
    """What a successful verification measured."""

    weights: str
    """dtype of the exported weights that were compared."""
    max_abs_diff: float
    mean_abs_diff: float
    tokens: int
    """Tokens whose logits were compared, over the whole vocabulary."""
    texts: int
    """Texts whose token ids were compared."""
    first_position_change: float
    """Largest change of the first position's logits when the last token is another one; 0 for a causal model."""


def verification_texts() -> list[str]:
    """Article 1 of the Universal Declaration of Human Rights (United Nations, public domain), one language a text."""
    path = Path(__file__).with_name("verification_text.txt")
    return path.read_text(encoding="utf-8").splitlines()


def verification_rows(tokenizer: Tokenizer, max_length: int, masked: bool) -> list[list[int]]:
    """Token rows whose logits are compared: each text, and one long row of all texts for the far positions.

    Args:
        tokenizer: the tokenizer of the training.
        max_length: longest row that the model takes.
        masked: put the mask token at every seventh position, as the model was trained to see.
    """
    texts = verification_texts()
    rows = [tokenizer.encode(text)[:max_length] for text in texts]
    rows.append(tokenizer.encode(" ".join(texts))[: min(max_length, LONG_ROW)])
    if masked and tokenizer.mask_id is not None:
        for row in rows:
            row[MASK_EVERY - 1 :: MASK_EVERY] = [tokenizer.mask_id] * len(row[MASK_EVERY - 1 :: MASK_EVERY])
    return rows


def verify_export(
    folder: Path,
    *,
    family: Family,
    tokenizer: Tokenizer,
    vocab_size: int,
    token_rows: list[list[int]],
    reference: list[Tensor],
    trained_causal: bool,
    weights: str,
) -> VerificationReport:
    """Reload an exported folder in float32 and compare it with the training code.

    Args:
        folder: the exported folder.
        family: what it was exported as.
        tokenizer: the tokenizer of the training.
        vocab_size: logits at each position; an imported model may have more of them than its tokenizer has ids.
        token_rows: rows of token ids.
        reference: float32 logits [length, vocab_size] of each row, from the training code (or `rounded_logits`).
        trained_causal: the reference was computed with causal attention.
        weights: dtype of the exported weights, for the report.

    Raises:
        VerificationError: a check failed.
        UserError: the reference does not belong to these rows.
    """
    texts = _check_tokenizer(folder, tokenizer)
    expected_shapes = [(len(row), vocab_size) for row in token_rows]
    if [tuple(logits.shape) for logits in reference] != expected_shapes:
        raise UserError(f"the reference logits have not the shape [length, {vocab_size}] of the token rows")
    model = _load_model(folder, family)
    logits = _all_logits(model, family, token_rows, trained_causal)
    largest, mean = difference(logits, reference)
    if not largest <= LIMIT:  # so written, a NaN fails too
        raise VerificationError(
            f"verification failed: the largest difference of a logit between the exported model ({weights} weights) and the "
            f"training code is {largest:.3g}, the limit {LIMIT:.0e}"
        )
    return VerificationReport(
        weights=weights,
        max_abs_diff=largest,
        mean_abs_diff=mean,
        tokens=sum(map(len, token_rows)),
        texts=texts,
        first_position_change=_check_direction(model, family, token_rows, tokenizer),
    )


def verify_import(
    folder: Path, checkpoint: Path, *, family: Family, tokenizer: Tokenizer, max_length: int, reference_logits: ReferenceLogits
) -> VerificationReport:
    """Compare a checkpoint with the Hugging Face model that it was made from, both in float32.

    The mask token has no part in it: its row may be a new one.

    Args:
        folder: the Hugging Face model.
        checkpoint: what was made of it.
        family: of the model.
        tokenizer: the checkpoint's.
        max_length: longest row that the model takes.
        reference_logits: the training code's forward pass.

    Raises:
        VerificationError: the logits differ by more than `LIMIT`.
    """
    rows = verification_rows(tokenizer, max_length, masked=False)
    model = _load_model(folder, family)
    theirs = [_logits(model, row) for row in rows]
    kept = [index for index in range(theirs[0].shape[1]) if index != tokenizer.mask_id]
    ours = [logits[:, kept] for logits in reference_logits(checkpoint, rows)]
    largest, mean = difference(ours, [logits[:, kept] for logits in theirs])
    if not largest <= LIMIT:
        raise VerificationError(
            f"verification failed: the largest difference of a logit between {folder.name} and the training code is {largest:.3g}, "
            f"the limit {LIMIT:.0e}"
        )
    change = _check_direction(model, family, rows, tokenizer)
    return VerificationReport("float32", largest, mean, sum(map(len, rows)), 0, change)


def rounded_logits(
    folder: Path, family: Family, token_rows: list[list[int]], trained_causal: bool, dtype: torch.dtype
) -> list[Tensor]:
    """What a verified folder's weights give after rounding to `dtype`: the reference for the folder that is written rounded.

    Rounding moves logits far more than `LIMIT`, and by how much depends on the model; so the effect of rounding is reported
    and not limited, while the files must hold the rounded weights within `LIMIT`. Args as of `verify_export`.
    """
    model = _load_model(folder, family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return _all_logits(model, family, token_rows, trained_causal)


def difference(logits: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Maximum and mean of the absolute differences; a NaN anywhere makes both NaN."""
    pairs = zip(logits, expected, strict=True)
    differences = [(row - wanted.float()).abs() for row, wanted in pairs]
    largest = torch.stack([row.amax() for row in differences]).amax().item()
    return largest, sum(row.sum(dtype=torch.float64).item() for row in differences) / sum(row.numel() for row in differences)


def _check_tokenizer(folder: Path, tokenizer: Tokenizer) -> int:
    """Compare ids on every text, and the mask token's. Returns the number of texts."""
    from transformers import AutoTokenizer

    # The texts are compared whole, however little the model takes: no warning about their length.
    fast = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, model_max_length=10**6)
    texts = verification_texts()
    for number, text in enumerate(texts, start=1):
        exported, trained = fast(text, add_special_tokens=False)["input_ids"], tokenizer.encode(text)
        if exported != trained:
            place = next((i for i, pair in enumerate(zip(exported, trained, strict=False)) if len(set(pair)) > 1), len(trained))
            raise VerificationError(
                f"verification failed: the exported tokenizer gives other ids than {tokenizer.source} for line {number} of "
                f"verification_text.txt, from token {place} on"
            )
    if fast.mask_token_id != tokenizer.mask_id:
        raise VerificationError(
            f"verification failed: the exported tokenizer's mask id is {fast.mask_token_id}, the training's {tokenizer.mask_id}"
        )
    return len(texts)


def _load_model(folder: Path, family: Family) -> torch.nn.Module:
    """The model in float32 for inference. Every weight must come from the files."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto_class = AutoModelForMaskedLM if family.architecture.endswith("ForMaskedLM") else AutoModelForCausalLM
    model, loading = auto_class.from_pretrained(
        str(folder),
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    if type(model).__name__ != family.architecture:
        raise VerificationError(f"verification failed: {folder.name} loads as {type(model).__name__}, not {family.architecture}")
    problems = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    if problems:
        raise VerificationError(f"verification failed: {family.architecture} does not load cleanly: {problems}")
    return model.eval()


def _all_logits(model: torch.nn.Module, family: Family, token_rows: list[list[int]], trained_causal: bool) -> list[Tensor]:
    """Logits of every row. A causal model that leaves as a bidirectional one runs under the mask that it was trained with."""
    with_causal_mask = trained_causal and not family.causal
    return [_logits(model, row, with_causal_mask) for row in token_rows]


@torch.inference_mode()
def _logits(model: torch.nn.Module, row: list[int], with_causal_mask: bool = False) -> Tensor:
    """Logits [length, vocab_size] of one row; the mask, if any, is [1, 1, length, length] with True = keep."""
    ids = torch.tensor([row])
    mask = torch.ones(1, 1, len(row), len(row), dtype=torch.bool).tril() if with_causal_mask else None
    return model(input_ids=ids, attention_mask=mask).logits[0]


def _check_direction(model: torch.nn.Module, family: Family, rows: list[list[int]], tokenizer: Tokenizer) -> float:
    """Put another last token: the first position's logits must move in an encoder, and stay in a causal model."""
    probe = rows[0][:PROBE_LENGTH]
    last = next(index for index in range(tokenizer.vocab_size) if index not in tokenizer.special_ids and index != probe[-1])
    change = (_logits(model, probe)[0] - _logits(model, [*probe[:-1], last])[0]).abs().max().item()
    if (change <= UNMOVED) is not family.causal:
        found, wanted = ("does not see", "bidirectional") if change <= UNMOVED else ("sees", "causal")
        raise VerificationError(
            f"verification failed: the first position {found} the last token (its logits move by {change:.3g}), but "
            f"{family.architecture} must be {wanted}"
        )
    return change
