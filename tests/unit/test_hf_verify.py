"""Verification: each check against an export that was broken on purpose; only what is known to differ passes, counted."""

import json
import random
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from safetensors.torch import load_file, save_file

from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.data.tokenizer_training import train_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.hf import export as export_module
from megatron_ext.hf import weight_map
from megatron_ext.hf.checkpoint_reader import CheckpointReader
from megatron_ext.hf.export import export_checkpoint
from megatron_ext.hf.families import FAMILIES
from megatron_ext.hf.import_model import import_model
from megatron_ext.hf.verify import LIMIT, VerificationError
from megatron_ext.hf.verify_tokenizer import compare_tokenizers, reordered_places, verification_cases, verification_texts
from megatron_ext.hf.verify_weights import check_layout, compare_weights
from megatron_ext.train.checkpoint_logits import checkpoint_logits
from tests.unit.hf_models import RECIPES, write_model

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_texts(path: Path) -> None:
    """Running text in every script of the verification, with runs of blanks and signs, as JSON lines."""
    generator = random.Random(0)
    words = " ".join(verification_texts()).split()
    with open(path, "w") as file:
        for index in range(400):
            text = " ".join(generator.choice(words) for _ in range(12))
            if index % 3 == 0:
                text = " " * generator.randint(1, 30) + text + " " * generator.randint(0, 20)
            if index % 5 == 0:
                text += "-" * generator.randint(2, 20) + "=" * generator.randint(2, 20) + "\t" * 3
            file.write(json.dumps({"text": text}) + "\n")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.jsonl"
    write_texts(path)
    return path


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained_tokenizer(request: pytest.FixtureRequest, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tools/train_tokenizer.py` makes."""
    prefix = tmp_path_factory.mktemp("tokenizer") / request.param
    train_tokenizer([texts], prefix, vocab_size=800, model_type=request.param)
    return Path(f"{prefix}.model")


@pytest.fixture(scope="module")
def checkpoint(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with grouped queries and padding in its vocabulary."""
    folder = tmp_path_factory.mktemp("model")
    prefix = folder / "tokenizer"
    train_tokenizer([texts], prefix, vocab_size=800, model_type="bpe")
    write_model(folder / "hf", RECIPES["eurobert"], tokenizer=load_tokenizer(Path(f"{prefix}.model")).to_fast())
    import_model(folder / "hf", folder / "checkpoint")
    return folder / "checkpoint"


def test_the_cases_hold_what_they_should() -> None:
    text = {case.name: case.text for case in verification_cases()}
    joined = "".join(text.values())
    assert text["empty"] == "" and "\0" in joined and "\u200d" in joined and "\u202b" in joined and "\U0010fffd" in joined
    assert unicodedata.normalize("NFC", text["accents decomposed"]) == unicodedata.normalize("NFC", text["accents composed"])
    assert text["accents decomposed"] != text["accents composed"]
    assert any(case.text != case.text.strip() for case in verification_cases())


def test_tokenizers_of_the_project_leave_with_the_same_ids(trained_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(trained_tokenizer)
    tokenizer.to_fast().save_pretrained(tmp_path / "fast")
    report = compare_tokenizers(tmp_path / "fast", tokenizer)
    assert (report.texts, report.cases, report.renormalized) == (13, len(verification_cases()), 0)
    assert (report.reordered > 0) is (trained_tokenizer.stem == "unigram")


def test_a_folder_leaves_exactly_as_it_was(trained_tokenizer: Path, tmp_path: Path) -> None:
    load_tokenizer(trained_tokenizer).to_fast().save_pretrained(tmp_path / "folder")
    tokenizer = load_tokenizer(tmp_path / "folder")
    tokenizer.to_fast().save_pretrained(tmp_path / "fast")
    report = compare_tokenizers(tmp_path / "fast", tokenizer)
    assert (report.reordered, report.renormalized) == (0, 0)


@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
def test_only_a_normalization_table_excuses_decomposed_letters(rule: str, texts: Path, tmp_path: Path) -> None:
    import sentencepiece

    lines = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "model"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name=rule,
        control_symbols=["[MASK]"],
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "model.model")
    tokenizer.to_fast().save_pretrained(tmp_path / "fast")
    assert (compare_tokenizers(tmp_path / "fast", tokenizer).renormalized > 0) is (rule == "nmt_nfkc")


class Spelled:
    """A tokenizer whose ids are letters."""

    def piece(self, index: int) -> str:
        return {1: "a", 2: "aa", 3: "b", 4: "ab", 5: "ba"}[index]


@pytest.mark.parametrize(
    ("trained", "exported", "places"),
    [
        ([3, 1, 2, 3], [3, 2, 1, 3], 1),
        ([1, 2, 3, 1, 2], [2, 1, 3, 2, 1], 2),
        ([1, 3], [3, 1], None),  # another text
        ([1, 1, 1], [2, 1], None),  # other pieces
        ([4, 1], [1, 5], None),  # the same text in other pieces
        ([1, 2], [2, 2], None),
    ],
)
def test_only_the_order_of_equal_pieces_is_excused(trained: list[int], exported: list[int], places: int | None) -> None:
    assert reordered_places(Spelled(), trained, exported) == places  # type: ignore[arg-type]


def lose_spaces(pipeline: dict[str, Any]) -> None:
    pipeline["normalizer"] = {"type": "Replace", "pattern": {"Regex": " {3,}"}, "content": "\u2581\u2581"}


def lower(pipeline: dict[str, Any]) -> None:
    pipeline["normalizer"] = {"type": "Sequence", "normalizers": [pipeline["normalizer"], {"type": "Lowercase"}]}


def compose(pipeline: dict[str, Any]) -> None:
    pipeline["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, pipeline["normalizer"]]}


def without_a_merge(pipeline: dict[str, Any]) -> None:
    if pipeline["model"]["type"] == "BPE":
        del pipeline["model"]["merges"][20]
    else:
        pipeline["model"]["vocab"][300][1] -= 50.0


@pytest.mark.parametrize("change", [lose_spaces, lower, compose, without_a_merge])
def test_an_altered_tokenizer_is_caught(change: Callable[[dict[str, Any]], None], trained_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(trained_tokenizer)
    tokenizer.to_fast().save_pretrained(tmp_path / "fast")
    path = tmp_path / "fast/tokenizer.json"
    pipeline = json.loads(path.read_text())
    change(pipeline)
    path.write_text(json.dumps(pipeline))
    with pytest.raises(VerificationError, match="gives other ids than"):
        compare_tokenizers(tmp_path / "fast", tokenizer)


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change a folder's weights on disk, behind the converter's back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def swap_rows(tensors: Tensors) -> None:
    weight = tensors["model.layers.2.self_attn.k_proj.weight"]
    weight[[5, 6]] = weight[[6, 5]]


def compensate(tensors: Tensors) -> None:
    """Twice the values, half their projection: the same function in other weights."""
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 2
    tensors["model.layers.1.self_attn.o_proj.weight"] /= 2


def scale(tensors: Tensors) -> None:
    tensors["model.norm.weight"] *= 1.0001


def exchange(tensors: Tensors) -> None:
    names = [f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up")]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def poison(tensors: Tensors) -> None:
    tensors["model.layers.3.mlp.down_proj.weight"][1, 1] = float("nan")


def turn_last_row(tensors: Tensors) -> None:
    """The same norm, another row."""
    tensors["lm_head.weight"][-1] *= -1


def pad(tensors: Tensors) -> None:
    weight = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = torch.cat([weight, torch.zeros(21, weight.shape[1])])


def drop(tensors: Tensors) -> None:
    del tensors["model.layers.0.input_layernorm.weight"]


def add(tensors: Tensors) -> None:
    tensors["model.extra.weight"] = torch.zeros(2)


def halve(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()


CHANGES = {
    swap_rows: r"row [56] of model\.layers\.2\.self_attn\.k_proj\.weight has the norm",
    compensate: r"row 0 of model\.layers\.1\.self_attn\.(v|o)_proj\.weight has the norm|row \d+ of model\.layers\.1\.self_attn",
    scale: r"of model\.norm\.weight has the norm",
    exchange: r"of model\.layers\.0\.mlp\.gate_proj\.weight has the norm",
    poison: r"model\.layers\.3\.mlp\.down_proj\.weight holds NaN or infinity",
    turn_last_row: r"row 1002 of lm_head\.weight is not the checkpoint's",
    pad: r"lm_head\.weight has 1024 rows for the vocabulary of 1003",
    drop: r"model\.layers\.0\.input_layernorm\.weight is missing",
    add: r"model\.extra\.weight is one too many",
    halve: r"model\.norm\.weight is stored as F16, not F32",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_each_weight_check_alone(change: Callable[[Tensors], None], checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "model")
    reader, family = CheckpointReader(checkpoint), FAMILIES["eurobert"]
    check_layout(tmp_path / "model", reader, family, torch.float32)
    report = compare_weights(tmp_path / "model", reader, family, dtype=torch.float32)
    expected = load_file(tmp_path / "model/model.safetensors")
    assert (report.tensors, report.parameters) == (len(expected), sum(tensor.numel() for tensor in expected.values()))
    norm = torch.cat([tensor.flatten() for tensor in expected.values()]).double().norm().item()
    assert report.norm == pytest.approx(norm, rel=1e-12) and report.max_norm_change < 1e-12
    rewrite(tmp_path / "model", change)
    with pytest.raises(VerificationError, match=CHANGES[change]):
        check_layout(tmp_path / "model", reader, family, torch.float32)
        compare_weights(tmp_path / "model", reader, family, dtype=torch.float32)


@pytest.mark.parametrize("change", [compensate, turn_last_row, pad, drop, scale], ids=lambda change: change.__name__)
def test_a_broken_export_leaves_nothing(
    change: Callable[[Tensors], None], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export_module.write_weights

    def write_wrongly(folder: Path, *arguments: Any) -> tuple[str, ...]:
        names = write(folder, *arguments)
        rewrite(folder, change)
        return names

    monkeypatch.setattr(export_module, "write_weights", write_wrongly)
    with pytest.raises(VerificationError):
        export_checkpoint(checkpoint, tmp_path / "model", reference_logits=checkpoint_logits)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_compute_the_same_are_told_apart_by_their_norms(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits cannot see it; so the norms are no second name for the first check."""
    write = export_module.write_weights

    def write_wrongly(folder: Path, *arguments: Any) -> tuple[str, ...]:
        names = write(folder, *arguments)
        rewrite(folder, compensate)
        return names

    monkeypatch.setattr(export_module, "write_weights", write_wrongly)
    with pytest.raises(VerificationError, match="has the norm"):
        export_checkpoint(checkpoint, tmp_path / "model", reference_logits=checkpoint_logits)


def test_an_import_is_compared_with_its_folder(checkpoint: Path, tmp_path: Path) -> None:
    folder, family = checkpoint.parent / "hf", FAMILIES["eurobert"]
    reader = CheckpointReader(checkpoint)
    assert compare_weights(folder, reader, family).max_norm_change < 1e-12
    (tmp_path / "hf").mkdir()
    for path in folder.iterdir():
        (tmp_path / "hf" / path.name).write_bytes(path.read_bytes())
    rewrite(tmp_path / "hf", compensate)
    with pytest.raises(VerificationError, match="has the norm"):
        compare_weights(tmp_path / "hf", reader, family)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights_are_compared_with_the_rounded_checkpoint(dtype: torch.dtype, checkpoint: Path, tmp_path: Path) -> None:
    report = export_checkpoint(checkpoint, tmp_path / "model", dtype=dtype, reference_logits=checkpoint_logits)
    exact, rounded = report.verifications
    assert max(exact.max_abs_diff, rounded.max_abs_diff) < LIMIT
    assert max(exact.weight_report.max_norm_change, rounded.weight_report.max_norm_change) < 1e-12
    assert exact.weight_report.norm != rounded.weight_report.norm
    assert {tensor.dtype for tensor in load_file(tmp_path / "model/model.safetensors").values()} == {dtype}


def test_float16_is_refused_where_a_weight_overflows(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in (checkpoint.parent / "hf").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for value, overflows in ((65519.0, False), (7e4, True)):  # the first is rounded to the largest, 65504

        def put(tensors: Tensors, value: float = value) -> None:
            tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = value

        rewrite(folder, put)
        import_model(folder, tmp_path / f"checkpoint-{overflows}")
        if not overflows:
            export_checkpoint(tmp_path / f"checkpoint-{overflows}", tmp_path / "model", dtype=torch.float16)
            continue
        message = r"largest number is 65504, but .* has 70000 in decoder\.layers\.0\.mlp\.linear_fc2\.weight: .* bfloat16 or"
        with pytest.raises(UserError, match=message):
            export_checkpoint(tmp_path / f"checkpoint-{overflows}", tmp_path / "refused", dtype=torch.float16)
    assert not (tmp_path / "refused").exists()


def test_rows_of_padding_are_caught(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = CheckpointReader(checkpoint)
    tensors = {key: reader.read(key) for key in reader.tensors}
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[key] = torch.nn.functional.pad(tensors[key], (0, 0, 0, 21), value=3.0)
    folder = tmp_path / "checkpoint"
    distributed_checkpoint.save(tensors, checkpoint_id=folder, no_dist=True)
    shutil.copytree(checkpoint / "tokenizer", folder / "tokenizer")
    record = json.loads((checkpoint / "run.json").read_text()) | {"padded_vocab_size": 1024, "files": {}}
    (folder / "run.json").write_text(json.dumps({key: value for key, value in record.items() if key != "record_sha256"}))

    def reference(path: Path, rows: list[list[int]]) -> list[torch.Tensor]:
        return checkpoint_logits(checkpoint, rows)

    report = export_checkpoint(folder, tmp_path / "model", reference_logits=reference)
    assert report.verifications[0].weight_report.parameters == report.parameters
    monkeypatch.setattr(weight_map.StripVocabularyPadding, "to_hf", lambda self, tensor: (tensor[:1004],))
    monkeypatch.setattr(weight_map.StripVocabularyPadding, "hf_shapes", property(lambda self: ((1004, self.hidden_size),)))
    with pytest.raises(VerificationError, match="has 1004 rows for the vocabulary of 1003"):
        export_checkpoint(folder, tmp_path / "wrong", reference_logits=reference)
    assert not (tmp_path / "wrong").exists()
