"""One process of `benchmarks.sequences`: a step over the same documents, packed into rows or padded into a rectangle.

python -m benchmarks.documents packed --sequence-length 2048
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks.alternating import take_turns
from benchmarks.contenders import CLIP, LEARNING_RATE, MASK_RATIO, SHAPES, contending_step, encoder_of, transformers_model
from benchmarks.memory import peak, reset_peak
from benchmarks.own_run import own_groups
from megatron_ext.errors import run_command

TOKENS = 8_192
"""In a step, whatever the length of its rows."""
SHORTEST, LONGEST = 16, 1024
"""Tokens of a document; the logarithm of the length is uniform."""
PADDED_BATCH = 16
"""Documents in a padded micro-batch."""
MASK_ID = 4


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of s tokens, and the pieces of documents in it."""

    tokens: np.ndarray
    """[s] what the model sees."""
    labels: np.ndarray
    """[s] what it is to say, -100 where nothing."""
    lengths: np.ndarray
    """[k] of the pieces; they sum to s."""


def make_rows(sequence_length: int, vocab_size: int, seed: int = 0) -> list[Row]:
    """Documents laid end to end and cut into rows; what a row's end cuts goes on in the next one."""
    generator = np.random.default_rng(seed)
    rows, left = [], 0
    for _ in range(TOKENS // sequence_length):
        lengths: list[int] = []
        while (room := sequence_length - sum(lengths)) > 0:
            left = left or round(np.exp(generator.uniform(np.log(SHORTEST), np.log(LONGEST))))
            lengths.append(min(left, room))
            left -= lengths[-1]
        tokens = generator.integers(5, vocab_size, sequence_length)
        labels = np.where(generator.random(sequence_length) < MASK_RATIO, tokens, -100)
        rows.append(Row(np.where(labels >= 0, MASK_ID, tokens), labels, np.array(lengths)))
    return rows


def encoder(sequence_length: int) -> Any:
    """The tiny shape, for rows of this length."""
    return dataclasses.replace(encoder_of(SHAPES["tiny"]), max_position_embeddings=max(512, sequence_length))


def build_own(sequence_length: int, is_packed: bool, stack: ExitStack) -> Callable[[], float]:
    """This project on rows of one micro-batch each; documents see themselves alone, or all of their row."""

    from megatron_ext.data.batch import collate
    from megatron_ext.objective import OBJECTIVES, Example

    vocab_size = SHAPES["tiny"].vocab_size
    batches = []
    for row in make_rows(sequence_length, vocab_size):
        places = np.flatnonzero(row.labels >= 0)
        example = Example(row.tokens, places, row.labels[places])
        options = {"documents_attend_across": not is_packed, "restart_positions": is_packed}
        batches.append(collate([example], [row.lengths], OBJECTIVES["mlm"], **options))
    shape = encoder(sequence_length)
    layout, backend = stack.enter_context(own_groups(shape, 1, len(batches)))
    step = contending_step(shape, vocab_size, layout, backend)

    def run() -> float:
        sums = step(batches)
        return float(sums.losses["mlm"]) / sums.predicted["mlm"]

    return run


def build_padded(sequence_length: int) -> Callable[[], float]:
    """transformers on the same pieces of documents, padded to the longest of their micro-batch."""
    import torch

    vocab_size = SHAPES["tiny"].vocab_size
    model = transformers_model(encoder(sequence_length), vocab_size, "mlm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    rows = make_rows(sequence_length, vocab_size)
    pieces = [
        (torch.from_numpy(tokens), torch.from_numpy(labels))
        for row in rows
        for tokens, labels in zip(*(np.split(part, np.cumsum(row.lengths)[:-1]) for part in (row.tokens, row.labels)), strict=True)
    ]
    predicted = sum(int((row.labels >= 0).sum()) for row in rows)

    def pad(parts: list[Any], value: int) -> Any:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for start in range(0, len(pieces), PADDED_BATCH):
            tokens, labels = zip(*pieces[start : start + PADDED_BATCH], strict=True)
            ones = [torch.ones_like(part) for part in tokens]
            labels = pad(list(labels), -100)
            model_input = {"input_ids": pad(list(tokens), 0), "attention_mask": pad(ones, 0)}
            loss = model(**model_input, labels=labels).loss * (int((labels >= 0).sum()) / predicted)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return total

    return run


def main() -> int:
    """Build one contender and take turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contender", choices=("packed", "across", "padded"))
    parser.add_argument("--sequence-length", type=int, required=True)
    arguments = parser.parse_args()
    import torch

    import megatron_ext.train.trainer  # noqa: F401 - all of them before memory is counted
    from megatron_ext.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    torch.manual_seed(0)
    torch.ones(256, 256).mm(torch.ones(256, 256))
    before = reset_peak()
    with ExitStack() as stack:
        if arguments.contender == "padded":
            step = build_padded(arguments.sequence_length)
        else:
            step = build_own(arguments.sequence_length, arguments.contender == "packed", stack)

        def timed() -> dict[str, float]:
            start = time.perf_counter()
            loss = step()
            return {"seconds": time.perf_counter() - start, "loss": loss, "peak_bytes": peak() - before}

        take_turns({"threads": torch.get_num_threads()}, timed)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
