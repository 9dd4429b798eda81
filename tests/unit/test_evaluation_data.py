"""Encodings, scores and sources of fine-tuning: by hand, and against the libraries' own words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.evaluation.backbone import load_tokenizer
from megatron_ext.evaluation.encoding import IGNORED, encode_questions, encode_texts, encode_words
from megatron_ext.evaluation.scores import find_answers, score_answers, score_labels, score_ranking, score_tags
from megatron_ext.evaluation.sources import load, problem_of, read_rows
from megatron_ext.evaluation.tasks import TASKS, find_task

# Encodings


class Pieces:
    """Stands for a tokenizer that cuts every word of more than three letters in two, and drops empty ones."""

    def __call__(self, words: list[list[str]], **options: Any) -> Any:
        places = [[n for n, word in enumerate(row) for _ in range((len(word) > 0) + (len(word) > 3))] for row in words]
        result = {"input_ids": places, "attention_mask": [[1] * len(row) for row in places]}
        return type("Encoded", (dict,), {"word_ids": lambda self, row: places[row]})(result)


def test_the_label_of_a_word_is_at_its_first_token() -> None:
    row = {"tokens": ["Ann", "", "lives", "in", "Paris"], "tags": ["B-per", "O", "O", "O", "B-loc"]}
    (feature,), (places,) = encode_words(Pieces(), [row], ("B-per", "O"), 64)
    assert feature["labels"] == [0, 1, IGNORED, 1, IGNORED, IGNORED]  # no training row has B-loc
    assert places == {0: 0, 2: 1, 3: 3, 4: 4}


def test_pairs_have_something_between_them(small_encoder: Path) -> None:
    tokenizer = load_tokenizer(small_encoder)
    (feature,) = encode_texts(tokenizer, [{"text": "the film", "text_pair": "was good", "label": "yes"}], ("no", "yes"), 64)
    assert tokenizer.convert_ids_to_tokens(feature["input_ids"]) == ["the", "film", "<eos>", "was", "good"]
    assert feature["labels"] == 1


def test_what_stands_between_two_texts_is_never_cut_off(small_encoder: Path) -> None:
    tokenizer = load_tokenizer(small_encoder)
    row = {"text": "the film was good " * 20, "text_pair": "it was bad " * 20, "label": "no"}
    (feature,) = encode_texts(tokenizer, [row], ("no", "yes"), 32)
    tokens = tokenizer.convert_ids_to_tokens(feature["input_ids"])
    assert len(tokens) == 32 and tokens[16] == "<eos>" and tokens[15] == "good" and tokens[17:20] == ["it", "was", "bad"]


QUESTION = {
    "question": "where is ann",
    "context": "bob works in rome and ann lives in paris",
    "answers": {"text": ["paris"], "answer_start": [35]},
}


def test_windows_cover_a_long_context_and_point_to_the_answer(small_encoder: Path) -> None:
    tokenizer = load_tokenizer(small_encoder)
    windows = encode_questions(tokenizer, [QUESTION], max_length=8)
    assert len(windows) > 1
    seen = {place for window in windows for place in window.offsets if place}
    assert {QUESTION["context"][first:last] for first, last in seen} >= set(QUESTION["context"].split())
    for window in windows:
        start, end = window.feature["start_positions"], window.feature["end_positions"]
        place = window.offsets[start]
        holds = (35, 40) in window.offsets
        assert (start > 0) == holds and start == end
        assert not holds or place == (35, 40)


# Scores


def test_answers_are_the_best_spans(small_encoder: Path) -> None:
    windows = encode_questions(load_tokenizer(small_encoder), [QUESTION], max_length=8)
    logits = [np.zeros((len(window.offsets), 2)) for window in windows]
    for scores, window in zip(logits, windows, strict=True):
        if (35, 40) in window.offsets:
            scores[window.offsets.index((35, 40))] = 5.0
    assert find_answers(logits, windows, [QUESTION]) == ["paris"]
    assert score_answers(logits, windows, [QUESTION]).value == 1.0
    for scores in logits:
        scores[0] = 9.0
    assert find_answers(logits, windows, [QUESTION]) == ["paris"], "all questions of the set have an answer"
    unanswerable = {**QUESTION, "answers": {"text": [], "answer_start": []}}
    assert find_answers(logits, windows, [QUESTION, unanswerable])[0] == ""
    assert score_answers(logits, windows, [unanswerable]).value == 1.0


def test_part_of_an_answer_counts_in_part(small_encoder: Path) -> None:
    """Two of three words guessed are right, two of the two wanted are found: F1 is 0.8."""
    row = {**QUESTION, "answers": {"text": ["lives in"], "answer_start": [26]}}
    windows = encode_questions(load_tokenizer(small_encoder), [row], max_length=32)
    scores = np.zeros((len(windows[0].offsets), 2))
    scores[windows[0].offsets.index((26, 31)), 0] = scores[windows[0].offsets.index((35, 40)), 1] = 5.0
    assert score_answers([scores], windows, [row]).value == pytest.approx(0.8)


def test_entities_count_whole() -> None:
    """One of two entities is found and none is invented: precision 1, recall 0.5. A tag of no training row is missed."""
    labels = ("B-per", "I-per", "O")
    rows = [{"tokens": list("abcd"), "tags": ["B-per", "I-per", "O", "B-loc"]}]
    score = score_tags([np.eye(3)[[0, 1, 2, 2]]], [{0: 0, 1: 1, 2: 2, 3: 3}], rows, labels)
    assert score.value == pytest.approx(2 / 3) and score.items.tolist() == [[1.0, 1.0, 2.0]]


def test_words_without_a_token_shift_no_guess() -> None:
    """The second word has none: it counts as outside, and those behind it keep their own."""
    rows = [{"tokens": ["a", "", "c", "d"], "tags": ["O", "O", "B-per", "O"]}]
    score = score_tags([np.eye(2)[[1, 0, 1]]], [{0: 0, 2: 1, 3: 2}], rows, ("B-per", "O"))
    assert score.value == 1.0 and score.items.tolist() == [[1.0, 1.0, 1.0]]


def test_accuracy() -> None:
    score = score_labels(np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), [{"labels": 1}, {"labels": 1}, {"labels": 1}])
    assert score.value == pytest.approx(2 / 3) and score.items.tolist() == [1.0, 0.0, 1.0]


def test_ndcg_by_hand() -> None:
    """The document is first, third, and eleventh: 1, 1 / log2(4), 0."""
    documents = torch.eye(12)
    queries = torch.stack([torch.linspace(1, 0.1, 12)] * 3)
    score = score_ranking(queries, documents, [[0], [2], [10]])
    assert score.items.tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert score.value == pytest.approx(0.5)
    both = score_ranking(queries[:1], documents, [[0, 2]]).value
    assert both == pytest.approx(1.5 / (1 + 1 / np.log2(3))), "first and third of two: the best is first and second"


# Sources


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pandas

    rows = [{"text": "good film", "label": "yes"}, {"text": 'a "dull", one', "label": "no"}]
    frame = pandas.DataFrame(rows)
    frame.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    assert all(list(read_rows(tmp_path / f"rows.{kind}")) == rows for kind in ("jsonl", "csv", "parquet"))
    (tmp_path / "rows.conll").write_text("-DOCSTART- -X- O\n\nAnn NNP B-per\nlives VB O\n\nRome NNP B-loc\n")
    expected = [{"tokens": ["Ann", "lives"], "tags": ["B-per", "O"]}, {"tokens": ["Rome"], "tags": ["B-loc"]}]
    assert list(read_rows(tmp_path / "rows.conll")) == expected


def test_validation_is_cut_from_training_rows_by_what_they_say(tmp_path: Path) -> None:
    """Also where there are more than are taken."""
    for count, taken in ((400, 40), (30_000, 2000)):
        lines = [f"film {number},{'yes' if number % 2 else 'no'}" for number in range(count)]
        (tmp_path / "train.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
        (tmp_path / "test.csv").write_text("text,label\nfilm,yes\n")
        first = load(find_task("sst2"), tmp_path, Path("nowhere"))
        (tmp_path / "train.csv").write_text("text,label\n" + "\n".join(reversed(lines)) + "\n")
        second = load(find_task("sst2"), tmp_path, Path("nowhere"))
        assert len(first.validation) == taken and len(first.train) == count - taken
        assert {row["text"] for row in first.validation} == {row["text"] for row in second.validation}
        assert first.labels == ("no", "yes")


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a", "split": "train"}\n', "row 1 of .*, train: it lacks label; it has text, split"),
        ('["text"]\n', "a row has the split None"),
        ('{"text": "a", "label": "b", "split": "train"}\n', "has no rows for validation"),
        ('{"text": "a", "label": "b", "split": "dev"}\n', "a row has the split 'dev': allowed are train, validation, test"),
        ("not json\n", "cannot be read"),
        (
            '{"text": "a", "label": "b", "split": "train"}\n{"text": "a", "text_pair": "c", "label": "b", "split": "train"}\n',
            "1 of 2 rows of .*, train, have a text_pair",
        ),
    ],
)
def test_bad_data_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        load(find_task("rotten_tomatoes"), tmp_path / "data.jsonl", Path("nowhere"))


@pytest.mark.parametrize(
    "family, row, message",
    [
        ("tc", {"tokens": "a b", "tags": "O O"}, "must be lists of one length"),
        ("tc", {"tokens": ["a", "b"], "tags": ["O"]}, "must be lists of one length"),
        ("tc", {"tokens": ["a"], "tags": [3]}, "the tag 3 is neither O nor like B-person"),
        ("qa", {"question": "q", "context": "c", "answers": ["a"]}, "answers must have text and answer_start"),
        ("qa", {"question": "q", "context": "c", "answers": {"text": "a", "answer_start": 3}}, "must be lists"),
        ("qa", {"question": "q", "context": "c", "answers": {"text": ["a"], "answer_start": []}}, "must be of one length"),
        ("ir", {"query": "q"}, "it lacks positive; it has query"),
        ("ir", {"query": None, "positive": "p"}, "query is None: it must be a text that says something"),
        ("sc", {"text": " ", "label": "yes"}, "text is ' ': it must be a text that says something"),
        ("sc", {"text": "a", "label": None}, "label is None"),
        ("tc", {"tokens": [], "tags": []}, "and not empty"),
        ("sc", "a line", "it is no object with columns"),
    ],
)
def test_rows_of_another_kind_are_refused(family: str, row: Any, message: str) -> None:
    assert message in (problem_of(family, row) or "")


@pytest.mark.parametrize("line", ["a film", "a film,yes,no"])
def test_rows_of_a_table_are_as_wide_as_its_head(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.csv").write_text(f"text,label\ngood,yes\n{line}\n")
    with pytest.raises(UserError, match="row 2 has more or fewer columns than the head"):
        list(read_rows(tmp_path / "rows.csv"))


def test_a_label_that_no_training_row_has_is_refused(tmp_path: Path) -> None:
    rows = [("train", "yes"), ("validation", "yes"), ("test", "no")]
    (tmp_path / "data.jsonl").write_text("".join(f'{{"text": "a", "label": "{b}", "split": "{a}"}}\n' for a, b in rows))
    with pytest.raises(UserError, match="test has the label 'no', and no training row has it"):
        load(find_task("boolq"), tmp_path / "data.jsonl", Path("nowhere"))


def test_a_transfer_is_trained_on_the_other_task_alone(tmp_path: Path) -> None:
    for name, splits in (("msmarco", ("train", "validation", "test")), ("nq", ("test",))):
        (tmp_path / name).mkdir()
        for split in splits:
            (tmp_path / name / f"{split}.jsonl").write_text(f'{{"query": "{name} {split}", "positive": "p"}}\n')
    found = load(find_task("nq"), tmp_path / "nq", Path("nowhere"), tmp_path / "msmarco")
    assert [rows[0]["query"] for rows in (found.train, found.validation, found.test)] == [
        "msmarco train",
        "msmarco validation",
        "nq test",
    ]


def test_the_paper_has_twelve_sets() -> None:
    paper = [task for task in TASKS.values() if task.hub is not None]
    assert len(paper) == 12 and {task.family for task in paper} == {"sc", "tc", "qa", "ir"}
    assert all(sum(task.family == family for task in paper) == 3 for family in ("sc", "tc", "qa", "ir"))
