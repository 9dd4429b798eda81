"""Scores of a model's answers, item by item and together, by the libraries that define them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ext.evaluation.encoding import Feature, Window
from megatron_ext.evaluation.sources import Row

LONGEST_ANSWER = 30
"""Tokens."""
BEST = 20
"""Starts and ends that are tried with each other."""
DEPTH = 100
"""Documents ranked for each query; the score looks at the first ten."""


@dataclass(frozen=True)
class Score:
    """On one split."""

    value: float
    """The task's metric, between 0 and 1."""
    items: np.ndarray
    """float32, for paired tests. [n]: label right (sc), answer F1 (qa), NDCG of a query (ir). [n, 3]: of a sentence (tc), how many
    entities were found, guessed and wanted."""


def score_labels(logits: np.ndarray, features: list[Feature]) -> Score:
    """sc: accuracy, of [n, labels] logits."""
    from sklearn.metrics import accuracy_score

    labels = np.array([feature["labels"] for feature in features])
    guesses = logits.argmax(axis=-1)
    return Score(float(accuracy_score(labels, guesses)), (guesses == labels).astype(np.float32))


def score_tags(logits: list[np.ndarray], places: list[dict[int, int]], rows: list[Row], labels: tuple[str, ...]) -> Score:
    """tc: F1 of whole entities (seqeval). Words that have no token, and those behind the cut, count as guessed outside of any.

    Args:
        logits: [tokens, labels] of each row.
        places: of each row, {word: its first token}.
        rows: with their tags.
        labels: by id.
    """
    from seqeval.metrics import f1_score
    from seqeval.metrics.sequence_labeling import get_entities

    wanted = [row["tags"] for row in rows]
    guessed = [
        [labels[int(scores[firsts[word]].argmax())] if word in firsts else "O" for word in range(len(tags))]
        for scores, firsts, tags in zip(logits, places, wanted, strict=True)
    ]
    pairs = [(set(get_entities(one)), set(get_entities(other))) for one, other in zip(wanted, guessed, strict=True)]
    items = np.array([[len(one & other), len(other), len(one)] for one, other in pairs], dtype=np.float32)
    return Score(float(f1_score(wanted, guessed, zero_division=0)), items)


def score_answers(logits: list[np.ndarray], windows: list[Window], rows: list[Row]) -> Score:
    """qa: word overlap F1 (SQuAD's, of torchmetrics), the best over the given answers."""
    from torchmetrics.functional.text import squad

    texts = find_answers(logits, windows, rows)
    items = []
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        answers = row["answers"]["text"] or [""]
        target = {"answers": {"answer_start": [0] * len(answers), "text": answers}, "id": str(number)}
        items.append(float(squad([{"prediction_text": text, "id": str(number)}], [target])["f1"]) / 100)
    return Score(float(np.mean(items)), np.array(items, dtype=np.float32))


def find_answers(logits: list[np.ndarray], windows: list[Window], rows: list[Row]) -> list[str]:
    """Each question's best span over its windows; none where the first token is the better answer in all of them.

    As SQuAD's own scripts have it, a set whose questions all have an answer is always given one.
    """
    may_be_none = any(not row["answers"]["text"] for row in rows)
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(rows)
    nothing = [np.inf] * len(rows)
    for scores, window in zip(logits, windows, strict=True):
        row = window.row
        nothing[row] = min(nothing[row], float(scores[0, 0] + scores[0, 1]))
        starts, ends = (np.argsort(-scores[: len(window.offsets), side])[:BEST] for side in (0, 1))
        for start in starts:
            for end in ends:
                first, last = window.offsets[start], window.offsets[end]
                if first is None or last is None or not 0 <= end - start < LONGEST_ANSWER:
                    continue
                value = float(scores[start, 0] + scores[end, 1])
                if value > best[row][0]:
                    best[row] = value, rows[row]["context"][first[0] : last[1]]
    return [text if value > none or not may_be_none else "" for (value, text), none in zip(best, nothing, strict=True)]


def score_ranking(queries: Any, documents: Any, relevant: list[list[int]]) -> Score:
    """ir: NDCG@10 (ir-measures), of documents ranked by cosine.

    Args:
        queries: [q, h] embeddings.
        documents: [d, h] embeddings.
        relevant: [q] the documents that answer each.
    """
    import ir_measures
    from sentence_transformers.util import semantic_search

    hits = semantic_search(queries, documents, top_k=min(DEPTH, len(documents)))
    run = {str(query): {str(hit["corpus_id"]): hit["score"] for hit in found} for query, found in enumerate(hits)}
    wanted = {str(query): {str(document): 1 for document in own} for query, own in enumerate(relevant)}
    measure = ir_measures.nDCG @ 10
    values = {int(metric.query_id): metric.value for metric in ir_measures.iter_calc([measure], wanted, run)}
    items = np.array([values.get(query, 0.0) for query in range(len(relevant))], dtype=np.float32)
    return Score(float(items.mean()), items)
