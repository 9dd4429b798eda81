"""Export: equal to an independent forward pass and to the trained model itself, and not fooled by a wrong one.

Run as a script, this file writes a checkpoint with megatron's own writer (which needs a guarded entry point).
"""

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint

from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.hf import weight_map
from megatron_ext.hf.export import export_checkpoint
from megatron_ext.hf.families import FAMILIES
from megatron_ext.hf.verify import LIMIT, VerificationError, verification_rows, verification_texts
from megatron_ext.model.presets import EncoderConfig
from tests.unit.hf_models import weights_of
from tests.unit.hf_tokenizers import WRITERS

ROOT = Path(__file__).parents[2]
VOCAB_SIZE, PADDED_VOCAB_SIZE = 1003, 1024
GROUPED = EncoderConfig(
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=16,
    rotary_base=5_000.0,
    max_position_embeddings=128,
)
TIED = dataclasses.replace(GROUPED, num_query_groups=6, head_dim=8, tie_embeddings=True)
BIASED = dataclasses.replace(GROUPED, qkv_bias=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These matrices are too small for more, and threads that wait for a busy core take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A SentencePiece model with 1003 pieces."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    words = " ".join(verification_texts()).split()
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(words[i] for i in torch.randint(len(words), (12,), generator=generator)) for _ in range(300)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        pad_id=3,
        control_symbols=["[MASK]"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def random_tensors(encoder, dtype=torch.float32):
    """Tensors under megatron's keys, large enough that a misplaced row shows."""
    generator = torch.Generator().manual_seed(1)
    mappings = weight_map.build_mappings(encoder, VOCAB_SIZE, PADDED_VOCAB_SIZE)
    tensors = {}
    for mapping in mappings:
        tensor = torch.randn(mapping.converter.megatron_shape, generator=generator) * 0.15
        tensors[mapping.megatron_key] = (tensor + 1 if tensor.dim() == 1 else tensor).to(dtype)
    return tensors


def write_run_json(folder, encoder, causal, tokenizer_file):
    """A run.json as training writes it, and the tokenizer."""
    shutil.copy(tokenizer_file, folder / "tokenizer.model")
    phases = [{"name": "0-clm", "start_step": 0, "end_step": 30}, {"name": "1-mlm", "start_step": 30, "end_step": 40, "ratio": 0.4}]
    counters = {"samples": 640, "tokens": 123456, "predicted_tokens": 98765, "flops": 1e9}
    names = {"phase": "1-mlm", "parent": None, "mlflow_run_id": None, "run_key": None}
    objects = {"parallel": {}, "versions": {}, "files": {}, "data": []}
    run = {
        "format": 1,
        **counters,
        **names,
        **objects,
        "comparison_mask_ratio": 0.4,
        "config": {"training": {"precision": "fp32"}, "data": {}},
        "encoder": dataclasses.asdict(encoder),
        "vocab_size": VOCAB_SIZE,
        "padded_vocab_size": PADDED_VOCAB_SIZE,
        "causal": causal,
        "step": 40,
        "phases": phases,
        "tokenizer": {"path": "tokenizer.model", "fingerprint": load_tokenizer(tokenizer_file).fingerprint},
    }
    (folder / "run.json").write_text(json.dumps(run))


def write_checkpoint(folder, tokenizer_file, *, encoder=GROUPED, causal=False, tensors=None):
    """A checkpoint directory with the trained model's tensors, an optimizer's, and an object."""
    folder.mkdir()
    state = dict(random_tensors(encoder) if tensors is None else tensors)
    state["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(encoder.hidden_size)
    state["decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1"] = {"recipe": None}
    distributed_checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    write_run_json(folder, encoder, causal, tokenizer_file)
    return folder


def dense_logits(encoder, causal, tensors=None):
    """A forward pass of its own: explicit heads, rotation by complex numbers, masked softmax."""
    weights = {key: tensor.double() for key, tensor in (random_tensors(encoder) if tensors is None else tensors).items()}
    heads, groups, width = encoder.num_attention_heads, encoder.num_query_groups, encoder.head_dim

    def norm(hidden, weight):
        return hidden / (hidden.pow(2).mean(-1, keepdim=True) + encoder.norm_epsilon).sqrt() * weight

    def rotate(states):
        length = states.shape[0]
        frequency = encoder.rotary_base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.polar(torch.ones(length, width // 2).double(), torch.arange(length)[:, None] * frequency)
        turned = torch.complex(states[:, : width // 2].contiguous(), states[:, width // 2 :].contiguous()) * angle
        return torch.cat([turned.real, turned.imag], dim=1)

    def attention(hidden, qkv, bias):
        rows = (hidden @ qkv.t() + bias).split(width, dim=1)
        outputs = []
        for head in range(heads):
            group, place = divmod(head, heads // groups)
            start = group * (heads // groups + 2)
            query, key, value = rows[start + place], rows[start + heads // groups], rows[start + heads // groups + 1]
            scores = rotate(query) @ rotate(key).t() / width**0.5
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            outputs.append(scores.softmax(dim=1) @ value)
        return torch.cat(outputs, dim=1)

    def forward(row):
        hidden = weights["embedding.word_embeddings.weight"][torch.tensor(row)]
        for index in range(encoder.num_layers):
            layer = {key.split(".", 3)[3]: weights[key] for key in weights if key.startswith(f"decoder.layers.{index}.")}
            normed = norm(hidden, layer["self_attention.linear_qkv.layer_norm_weight"])
            bias = layer.get("self_attention.linear_qkv.bias", torch.zeros(1).double())
            attended = attention(normed, layer["self_attention.linear_qkv.weight"], bias)
            hidden = hidden + attended @ layer["self_attention.linear_proj.weight"].t()
            normed = norm(hidden, layer["mlp.linear_fc1.layer_norm_weight"])
            inner = normed @ layer["mlp.linear_fc1.weight"].t()
            gate, up = inner[:, : encoder.ffn_hidden_size], inner[:, encoder.ffn_hidden_size :]
            hidden = hidden + (gate * torch.sigmoid(gate) * up) @ layer["mlp.linear_fc2.weight"].t()
        hidden = norm(hidden, weights["decoder.final_layernorm.weight"])
        head = weights["embedding.word_embeddings.weight" if encoder.tie_embeddings else "output_layer.weight"]
        return (hidden @ head[:VOCAB_SIZE].t()).float()

    return lambda checkpoint, rows: [forward(row) for row in rows]


@pytest.mark.parametrize("encoder", [GROUPED, TIED, BIASED], ids=["grouped", "tied", "biased"])
@pytest.mark.parametrize(("causal", "architecture"), [(False, "EuroBertForMaskedLM"), (True, "LlamaForCausalLM")])
def test_export_equals_an_independent_forward_pass(tmp_path, tokenizer_file, encoder, causal, architecture):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file, encoder=encoder, causal=causal)
    report = export_checkpoint(checkpoint, tmp_path / "model", reference_logits=dense_logits(encoder, causal))
    (measured,) = report.verifications
    assert report.architecture == architecture
    assert measured.max_abs_diff < LIMIT
    assert (measured.first_position_change == 0) is causal
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["architectures"] == [architecture]
    assert (config["vocab_size"], config["head_dim"], config["dtype"]) == (VOCAB_SIZE, encoder.head_dim, "float32")
    assert config["rope_parameters"]["rope_theta"] == 5000.0
    assert (tmp_path / "model/generation_config.json").exists() is causal
    card = (tmp_path / "model/README.md").read_text()
    assert "| 1-mlm | 30 | 40 | 0.4 |" in card and "123,456" in card and "float32" in card
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1, "the weights are as readable as the rest"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]


def test_biases_leave_as_llama_because_qwen2_would_cut_texts_in_another_way(tmp_path, tokenizer_file):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file, encoder=BIASED, causal=True)
    assert export_checkpoint(checkpoint, tmp_path / "model").architecture == "LlamaForCausalLM"
    assert json.loads((tmp_path / "model/config.json").read_text())["attention_bias"] is True
    weights = weights_of(tmp_path / "model")
    assert weights["model.layers.1.self_attn.q_proj.bias"].any() and not weights["model.layers.1.self_attn.o_proj.bias"].any()
    with pytest.raises(UserError, match="tokenizer as a Qwen2Tokenizer, which would give other ids") as caught:
        export_checkpoint(checkpoint, tmp_path / "qwen2", family="qwen2")
    assert "\n" not in str(caught.value) and not (tmp_path / "qwen2").exists()


@pytest.mark.parametrize(("name", "fits"), [("qwen", True), ("llama 3", False), ("llama 2", False)])
def test_qwen2_takes_the_tokenizers_that_its_class_reads_as_they_are(tmp_path, name, fits):
    WRITERS[name](tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    if fits:
        FAMILIES["qwen2"].check_tokenizer(tokenizer)
    else:
        with pytest.raises(UserError, match="cannot go with the family qwen2"):
            FAMILIES["qwen2"].check_tokenizer(tokenizer)
    for family in FAMILIES.values():
        if family.name != "qwen2":
            family.check_tokenizer(tokenizer)


def test_pipelines_run_on_the_exported_folder(tmp_path, tokenizer_file):
    from transformers import pipeline

    for causal in (False, True):
        checkpoint = write_checkpoint(tmp_path / f"checkpoint-{causal}", tokenizer_file, causal=causal)
        export_checkpoint(checkpoint, tmp_path / f"model-{causal}")
    fill = pipeline("fill-mask", model=str(tmp_path / "model-False"), device="cpu")
    assert fill.tokenizer.model_max_length == 128
    assert len(fill("All human beings are born [MASK] and equal.")) == 5
    generate = pipeline("text-generation", model=str(tmp_path / "model-True"), device="cpu")
    assert generate("All human beings", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("All human beings")


def test_causal_checkpoint_leaves_as_eurobert_compared_under_its_mask(tmp_path, tokenizer_file):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file, causal=True)
    report = export_checkpoint(checkpoint, tmp_path / "model", family="eurobert", reference_logits=dense_logits(GROUPED, True))
    assert report.architecture == "EuroBertForMaskedLM"
    assert report.verifications[0].max_abs_diff < LIMIT
    assert report.verifications[0].first_position_change > 1e-3
    assert "not trained to do" in (tmp_path / "model/README.md").read_text()


def test_weights_in_several_files_load_as_one_model(tmp_path, tokenizer_file):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file)
    report = export_checkpoint(
        checkpoint, tmp_path / "model", max_shard_size="100KB", reference_logits=dense_logits(GROUPED, causal=False)
    )
    assert len(report.weight_files) > 2
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(report.weight_files)
    stored = sum((tmp_path / "model" / name).stat().st_size for name in report.weight_files)
    assert 0 < stored - index["metadata"]["total_size"] < 10_000


def test_hugging_face_tokenizer_folder_is_carried_over(tmp_path, tokenizer_file):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file)
    load_tokenizer(tokenizer_file).to_fast().save_pretrained(checkpoint / "tokenizer")
    run = json.loads((checkpoint / "run.json").read_text())
    run["tokenizer"] = {"path": "tokenizer", "fingerprint": load_tokenizer(checkpoint / "tokenizer").fingerprint}
    (checkpoint / "run.json").write_text(json.dumps(run))
    report = export_checkpoint(checkpoint, tmp_path / "model", reference_logits=dense_logits(GROUPED, causal=False))
    assert report.verifications[0].texts == len(verification_texts())


def test_rounding_to_bfloat16_is_verified_before_and_after(tmp_path, tokenizer_file):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file)
    reference = dense_logits(GROUPED, causal=False)
    report = export_checkpoint(checkpoint, tmp_path / "model", dtype=torch.bfloat16, reference_logits=reference)
    exact, rounded = report.verifications
    assert (exact.weights, rounded.weights) == ("float32", "bfloat16")
    assert max(exact.max_abs_diff, rounded.max_abs_diff) < LIMIT < report.rounding[1] < report.rounding[0]
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"


def test_bfloat16_training_stays_bfloat16_within_the_exact_limit(tmp_path, tokenizer_file):
    tensors = random_tensors(GROUPED, torch.bfloat16)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file, tensors=tensors)
    report = export_checkpoint(checkpoint, tmp_path / "model", reference_logits=dense_logits(GROUPED, False, tensors))
    assert [checked.weights for checked in report.verifications] == ["bfloat16"]
    assert report.rounding is None


def contiguous_qkv(converter, tensor):
    """As if the rows were all queries, then all keys, then all values."""
    return tensor.split([shape[0] for shape in converter.hf_shapes])


def up_before_gate(converter, tensor):
    """The two halves exchanged."""
    return tensor.split(converter.ffn_hidden_size)[::-1]


def shifted_rows(converter, tensor):
    """Each token with its neighbour's embedding."""
    return (tensor[1 : converter.vocab_size + 1],)


@pytest.mark.parametrize(
    ("converter", "mistake"),
    [("SplitQKV", contiguous_qkv), ("SplitGateUp", up_before_gate), ("StripVocabularyPadding", shifted_rows)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_layout_is_caught_and_leaves_nothing(tmp_path, tokenizer_file, monkeypatch, converter, mistake, dtype):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file)
    monkeypatch.setattr(getattr(weight_map, converter), "to_hf", mistake)
    with pytest.raises(VerificationError, match=r"largest difference of a logit .* is \d"):
        export_checkpoint(checkpoint, tmp_path / "model", dtype=dtype, reference_logits=dense_logits(GROUPED, causal=False))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_reference_of_the_other_direction_is_caught(tmp_path, tokenizer_file):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file)
    with pytest.raises(VerificationError, match="largest difference"):
        export_checkpoint(checkpoint, tmp_path / "model", reference_logits=dense_logits(GROUPED, causal=True))


def test_encoder_that_silently_runs_causal_is_caught(tmp_path, tokenizer_file, monkeypatch):
    from transformers.models.eurobert import modeling_eurobert

    def causal_mask(config, inputs_embeds, attention_mask, **kwargs):
        length = inputs_embeds.shape[1]
        return torch.ones(1, 1, length, length, dtype=torch.bool).tril()

    monkeypatch.setattr(modeling_eurobert, "create_bidirectional_mask", causal_mask)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file, causal=True)
    with pytest.raises(VerificationError, match="does not see the last token"):
        export_checkpoint(checkpoint, tmp_path / "model", family="eurobert", reference_logits=dense_logits(GROUPED, causal=True))


def test_nan_logits_are_no_small_difference(tmp_path, tokenizer_file):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file)
    with pytest.raises(VerificationError, match="is nan"):
        export_checkpoint(
            checkpoint,
            tmp_path / "model",
            reference_logits=lambda path, rows: [torch.full((len(row), VOCAB_SIZE), float("nan")) for row in rows],
        )


def with_nan(tensors):
    tensors["decoder.layers.1.mlp.linear_fc2.weight"][3, 5] = float("nan")


def without_projection(tensors):
    del tensors["decoder.layers.0.self_attention.linear_proj.weight"]


def with_leftover(tensors):
    tensors["decoder.layers.0.self_attention.q_layernorm.weight"] = torch.ones(16)


def with_other_shape(tensors):
    tensors["decoder.layers.0.mlp.linear_fc1.weight"] = torch.ones(158, 48)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_nan, r"decoder\.layers\.1\.mlp\.linear_fc2\.weight holds NaN"),
        (without_projection, r"lacks decoder\.layers\.0\.self_attention\.linear_proj\.weight$"),
        (with_leftover, r"beyond the encoder's tensors, decoder\.layers\.0\.self_attention\.q_layernorm\.weight$"),
        (with_other_shape, r"linear_fc1\.weight has the shape \[158, 48\], run\.json's encoder asks for \[160, 48\]"),
    ],
)
def test_damaged_tensors_are_named(tmp_path, tokenizer_file, damage, message):
    tensors = random_tensors(GROUPED)
    damage(tensors)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file, tensors=tensors)
    with pytest.raises(UserError, match=message):
        export_checkpoint(checkpoint, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_impossible_requests_are_refused(tmp_path, tokenizer_file):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file)
    with pytest.raises(UserError, match="last step was bidirectional"):
        export_checkpoint(checkpoint, tmp_path / "model", family="llama")
    with pytest.raises(UserError, match="'5 parsec'"):
        export_checkpoint(checkpoint, tmp_path / "model", max_shard_size="5 parsec")
    with pytest.raises(UserError, match=r"no run\.json"):
        export_checkpoint(tmp_path, tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        export_checkpoint(checkpoint, tmp_path / "full")
    run = json.loads((checkpoint / "run.json").read_text())
    run["tokenizer"]["fingerprint"] = "0" * 64
    (checkpoint / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match="not the one that the data was made with"):
        export_checkpoint(checkpoint, tmp_path / "model")


def test_truncated_tensor_file_is_an_error_of_one_line(tmp_path, tokenizer_file):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file)
    (shards,) = checkpoint.glob("*.distcp")
    shards.write_bytes(shards.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"cannot be read \(") as caught:
        export_checkpoint(checkpoint, tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_command_fails_with_code_1_when_verification_does(tmp_path, tokenizer_file, monkeypatch, capsys):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_file)
    module = type(sys)("megatron_ext.train.checkpoint_logits")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "export", str(checkpoint), str(tmp_path / "model")])
    for causal, code in ((True, 1), (False, 0)):
        module.checkpoint_logits = dense_logits(GROUPED, causal)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "tools/convert_checkpoint.py"), run_name="__main__")
        assert stopped.value.code == code
        assert (tmp_path / "model").exists() is (code == 0)
    captured = capsys.readouterr()
    assert "error: verification failed: the largest difference of a logit" in captured.err
    assert "verified as float32: largest difference of a logit" in captured.out


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer_file):
    """A checkpoint of the real model, written by megatron, and its logits in both directions."""
    folder = tmp_path_factory.mktemp("trained")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(folder), str(tokenizer_file)], check=True, env=environment, cwd=folder)
    return folder


