"""Proof that an exported folder is the trained model: same token ids, logits, direction of attention and weights.

A wrong row permutation of the queries, or an encoder that silently runs causal, loads without a word and costs quality only.
So the folder is reloaded as a user would load it, in float32, and held against logits that the training code computes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError
from megatron_ext.hf.checkpoint_reader import CheckpointReader
from megatron_ext.hf.families import Family
from megatron_ext.hf.verification_error import VerificationError
from megatron_ext.hf.verify_tokenizer import TokenizerReport, compare_tokenizers, verification_texts
from megatron_ext.hf.verify_weights import WeightReport, check_layout, compare_weights
from megatron_ext.tree import flatten

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


@dataclass(frozen=True)
class VerificationReport:
    """What a successful verification measured."""

    weights: str
    """dtype of the exported weights that were compared."""
    max_abs_diff: float
    mean_abs_diff: float
    tokens: int
    """Tokens whose logits were compared, over the whole vocabulary."""
    first_position_change: float
    """Largest change of the first position's logits when the last token is another one; 0 for a causal model."""
    weight_report: WeightReport
    tokenizer_report: TokenizerReport | None
    """None for an import, which takes the tokenizer's files over."""

    @property
    def texts(self) -> int:
        """Running texts whose token ids were compared."""
        return self.tokenizer_report.texts if self.tokenizer_report else 0

    def figures(self) -> dict[str, Any]:
        """Name -> value of all that was measured, in one level."""
        return flatten(asdict(self))


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
    reader: CheckpointReader,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    token_rows: list[list[int]],
    reference: list[Tensor],
) -> VerificationReport:
    """Reload an exported folder in float32 and compare it with the training code and the checkpoint.

    Args:
        folder: the exported folder.
        family: what it was exported as.
        reader: the checkpoint.
        tokenizer: the tokenizer of the training.
        dtype: of the exported weights.
        token_rows: rows of token ids.
        reference: float32 logits [length, vocab_size] of each row, from the training code (or `rounded_logits`).

    Raises:
        VerificationError: a check failed.
        UserError: the reference does not belong to these rows.
    """
    record, weights = reader.record, str(dtype).removeprefix("torch.")
    tokenizer_report = compare_tokenizers(folder, tokenizer)
    # An imported model may have more rows than its tokenizer has ids.
    if [tuple(logits.shape) for logits in reference] != [(len(row), record.vocab_size) for row in token_rows]:
        raise UserError(f"the reference logits have not the shape [length, {record.vocab_size}] of the token rows")
    check_layout(folder, reader, family, dtype)
    model = _load_model(folder, family)
    logits = _all_logits(model, family, token_rows, record.causal)
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
        first_position_change=_check_direction(model, family, token_rows, tokenizer),
        weight_report=compare_weights(folder, reader, family, dtype=dtype),
        tokenizer_report=tokenizer_report,
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
        VerificationError: the logits differ by more than `LIMIT`, or a weight does.
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
    reader = CheckpointReader(checkpoint)
    mask = reader.record.tree["imported"]["mask_token"]
    made_row = None if mask is None or mask["how"] == "present" else mask["id"]
    weights = compare_weights(folder, reader, family, made_row=made_row)
    return VerificationReport("float32", largest, mean, sum(map(len, rows)), change, weights, None)


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
