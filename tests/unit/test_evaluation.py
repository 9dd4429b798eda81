"""Heads, encodings and scores of fine-tuning: against transformers, scikit-learn's and SciPy's own words, and by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import EuroBertConfig, EuroBertForMaskedLM, EuroBertForTokenClassification, PreTrainedTokenizerFast

from megatron_ext.errors import UserError
from megatron_ext.evaluation.backbone import load_backbone, load_tokenizer
from megatron_ext.evaluation.encoding import IGNORED, encode_questions, encode_texts, encode_words, pad
from megatron_ext.evaluation.finetune import FinetuneRun, finetune
from megatron_ext.evaluation.heads import SequenceClassifier, SpanFinder, TokenClassifier, mean_pool
from megatron_ext.evaluation.retrieval import SCALE, Embedder
from megatron_ext.evaluation.scores import find_answers, score_answers, score_labels, score_ranking, score_tags
from megatron_ext.evaluation.sources import load, problem_of, read_rows
from megatron_ext.evaluation.tasks import TASKS, Task, find_task
from megatron_ext.evaluation.training import Settings
from tests.unit.processes import refusal, run_tool

WORDS = [
    "<pad>",
    "<eos>",
    "<unk>",
    *[
        "the",
        "a",
        "film",
        "was",
        "good",
        "bad",
        "dull",
        "bright",
        "ann",
        "bob",
        "paris",
        "rome",
        "lives",
        "in",
        "works",
        "who",
        "where",
        "is",
        "it",
        "and",
        "not",
        "very",
    ],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny EuroBERT with random weights, and a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = EuroBertConfig(vocab_size=len(WORDS), **sizes, max_position_embeddings=64, pad_token_id=0, initializer_range=0.2)
    EuroBertForMaskedLM(config).save_pretrained(folder)
    return folder


def batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return pad([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], 0)


# Attention


def test_bidirectional_is_eurobert_and_causal_sees_only_back(model: Path) -> None:
    """Changing the last token moves the hidden states before it in the one, and not in the other."""
    first, second = batch([[3, 4, 5, 6]])["input_ids"], batch([[3, 4, 5, 7]])["input_ids"]
    for attention, moves in (("bidirectional", True), ("causal", False)):
        encoder = load_backbone(model, attention).eval()
        with torch.no_grad():
            one, other = (encoder(input_ids=ids).last_hidden_state[0, :3] for ids in (first, second))
        assert torch.equal(one, other) != moves
    reference = EuroBertForMaskedLM.from_pretrained(model).eval().model
    with torch.no_grad():
        expected = reference(input_ids=first).last_hidden_state
        found = load_backbone(model, "bidirectional").eval()(input_ids=first).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_weights_that_are_not_there_are_not_drawn(model: Path, tmp_path: Path) -> None:
    """A folder whose weights have other names would be scored as if it had been trained."""
    shutil.copytree(model, tmp_path / "other")
    weights = load_file(model / "model.safetensors")
    renamed = {name.replace("self_attn", "attention"): value for name, value in weights.items()}
    save_file(renamed, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its files lack 8 weights, such as layers.0.self_attn"):
        load_backbone(tmp_path / "other", "bidirectional")
    (tmp_path / "other/model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(tmp_path / "other", "bidirectional")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no config.json"):
        load_backbone(tmp_path, "bidirectional")


# Heads


def test_pooling_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    assert mean_pool(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 3.0]]


def test_token_classification_is_that_of_transformers(model: Path) -> None:
    theirs = EuroBertForTokenClassification.from_pretrained(model, num_labels=3).eval()
    ours = TokenClassifier(load_backbone(model, "bidirectional"), 3).eval()
    ours.head.load_state_dict(theirs.classifier.state_dict())
    rows = batch([[3, 4, 5], [6, 7]])
    labels = torch.tensor([[0, IGNORED, 2], [1, 1, IGNORED]])
    expected, found = theirs(**rows, labels=labels), ours(**rows, labels=labels)
    torch.testing.assert_close(found["logits"], expected.logits)
    torch.testing.assert_close(found["loss"], expected.loss)


def test_padding_changes_no_answer(model: Path) -> None:
    for head in (SequenceClassifier(load_backbone(model, "bidirectional"), 2), SpanFinder(load_backbone(model, "bidirectional"))):
        head.eval()
        with torch.no_grad():
            alone, beside = head(**batch([[3, 4, 5]]))["logits"][0], head(**batch([[3, 4, 5], [3, 4, 5, 6, 7]]))["logits"][0]
        torch.testing.assert_close(beside[: len(alone)], alone)


def test_span_loss_is_the_mean_of_two_softmaxes(model: Path) -> None:
    head, rows = SpanFinder(load_backbone(model, "bidirectional")).eval(), batch([[3, 4, 5, 6]])
    found = head(**rows, start_positions=torch.tensor([1]), end_positions=torch.tensor([3]))
    scores = found["logits"][0].double()
    expected = -(scores[:, 0].log_softmax(0)[1] + scores[:, 1].log_softmax(0)[3]) / 2
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_retrieval_loss_is_infonce_over_the_batch(model: Path) -> None:
    embedder = Embedder(load_backbone(model, "bidirectional")).eval()
    rows = batch([[3, 4], [5, 6], [7], [8, 9], [10], [11, 12]])
    vectors = torch.nn.functional.normalize(embedder(**rows)["logits"], dim=-1)
    logits = SCALE * vectors[:3] @ vectors[3:].t()
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(3))
    torch.testing.assert_close(embedder(**rows, pairs=torch.ones(()))["loss"], expected)


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


def test_pairs_have_something_between_them(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    (feature,) = encode_texts(tokenizer, [{"text": "the film", "text_pair": "was good", "label": "yes"}], ("no", "yes"), 64)
    assert tokenizer.convert_ids_to_tokens(feature["input_ids"]) == ["the", "film", "<eos>", "was", "good"]
    assert feature["labels"] == 1


def test_what_stands_between_two_texts_is_never_cut_off(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    row = {"text": "the film was good " * 20, "text_pair": "it was bad " * 20, "label": "no"}
    (feature,) = encode_texts(tokenizer, [row], ("no", "yes"), 32)
    tokens = tokenizer.convert_ids_to_tokens(feature["input_ids"])
    assert len(tokens) == 32 and tokens[16] == "<eos>" and tokens[15] == "good" and tokens[17:20] == ["it", "was", "bad"]


QUESTION = {
    "question": "where is ann",
    "context": "bob works in rome and ann lives in paris",
    "answers": {"text": ["paris"], "answer_start": [35]},
}


def test_windows_cover_a_long_context_and_point_to_the_answer(model: Path) -> None:
    tokenizer = load_tokenizer(model)
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


def test_answers_are_the_best_spans(model: Path) -> None:
    windows = encode_questions(load_tokenizer(model), [QUESTION], max_length=8)
    logits = [np.zeros((len(window.offsets), 2)) for window in windows]
    for scores, window in zip(logits, windows, strict=True):
        if (35, 40) in window.offsets:
            scores[window.offsets.index((35, 40))] = 5.0
    assert find_answers(logits, windows, [QUESTION]) == ["paris"]
    assert score_answers(logits, windows, [QUESTION]).value == 1.0
    for scores in logits:
        scores[0] = 9.0
    assert find_answers(logits, windows, [QUESTION]) == [""]
    assert score_answers(logits, windows, [QUESTION]).value == 0.0
    unanswerable = {**QUESTION, "answers": {"text": [], "answer_start": []}}
    assert score_answers(logits, windows, [unanswerable]).value == 1.0


def test_part_of_an_answer_counts_in_part(model: Path) -> None:
    """Two of three words guessed are right, two of the two wanted are found: F1 is 0.8."""
    row = {**QUESTION, "answers": {"text": ["lives in"], "answer_start": [26]}}
    windows = encode_questions(load_tokenizer(model), [row], max_length=32)
    scores = np.zeros((len(windows[0].offsets), 2))
    scores[windows[0].offsets.index((26, 31)), 0] = scores[windows[0].offsets.index((35, 40)), 1] = 5.0
    assert score_answers([scores], windows, [row]).value == pytest.approx(0.8)


def test_entities_count_whole() -> None:
    """One of two entities is found and none is invented: precision 1, recall 0.5. A tag of no training row is missed."""
    labels = ("B-per", "I-per", "O")
    rows = [{"tokens": list("abcd"), "tags": ["B-per", "I-per", "O", "B-loc"]}]
    score = score_tags([np.eye(3)[[0, 1, 2, 2]]], [{0: 0, 1: 1, 2: 2, 3: 3}], rows, labels)
    assert score.value == pytest.approx(2 / 3) and score.items.tolist() == [0.0]


def test_words_without_a_token_shift_no_guess() -> None:
    """The second word has none: it counts as outside, and those behind it keep their own."""
    rows = [{"tokens": ["a", "", "c", "d"], "tags": ["O", "O", "B-per", "O"]}]
    score = score_tags([np.eye(2)[[1, 0, 1]]], [{0: 0, 2: 1, 3: 2}], rows, ("B-per", "O"))
    assert score.value == 1.0 and score.items.tolist() == [1.0]


def test_accuracy() -> None:
    score = score_labels(np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), [{"labels": 1}, {"labels": 1}, {"labels": 1}])
    assert score.value == pytest.approx(2 / 3) and score.items.tolist() == [1.0, 0.0, 1.0]


def test_ndcg_by_hand() -> None:
    """The document is first, third, and eleventh: 1, 1 / log2(4), 0."""
    documents = torch.eye(12)
    queries = torch.stack([torch.linspace(1, 0.1, 12)] * 3)
    score = score_ranking(queries, documents, [0, 2, 10])
    assert score.items.tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert score.value == pytest.approx(0.5)


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
        ("ir", {"query": "q"}, "it lacks positive; it has query"),
        ("sc", "a line", "it is no object with columns"),
    ],
)
def test_rows_of_another_kind_are_refused(family: str, row: Any, message: str) -> None:
    assert message in (problem_of(family, row) or "")


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


# Whole runs


def write_reviews(folder: Path) -> Path:
    """Rows that a model learns in a few steps: the word decides."""
    generator, lines = np.random.default_rng(0), []
    for split, count in (("train", 256), ("validation", 40), ("test", 40)):
        for _ in range(count):
            label = generator.choice(["good", "bad"])
            others = " ".join(generator.choice(["the", "a", "film", "was", "it", "very"], size=4))
            lines.append(f'{{"text": "{others} {label}", "label": "{label}", "split": "{split}"}}')
    file = folder / "reviews.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_a_run_learns_and_is_a_function_of_its_seed(model: Path, tmp_path: Path) -> None:
    data = str(write_reviews(tmp_path))
    runs = [
        FinetuneRun(
            model=str(model), task="rotten_tomatoes", learning_rate=1e-2, seed=seed, data=data, settings=Settings(batch_size=8)
        )
        for seed in (0, 0, 1)
    ]
    first, again, other = map(finetune, runs)
    assert first.steps == 32 and first.test > 0.9 and first.test_items.mean() == pytest.approx(first.test)
    assert (first.test, first.train_loss) == (again.test, again.train_loss) != (other.test, other.train_loss)


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    """24 rows for training, 4 for validation and the test."""
    file, splits = folder / f"{name}.jsonl", ["train"] * 24 + ["validation"] * 4 + ["test"] * 4
    file.write_text("".join(json.dumps({**row, "split": split}) + "\n" for row, split in zip(rows, splits, strict=True)))
    return str(file)


def rows_of(family: str) -> list[dict[str, Any]]:
    """32 of them."""
    people, cities = ("ann", "bob"), ("paris", "rome")
    found: list[dict[str, Any]] = []
    for number in range(32):
        who, where = people[number % 2], cities[number // 2 % 2]
        text = f"{who} lives in {where}"
        answers = {"text": [where], "answer_start": [text.index(where)]} if number % 8 else {"text": [], "answer_start": []}
        found.append(
            {
                "sc": {"text": text, "text_pair": "who lives", "label": who},
                "tc": {"tokens": text.split(), "tags": ["B-per", "O", "O", "B-loc"]},
                "qa": {"question": f"where is {who}", "context": text, "answers": answers},
                "ir": {"query": f"where is {who}", "positive": text},
            }[family]
        )
    return found


@pytest.mark.parametrize("task", ["sst2", "conll2003", "squad_v2", "nq"])
def test_every_family_is_tuned_from_local_files(model: Path, tmp_path: Path, task: str) -> None:
    """The paper's tasks, from somebody's own copy; a transfer from two."""
    family = find_task(task).family
    data = write_rows(tmp_path, task, rows_of(family))
    settings = Settings(batch_size=4)
    options: dict[str, Any] = {"learning_rate": 3e-3, "seed": 0, "data": data, "source_data": data if task == "nq" else None}
    outcome = finetune(FinetuneRun(model=str(model), task=task, settings=settings, **options))
    assert outcome.steps == 6 and len(outcome.test_items) == 4
    assert 0 <= outcome.validation <= 1 and 0 <= outcome.test <= 1 and np.isfinite(outcome.train_loss)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "nowhere", "--task", "boolq", "--learning-rate", "1"], "--model nowhere: there is no such folder"),
        (["--model", "MODEL", "--task", "boolq", "--learning-rate", "0"], "--learning-rate is 0.0: it must be greater than 0"),
        (
            ["--model", "MODEL", "--task", "boolq", "--learning-rate", "1", "--packages", "no"],
            "run tools/fetch_demo_data.py --corpus boolq",
        ),
        (["--model", "MODEL", "--task", "boolq", "--learning-rate", "1", "--seed", "-1"], "--seed is -1: it must lie between"),
        (["--model", "MODEL", "--task", "glue", "--learning-rate", "1"], "invalid choice: 'glue'"),
    ],
)
def test_refusals(model: Path, arguments: list[str], message: str) -> None:
    refusal(run_tool("tools/finetune.py", *[model if word == "MODEL" else word for word in arguments]), message)


def test_a_task_of_another_name_is_no_task() -> None:
    with pytest.raises(UserError, match="the task is 'glue'"):
        find_task("glue")
    assert isinstance(find_task("sst2"), Task)