@pytest.mark.parametrize("causal", [False, True])
def test_export_equals_the_model_that_megatron_saved(tmp_path, tokenizer_file, trained, causal):
    checkpoint = trained / "checkpoint"
    write_run_json(checkpoint, GROUPED, causal, tokenizer_file)
    reference = torch.load(trained / f"logits-{causal}.pt")
    report = export_checkpoint(checkpoint, tmp_path / "model", reference_logits=lambda path, rows: reference)
    assert report.verifications[0].max_abs_diff < LIMIT
    assert report.verifications[0].tokens > 500


def test_export_needs_no_megatron(tmp_path, trained):
    code = (
        "import runpy, sys; sys.modules['megatron'] = None; sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    tool = [
        str(ROOT / "tools/convert_checkpoint.py"),
        "export",
        str(trained / "checkpoint"),
        str(tmp_path / "model"),
        "--no-verify",
    ]
    result = subprocess.run([sys.executable, "-c", code, *tool], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    assert "Not verified" in (tmp_path / "model/README.md").read_text()


def save_with_megatron(folder, tokenizer_file):
    """Build the encoder on one rank, save it with megatron's dist_checkpointing, and run it on the verification rows."""
    from megatron_ext.runtime.cpu import patch_megatron

    patch_megatron()
    from megatron.core import dist_checkpointing
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_ext.config import ParallelConfig, TrainingConfig
    from megatron_ext.data.batch import collate
    from megatron_ext.model.encoder import EncoderModel
    from megatron_ext.model.layers import transformer_config
    from megatron_ext.objective import OBJECTIVES, Example
    from megatron_ext.runtime.backend import choose_backend
    from megatron_ext.runtime.topology import check_layout, initialize

    backend = choose_backend("local")
    layout = check_layout(ParallelConfig(), TrainingConfig(), GROUPED.num_layers, {}, 1)
    initialize(layout, backend)
    model_parallel_cuda_manual_seed(0)
    config = transformer_config(GROUPED, layout, backend.layers, torch.float32)
    model = EncoderModel(config, GROUPED, backend.layers, VOCAB_SIZE, PADDED_VOCAB_SIZE)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.15 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + 1 if parameter.dim() == 1 else noise)
    model.to(backend.device)
    (folder / "checkpoint").mkdir()
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    dist_checkpointing.save(state, str(folder / "checkpoint"), ("torch_dist", 1))
    tokenizer = load_tokenizer(tokenizer_file)
    nothing = np.empty(0, dtype=np.int64)
    for causal in (False, True):
        logits = []
        for row in verification_rows(tokenizer, GROUPED.max_position_embeddings, masked=not causal):
            example = Example(np.array(row), nothing, nothing)
            batch = collate(
                [example],
                [np.array([len(row)])],
                OBJECTIVES["clm" if causal else "mlm"],
                documents_attend_across=False,
                restart_positions=True,
            )
            with torch.no_grad():
                logits.append(model(batch.to(backend.device), return_logits=True)[:, :VOCAB_SIZE].cpu().clone())
        torch.save(logits, folder / f"logits-{causal}.pt")
    write_run_json(folder / "checkpoint", GROUPED, False, tokenizer_file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    save_with_megatron(Path(sys.argv[1]), Path(sys.argv[2]))
