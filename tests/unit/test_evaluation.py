"""Heads, encodings and scores of fine-tuning: against transformers, scikit-learn's and SciPy's own words, and by hand."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import EuroBertForMaskedLM, EuroBertForTokenClassification

from megatron_ext.errors import UserError
from megatron_ext.evaluation.backbone import load_backbone
from megatron_ext.evaluation.encoding import IGNORED, pad
from megatron_ext.evaluation.finetune import FinetuneRun, finetune
from megatron_ext.evaluation.heads import SequenceClassifier, SpanFinder, TokenClassifier, mean_pool
from megatron_ext.evaluation.retrieval import SCALE, Embedder
from megatron_ext.evaluation.tasks import Task, find_task
from megatron_ext.evaluation.training import Settings, make_batches, predict, train_loop
from tests.unit.processes import refusal, run_tool


def batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return pad([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], 0)


# Attention


def test_bidirectional_is_eurobert_and_causal_sees_only_back(small_encoder: Path) -> None:
    """Changing the last token moves the hidden states before it in the one, and not in the other."""
    first, second = batch([[3, 4, 5, 6]])["input_ids"], batch([[3, 4, 5, 7]])["input_ids"]
    for attention, moves in (("bidirectional", True), ("causal", False)):
        encoder = load_backbone(small_encoder, attention).eval()
        with torch.no_grad():
            one, other = (encoder(input_ids=ids).last_hidden_state[0, :3] for ids in (first, second))
        assert torch.equal(one, other) != moves
    reference = EuroBertForMaskedLM.from_pretrained(small_encoder).eval().model
    with torch.no_grad():
        expected = reference(input_ids=first).last_hidden_state
        found = load_backbone(small_encoder, "bidirectional").eval()(input_ids=first).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_weights_that_are_not_there_are_not_drawn(small_encoder: Path, tmp_path: Path) -> None:
    """A folder whose weights have other names would be scored as if it had been trained."""
    shutil.copytree(small_encoder, tmp_path / "other")
    weights = load_file(small_encoder / "model.safetensors")
    renamed = {name.replace("self_attn", "attention"): value for name, value in weights.items()}
    save_file(renamed, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its files lack 8 weights, such as layers.0.self_attn"):
        load_backbone(tmp_path / "other", "bidirectional")
    (tmp_path / "other/model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(tmp_path / "other", "bidirectional")


@pytest.mark.parametrize("kind, sees_both_ways", [("BertModel", True), ("GPT2Model", False), ("MistralModel", False)])
def test_a_model_that_sees_only_back_is_no_encoder(kind: str, sees_both_ways: bool, tmp_path: Path) -> None:
    sizes = {"vocab_size": 25, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2} if kind == "MistralModel" else {}
    config = getattr(transformers, kind.replace("Model", "Config"))(**sizes)
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    if sees_both_ways:
        assert load_backbone(tmp_path, "bidirectional").config.model_type == "bert"
    else:
        with pytest.raises(UserError, match="that sees only back"):
            load_backbone(tmp_path, "bidirectional")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no config.json"):
        load_backbone(tmp_path, "bidirectional")


# Heads


def test_pooling_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    assert mean_pool(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 3.0]]


def test_token_classification_is_that_of_transformers(small_encoder: Path) -> None:
    theirs = EuroBertForTokenClassification.from_pretrained(small_encoder, num_labels=3).eval()
    ours = TokenClassifier(load_backbone(small_encoder, "bidirectional"), 3).eval()
    ours.head.load_state_dict(theirs.classifier.state_dict())
    rows = batch([[3, 4, 5], [6, 7]])
    labels = torch.tensor([[0, IGNORED, 2], [1, 1, IGNORED]])
    expected, found = theirs(**rows, labels=labels), ours(**rows, labels=labels)
    torch.testing.assert_close(found["logits"], expected.logits)
    torch.testing.assert_close(found["loss"], expected.loss)


def test_padding_changes_no_answer(small_encoder: Path) -> None:
    for head in (
        SequenceClassifier(load_backbone(small_encoder, "bidirectional"), 2),
        SpanFinder(load_backbone(small_encoder, "bidirectional")),
    ):
        head.eval()
        with torch.no_grad():
            alone, beside = head(**batch([[3, 4, 5]]))["logits"][0], head(**batch([[3, 4, 5], [3, 4, 5, 6, 7]]))["logits"][0]
        torch.testing.assert_close(beside[: len(alone)], alone)


def test_span_loss_is_the_mean_of_two_softmaxes(small_encoder: Path) -> None:
    head, rows = SpanFinder(load_backbone(small_encoder, "bidirectional")).eval(), batch([[3, 4, 5, 6]])
    found = head(**rows, start_positions=torch.tensor([1]), end_positions=torch.tensor([3]))
    scores = found["logits"][0].double()
    expected = -(scores[:, 0].log_softmax(0)[1] + scores[:, 1].log_softmax(0)[3]) / 2
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_retrieval_loss_is_infonce_over_the_batch(small_encoder: Path) -> None:
    embedder = Embedder(load_backbone(small_encoder, "bidirectional")).eval()
    rows = batch([[3, 4], [5, 6], [7], [8, 9], [10], [11, 12]])
    vectors = torch.nn.functional.normalize(embedder(**rows)["logits"], dim=-1)
    logits = SCALE * vectors[:3] @ vectors[3:].t()
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(3))
    texts = {name: tensor[3:] for name, tensor in rows.items()}
    queries = {"query_ids": rows["input_ids"][:3], "query_mask": rows["attention_mask"][:3]}
    torch.testing.assert_close(embedder(**texts, **queries)["loss"], expected)


def test_batches_hold_every_row_once_and_little_padding() -> None:
    generator = np.random.default_rng(1)
    lengths = generator.integers(5, 60, 1_000).tolist()
    batches = make_batches(lengths, Settings(batch_size=32), seed=3)
    assert [len(batch) for batch in batches] == [32] * 31
    rows = np.concatenate(batches)
    assert len(set(rows.tolist())) == 31 * 32
    padded, plain = (
        sum(max(lengths[row] for row in batch) * len(batch) for batch in parts)
        for parts in (batches, np.split(generator.permutation(1_000)[: 31 * 32], 31))
    )
    assert sum(lengths[row] for row in rows) <= padded < 0.7 * plain
    twice = np.concatenate(make_batches(lengths, Settings(batch_size=32, max_passes=2), seed=3))
    assert len(twice) == 2 * 31 * 32 and np.bincount(twice, minlength=1_000).max() == 2
    assert sorted(twice[: 31 * 32]) != sorted(twice[31 * 32 : 62 * 32])
    for rows, size in ((100, 32), (20, 32), (70, 8)):
        short = make_batches(lengths[:rows], Settings(batch_size=size, max_passes=9), seed=3)
        assert all(len(set(batch.tolist())) == len(batch) for batch in short), "no row meets itself"
    means = [np.mean([lengths[row] for row in batch]) for batch in batches]
    assert abs(np.corrcoef(means, np.arange(31))[0, 1]) < 0.5, "short and long batches take turns"
    again, other = (make_batches(lengths, Settings(batch_size=32), seed=seed) for seed in (3, 4))
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    assert any((a != b).any() for a, b in zip(batches, other, strict=True))


def test_products_are_bfloat16_where_asked_for_and_weights_never(small_encoder: Path) -> None:
    """bfloat16 keeps 8 bits: logits of a small model are off by more than float32's rounding and by less than 2 %."""
    head, device = TokenClassifier(load_backbone(small_encoder, "bidirectional"), 3), torch.device("cpu")
    features = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in ([1, 2, 0], [0, 2, 1, 1])]
    collate = partial(pad, pad_id=0)
    exact = head.double()(**batch([[0, 2, 1, 1]]))["logits"][0].detach()
    head.float()
    for precision, low, high in (("fp32", 0.0, 1e-5), ("bf16", 1e-4, 2e-2)):
        found = predict(head, features, Settings(precision=precision), device, collate)[1]
        error = (torch.from_numpy(found).double() - exact).norm() / exact.norm()
        assert low <= error < high, precision
    train_loop(head, features, [3, 4], Settings(precision="bf16", batch_size=1, max_passes=2), 1e-3, 0, device, collate)
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}


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


