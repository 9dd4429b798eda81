"""Examples as token ids: what a head is trained and asked with."""

from dataclasses import dataclass
from typing import Any

from megatron_ext.evaluation.backbone import between
from megatron_ext.evaluation.sources import Row

IGNORED = -100
STRIDE_SHARE = 4
"""Windows of a long context overlap by this part of their length."""

Feature = dict[str, Any]


def encode_texts(tokenizer: Any, rows: list[Row], labels: tuple[str, ...], max_length: int) -> list[Feature]:
    """sc: one feature a row."""
    ids = {label: number for number, label in enumerate(labels)}
    first = [str(row["text"]) for row in rows]
    pairs = [str(row["text_pair"]) for row in rows] if rows and "text_pair" in rows[0] else None
    if pairs is not None:  # what stands between them must not be cut off with the first
        first = [shortened(tokenizer, text, max_length // 2) + between(tokenizer) for text in first]
    encoded = tokenizer(
        first, pairs, truncation="only_second" if pairs else True, max_length=max_length, return_token_type_ids=False
    )
    return [
        {"input_ids": encoded["input_ids"][n], "attention_mask": encoded["attention_mask"][n], "labels": ids[str(row["label"])]}
        for n, row in enumerate(rows)
    ]


def shortened(tokenizer: Any, text: str, length: int) -> str:
    """The text, cut behind so many tokens."""
    offsets = tokenizer(text, truncation=True, max_length=length, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    return text[: offsets[-1][1]] if len(offsets) == length else text


def encode_words(
    tokenizer: Any, rows: list[Row], labels: tuple[str, ...], max_length: int
) -> tuple[list[Feature], list[dict[int, int]]]:
    """tc: the label of a word is at its first token; all others have none.

    Returns:
        The features, and for each row {word: its first token}; a word that was cut off, or has no token at all, is not in it.
    """
    ids = {label: number for number, label in enumerate(labels)}
    words = [list(map(str, row["tokens"])) for row in rows]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length, return_token_type_ids=False)
    features, places = [], []
    for number, row in enumerate(rows):
        firsts: dict[int, int] = {}
        for token, word in enumerate(encoded.word_ids(number)):
            if word is not None:
                firsts.setdefault(word, token)
        marks = [IGNORED] * len(encoded["input_ids"][number])
        for word, token in firsts.items():
            marks[token] = ids.get(row["tags"][word], IGNORED)
        inputs = {name: encoded[name][number] for name in ("input_ids", "attention_mask")}
        features.append({**inputs, "labels": marks})
        places.append(firsts)
    return features, places


@dataclass(frozen=True)
class Window:
    """A part of a context behind its question."""

    row: int
    feature: Feature
    offsets: list[tuple[int, int] | None]
    """For each token its place in the context; None outside of it."""


def encode_questions(tokenizer: Any, rows: list[Row], max_length: int) -> list[Window]:
    """qa: a long context in overlapping windows. A window that does not hold the whole answer points to its first token."""
    questions = [shortened(tokenizer, str(row["question"]).strip(), max_length // 2) + between(tokenizer) for row in rows]
    encoded = tokenizer(
        questions,
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=max_length,
        stride=max_length // STRIDE_SHARE,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=False,
    )
    windows = []
    for number, row in enumerate(encoded["overflow_to_sample_mapping"]):
        parts, places = encoded.sequence_ids(number), encoded["offset_mapping"][number]
        offsets = [place if part == 1 else None for part, place in zip(parts, places, strict=True)]
        start, end = _answer_tokens(rows[row]["answers"], offsets)
        feature = {"input_ids": encoded["input_ids"][number], "attention_mask": encoded["attention_mask"][number]}
        windows.append(Window(row, {**feature, "start_positions": start, "end_positions": end}, offsets))
    return windows


def _answer_tokens(answers: Row, offsets: list[tuple[int, int] | None]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) if this window does not hold all of it."""
    if not answers["text"]:
        return 0, 0
    first = answers["answer_start"][0]
    last = first + len(answers["text"][0])
    starts = [n for n, place in enumerate(offsets) if place and place[0] <= first < place[1]]
    ends = [n for n, place in enumerate(offsets) if place and place[0] < last <= place[1]]
    return (starts[0], ends[-1]) if starts and ends else (0, 0)


def pad(features: list[Feature], pad_id: int) -> dict[str, Any]:
    """A batch of tensors, as long as its longest row."""
    import torch

    length = max(len(feature["input_ids"]) for feature in features)
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
    batch: dict[str, Any] = {}
    for name in features[0]:
        values = [feature[name] for feature in features]
        if isinstance(values[0], list):
            values = [value + [fill[name]] * (length - len(value)) for value in values]
        batch[name] = torch.tensor(values)
    return batch
