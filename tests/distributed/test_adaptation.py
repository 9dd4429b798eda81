"""A decoder from Hugging Face becomes an encoder: training begins with its weights at every layout, and its line is on record."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint_files import read_run_file, seal
from megatron_ext.config_reading import from_dict
from megatron_ext.data.corpus import preprocess
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.doctor.checkpoint import check_checkpoint
from megatron_ext.errors import UserError
from megatron_ext.hf.checkpoint_reader import CheckpointReader
from megatron_ext.hf.export import export_checkpoint
from megatron_ext.hf.import_model import import_model
from megatron_ext.runtime.launch import run_on_ranks
from megatron_ext.train.checkpoint_logits import checkpoint_logits
from megatron_ext.train.preflight import prepare
from tests.conftest import Corpus
from tests.distributed.test_training import Run, run_training

BATCH, LENGTH, ROWS = 8, 64, 571
LAYOUTS = {"one rank": (1, {}), "TP2": (2, {"tensor": 2}), "PP2": (2, {"pipeline": 2}), "DP2": (2, {"distributed_optimizer": True})}
LOSS_TOLERANCE = 1e-5
"""Relative, float32 in another summation order."""


@pytest.fixture(scope="module")
def decoder(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with tied embeddings and more rows than its tokenizer has ids, as transformers writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("decoder") / "decoder"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, max_position_embeddings=128, tie_word_embeddings=True, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    load_tokenizer(corpus.tokenizer).to_fast().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def imported(decoder: Path) -> Path:
    """The decoder as a checkpoint."""
    import_model(decoder, decoder.parent / "imported", with_mask_token=True)
    return decoder.parent / "imported"


@pytest.fixture(scope="module")
def prefix(corpus: Corpus, imported: Path) -> Path:
    """The corpus in the decoder's own tokens."""
    preprocess([corpus.text], imported.parent / "data", imported / "tokenizer", workers=1, progress=False)
    return imported.parent / "data"


def config_tree(checkpoint: Path, prefix: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Two steps of CLM over whole rows, then two of MLM, with the weights of `checkpoint`."""
    return {
        "output_dir": str(output_dir),
        "data": {
            "tokenizer": str(checkpoint / "tokenizer"),
            "train": [{"prefix": str(prefix)}],
            "sequence_length": LENGTH,
            "documents_attend_across": True,
            "restart_positions": False,
        },
        "model": {"checkpoint": str(checkpoint)},
        "phases": [{"objective": "clm", "steps": 2}, {"objective": "mlm", "steps": 2}],
        "optimizer": {"learning_rate": 1e-3},
        "training": {"micro_batch_size": 2, "global_batch_size": BATCH, "log_interval": 1},
        "validation": {"interval": 0},
        "tracking": {"mlflow": False},
        "checkpoint": {"interval": 1},
        **changes,
    }


@pytest.fixture(scope="module")
def run(imported: Path, prefix: Path) -> Run:
    """A whole run on one rank."""
    folder = imported.parent / "run"
    return Run(folder, run_on_ranks(run_training, 1, [config_tree(imported, prefix, folder)])[0])


def first_loss(decoder: Path, tree: dict[str, Any], ranks: int) -> float:
    """Mean next-token loss of the first batch, as transformers computes it; a document's first token is not predicted."""
    from transformers import AutoModelForCausalLM

    data = prepare(from_dict(tree), ranks).training_data
    samples = [data.sample(index) for index in range(BATCH)]
    rows = torch.tensor([sample.tokens.tolist() for sample in samples])
    targets = rows.clone()
    for target, sample in zip(targets, samples, strict=True):
        target[sample.segment_lengths.cumsum()[:-1]] = -100
    model = AutoModelForCausalLM.from_pretrained(decoder).eval()
    with torch.no_grad():
        logits = model(rows).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()).item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_begins_where_transformers_is(layout: str, decoder: Path, imported: Path, prefix: Path, tmp_path: Path) -> None:
    ranks, parallel = LAYOUTS[layout]
    tree = config_tree(imported, prefix, tmp_path / "run", parallel=parallel)
    run_on_ranks(run_training, ranks, [{**tree, "training": {**tree["training"], "stop_at_step": 1}}])
    found = Run(tmp_path / "run", []).losses()[1, "loss"]
    assert found == pytest.approx(first_loss(decoder, tree, ranks), rel=LOSS_TOLERANCE)
    assert found > 6, "a random model: this batch is not what it was made for"


def test_a_restart_goes_on_bitwise_and_does_not_begin_again(run: Run, imported: Path, prefix: Path, tmp_path: Path) -> None:
    tree = config_tree(imported, prefix, tmp_path / "run", resume="auto")
    stopped = {**tree, "training": {**tree["training"], "stop_at_step": 2}}
    run_on_ranks(run_training, 1, [stopped, tree])
    assert Run(tmp_path / "run", []).shard_sums(4) == run.shard_sums(4)