def test_a_run_learns_and_is_a_function_of_its_seed(small_encoder: Path, tmp_path: Path) -> None:
    data = str(write_reviews(tmp_path))
    runs = [
        FinetuneRun(
            model=str(small_encoder),
            task="rotten_tomatoes",
            learning_rate=1e-2,
            seed=seed,
            data=data,
            settings=Settings(batch_size=8),
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
def test_every_family_is_tuned_from_local_files(small_encoder: Path, tmp_path: Path, task: str) -> None:
    """The paper's tasks, from somebody's own copy; a transfer from two."""
    family = find_task(task).family
    data = write_rows(tmp_path, task, rows_of(family))
    settings = Settings(batch_size=4)
    options: dict[str, Any] = {"learning_rate": 3e-3, "seed": 0, "data": data, "source_data": data if task == "nq" else None}
    outcome = finetune(FinetuneRun(model=str(small_encoder), task=task, settings=settings, **options))
    queries = 2  # of the four rows' two people, each with two answers
    assert outcome.steps == 6 and len(outcome.test_items) == (queries if family == "ir" else 4)
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
def test_refusals(small_encoder: Path, arguments: list[str], message: str) -> None:
    refusal(run_tool("tools/finetune.py", *[small_encoder if word == "MODEL" else word for word in arguments]), message)


def test_a_task_of_another_name_is_no_task() -> None:
    with pytest.raises(UserError, match="the task is 'glue'"):
        find_task("glue")
    assert isinstance(find_task("sst2"), Task)