def test_the_line_is_on_record_and_goes_on(run: Run, imported: Path, prefix: Path, tmp_path: Path) -> None:
    child = read_run_file(run.checkpoint(4))
    assert child["imported"] == read_run_file(imported)["imported"]
    assert child["parent"] == {"checkpoint": str(imported), "step": 0, "mlflow_run_id": None}
    assert [ancestor["checkpoint"] for ancestor in child["lineage"]] == [str(imported)]
    assert (child["vocab_size"], child["step"], child["tokens"]) == (ROWS, 4, 4 * BATCH * LENGTH)
    grandchild = config_tree(run.checkpoint(4), prefix, tmp_path / "again", phases=[{"objective": "mlm", "steps": 1}])
    run_on_ranks(run_training, 1, [grandchild])
    record = read_run_file(tmp_path / "again/checkpoints/step_00000001")
    assert [(ancestor["checkpoint"], ancestor["tokens"]) for ancestor in record["lineage"]] == [
        (str(imported), 0),
        (str(run.checkpoint(4)), child["tokens"]),
    ]
    assert (record["imported"], record["tokens"]) == (child["imported"], BATCH * LENGTH)
    notes = [json.loads(path.read_text()) for path in (run.checkpoint(4) / "branches").glob("*.json")]
    assert notes == [{"output_dir": str((tmp_path / "again").resolve())}], "its own run must keep it"


def test_each_phase_leaves_as_its_own_class(run: Run, tmp_path: Path) -> None:
    for step, architecture in ((2, "LlamaForCausalLM"), (4, "EuroBertForMaskedLM")):
        report = export_checkpoint(run.checkpoint(step), tmp_path / str(step), reference_logits=checkpoint_logits)
        assert report.architecture == architecture


def test_bf16_begins_with_the_weights_and_their_master_copies(imported: Path, prefix: Path, tmp_path: Path) -> None:
    tree = config_tree(imported, prefix, tmp_path / "run", optimizer={"learning_rate": 1e-30, "weight_decay": 0.0})
    tree["training"] = {**tree["training"], "stop_at_step": 1}
    tree["precision"] = {"recipe": "bf16"}
    run_on_ranks(run_training, 1, [tree])
    before, after = CheckpointReader(imported), CheckpointReader(tmp_path / "run/checkpoints/step_00000001")
    for key in before.tensors:
        wanted, found = before.read(key), after.read(key)[:ROWS]  # the embedding is padded
        assert torch.equal(found, wanted.to(torch.bfloat16)), key


def test_the_doctor_finds_imported_and_adapted_checkpoints_sound(run: Run, imported: Path) -> None:
    for checkpoint in (imported, run.checkpoint(4)):
        assert check_checkpoint(checkpoint).problems == []


def damage(checkpoint: Path) -> None:
    """Turn one bit of the largest file."""
    path = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": {"preset": "nano"}}, "give one of them"),
        ({"model": {"hidden_size": 128}}, "model.hidden_size is 128, but the weights in model.checkpoint have 64"),
        ({"data": {"tokenizer": None}}, "belongs to another tokenizer"),
        ({"model": {"checkpoint": "nowhere"}}, "checkpoint nowhere: there is no run.json"),
        ({"resume": "IMPORTED"}, "was imported, not trained: begin with its weights (model.checkpoint)"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], words: str, corpus: Corpus, imported: Path, prefix: Path, tmp_path: Path
) -> None:
    from megatron_ext.train.resume import check_resume

    tree = config_tree(imported, prefix, tmp_path / "run")
    for section, values in changes.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else str(imported)
    if "data" in changes:
        tree["data"] |= {"tokenizer": str(corpus.tokenizer), "train": [{"prefix": str(corpus.prefix)}]}
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
        config = from_dict(tree)
        prepare(config, 1)
        check_resume(config)


def test_a_damaged_beginning_is_named_and_nothing_is_written(imported: Path, prefix: Path, tmp_path: Path) -> None:
    import shutil

    import yaml

    shutil.copytree(imported, tmp_path / "imported")
    damage(tmp_path / "imported")
    tree = config_tree(tmp_path / "imported", prefix, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "pretrain_encoder.py", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "is damaged: " in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("checkpoints/*")) and not (tmp_path / "run/metrics.jsonl").exists()


def test_a_family_that_is_no_text_is_refused(imported: Path, tmp_path: Path) -> None:
    record = read_run_file(imported)
    (tmp_path / "run.json").write_text(json.dumps(seal({**record, "imported": {"family": ["llama"]}})))
    with pytest.raises(UserError, match=r"imported\.family is \['llama'\]: it must be text"):
        read_run_file(tmp_path)
