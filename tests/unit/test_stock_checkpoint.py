"""Stock checkpoints: what is refused by name, read in parts, and never run. The logits are in tests/distributed."""

import argparse
import enum
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_ext.checkpoint_files import read_run_file
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.hf import stock_checkpoint
from megatron_ext.hf.checkpoint_reader import CheckpointReader
from megatron_ext.hf.checkpoint_writer import LazyTensor, write_tensors
from megatron_ext.hf.import_model import import_model
from megatron_ext.hf.stock_checkpoint import StockSource
from megatron_ext.hf.stock_shape import REFUSED
from megatron_ext.hf.stored_arguments import NotPlain, read_arguments
from megatron_ext.hf.verify import VerificationError
from megatron_ext.hf.weight_map import build_mappings
from megatron_ext.train.checkpoint_logits import checkpoint_logits
from tests.unit.hf_tokenizers import write_qwen
from tests.unit.test_hf_export import tokenizer_file  # noqa: F401

ROOT = Path(__file__).parents[2]
LAYERS, HIDDEN, FFN, HEADS, GROUPS, ROWS = 3, 48, 80, 6, 2, 1152
ARGUMENTS = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": HEADS,
    "group_query_attention": True,
    "num_query_groups": GROUPS,
    "kv_channels": None,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "swiglu": True,
    "position_embedding_type": "rope",
    "rotary_base": 5000,
    "untie_embeddings_and_output_weights": True,
    "add_bias_linear": False,
    "max_position_embeddings": 128,
    "make_vocab_size_divisible_by": 128,
    "tensor_model_parallel_size": 1,
}
FIELDS = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": HEADS,
    "num_query_groups": GROUPS,
    "rotary_base": 5000.0,
    "norm_epsilon": 1e-6,
    "tie_embeddings": False,
    "max_position_embeddings": 128,
}


class Kind(enum.Enum):
    """Some enumeration of another program."""

    GPT = 1


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stock_tensors() -> dict[str, Tensor]:
    """Name -> random tensor, stacked as megatron stacks them, with what of an optimizer lies beside."""
    width = HIDDEN // HEADS
    shapes = {
        "embedding.word_embeddings.weight": (ROWS, HIDDEN),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (LAYERS, HIDDEN),
        "decoder.layers.self_attention.linear_qkv.weight": (LAYERS, (HEADS + 2 * GROUPS) * width, HIDDEN),
        "decoder.layers.self_attention.linear_proj.weight": (LAYERS, HIDDEN, HIDDEN),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (LAYERS, HIDDEN),
        "decoder.layers.mlp.linear_fc1.weight": (LAYERS, 2 * FFN, HIDDEN),
        "decoder.layers.mlp.linear_fc2.weight": (LAYERS, HIDDEN, FFN),
        "decoder.final_layernorm.weight": (HIDDEN,),
        "output_layer.weight": (ROWS, HIDDEN),
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": (HIDDEN,),
        "chained_0.optimizer.state.exp_avg.decoder.final_layernorm.weight": (HIDDEN,),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def write_stock(folder: Path, arguments: dict[str, Any] | None = ARGUMENTS, tensors: dict[str, Tensor] | None = None) -> Path:
    """A checkpoint as one rank of Megatron-LM would leave it; returns the folder of its iteration."""
    target = folder / "iter_0000070"
    target.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("70\n")
    tensors = stock_tensors() if tensors is None else tensors
    write_tensors(target, [LazyTensor(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()])
    if arguments is None:
        (target / "common.pt").unlink()
    else:
        torch.save({"args": argparse.Namespace(**arguments), "iteration": 70, "checkpoint_version": 3.0}, target / "common.pt")
    return target


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_the_latest_iteration_is_imported(tokenizer_file: Path, tmp_path: Path) -> None:  # noqa: F811
    tensors = stock_tensors()
    write_stock(tmp_path / "save", tensors=tensors)
    report = import_model(tmp_path / "save", tmp_path / "checkpoint", tokenizer=tokenizer_file, reference_logits=checkpoint_logits)
    assert report.verification.tensors == 3 + 6 * LAYERS
    record = read_run_file(tmp_path / "checkpoint")
    assert (record["vocab_size"], record["imported"]["iteration"], record["tokenizer"]["path"]) == (
        1003,
        70,
        f"tokenizer/{tokenizer_file.name}",
    )
    assert record["encoder"]["rotary_base"] == 5000 and record["encoder"]["norm_epsilon"] == 1e-6
    reader = CheckpointReader(tmp_path / "checkpoint")
    assert torch.equal(reader.read("output_layer.weight"), tensors["output_layer.weight"][:1003])
    for layer in range(LAYERS):
        name = "mlp.linear_fc1.weight"
        assert torch.equal(reader.read(f"decoder.layers.{layer}.{name}"), tensors[f"decoder.layers.{name}"][layer])


def test_half_precision_becomes_float32_and_bfloat16_stays(tokenizer_file: Path, tmp_path: Path) -> None:  # noqa: F811
    tensors = {name: t.to(torch.float16 if "mlp" in name else torch.bfloat16) for name, t in stock_tensors().items()}
    folder = write_stock(tmp_path / "save", tensors=tensors)
    report = import_model(folder, tmp_path / "checkpoint", tokenizer=tokenizer_file, reference_logits=checkpoint_logits)
    assert report.dtype == torch.bfloat16
    found = CheckpointReader(tmp_path / "checkpoint").read("decoder.layers.1.mlp.linear_fc2.weight")
    assert torch.equal(found, tensors["decoder.layers.mlp.linear_fc2.weight"][1].float())


def test_only_the_layers_own_part_is_read(
    tokenizer_file: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = StockSource(write_stock(tmp_path / "save"), tokenizer_file, None)
    mapping = next(
        m for m in build_mappings(source.config.encoder, 1003, 1003) if m.megatron_key.endswith("1.mlp.linear_fc1.weight")
    )
    asked = []
    original = stock_checkpoint.create_read_items_for_chunk_list

    def spy(key: str, entry: Any, chunks: list[Any]) -> Any:
        items = original(key, entry, chunks)
        asked.extend((key, tuple(item.storage_offsets), tuple(item.lengths)) for item in items)
        return items

    monkeypatch.setattr(stock_checkpoint, "create_read_items_for_chunk_list", spy)
    assert source.read(mapping).shape == (2 * FFN, HIDDEN)
    assert asked == [("decoder.layers.mlp.linear_fc1.weight", (1, 0, 0), (1, 2 * FFN, HIDDEN))]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(name: str, tokenizer_file: Path, tmp_path: Path) -> None:  # noqa: F811
    wanted, reason = REFUSED[name]
    other = {bool: True, float: 0.5, str: "other"}.get(type(wanted), ["a", "b"])
    folder = write_stock(tmp_path / "save", ARGUMENTS | {name: other})
    with pytest.raises(UserError) as caught:
        import_model(folder, tmp_path / "checkpoint", tokenizer=tokenizer_file)
    assert f"{name} is {'a list' if isinstance(other, list) else repr(other)}; {reason}" in str(caught.value)
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'; only RMS norms"),
        ({"swiglu": False}, "swiglu is False; only SwiGLU"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type is 'learned_absolute'; only rotary"),
        ({"position_embedding_type": Kind.GPT}, "position_embedding_type is a"),
        ({"num_layers": 4}, "holds 3 layers, its shape has 4"),
        ({"num_layers": 2**23}, "holds 3 layers, its shape has 8388608"),
        ({"num_layers": "3"}, "num_layers is '3'; a whole number"),
        ({"hidden_size": -48}, "hidden_size is -48"),
        ({"hidden_size": 10**5000}, "hidden_size is a number beyond all use"),
        ({"rotary_base": 10**400}, "rotary_base is a number beyond all use"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon is nan"),
        ({"ffn_hidden_size": 96}, "linear_fc1.weight has the shape [3, 160, 48], a model of its shape has [3, 192, 48]"),
        ({"add_qkv_bias": True}, "lacks decoder.layers.self_attention.linear_qkv.bias"),
        ({"untie_embeddings_and_output_weights": False}, "holds output_layer.weight, which no model"),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, "rope_scaling_factor is 32.0; not every training script"),
        ({"rotary_seq_len_interpolation_factor": 4}, "rotary_seq_len_interpolation_factor is 4; not every"),
        ({"num_query_groups": 4}, "model.num_query_groups 4 does not divide"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str, tokenizer_file: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = write_stock(tmp_path / "save", ARGUMENTS | changes)
    with pytest.raises(UserError) as caught:
        import_model(folder, tmp_path / "checkpoint", tokenizer=tokenizer_file)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["save"]


def test_a_shape_can_come_from_the_users_file(tokenizer_file: Path, tmp_path: Path) -> None:  # noqa: F811
    plain = write_stock(tmp_path / "plain", arguments=None)

    def shape(folder: Path, fields: dict[str, Any] | None) -> Any:
        return StockSource(folder, tokenizer_file, fields).config.encoder

    with pytest.raises(UserError, match="holds no arguments of its training: give its shape with --model-config"):
        shape(plain, None)
    with pytest.raises(UserError, match=r"--model-config lacks model.rotary_base"):
        shape(plain, {name: value for name, value in FIELDS.items() if name != "rotary_base"})
    with pytest.raises(UserError, match=r"holds 3 layers, its shape has 4"):
        shape(plain, {"preset": "nano"})
    told = write_stock(tmp_path / "told")
    assert shape(plain, FIELDS) == shape(told, None) == shape(told, FIELDS) == shape(told, {"rotary_base": 5000.0})
    with pytest.raises(UserError, match=r"--model-config says model.rotary_base 1.0, but the arguments in .* say 5000.0"):
        shape(told, {"rotary_base": 1.0})
    unclear = write_stock(tmp_path / "unclear", ARGUMENTS | {"rotary_seq_len_interpolation_factor": 4})
    encoder = shape(unclear, {"rotary_scaling": "linear", "rotary_factor": 4.0})
    assert (encoder.rotary_scaling, encoder.rotary_factor) == ("linear", 4.0)


@pytest.mark.parametrize("content", ["object", "argument", "whole"])
def test_nothing_of_common_is_run(content: str, tokenizer_file: Path, tmp_path: Path) -> None:  # noqa: F811
    folder, marker = write_stock(tmp_path / "save"), tmp_path / "marker"
    hostile = Hostile(marker)
    arguments = argparse.Namespace(**ARGUMENTS, spec=None, **({"bad": hostile} if content == "argument" else {}))
    common: Any = hostile if content == "whole" else {"args": arguments, "other": hostile if content == "object" else 0}
    torch.save(common, folder / "common.pt")
    torch.load(folder / "common.pt", weights_only=False)  # the attack is one
    assert marker.exists()
    marker.rmdir()
    if content == "whole":
        with pytest.raises(UserError, match=r"common.pt holds .*mkdir where a dictionary is expected"):
            import_model(folder, tmp_path / "checkpoint", tokenizer=tokenizer_file)
    else:
        import_model(folder, tmp_path / "checkpoint", tokenizer=tokenizer_file)
    assert not marker.exists()


NO_INDEX = Metadata({}, storage_data={})


def put_common(folder: Path, content: bytes, among_shards: bool) -> Metadata:
    """Lay down what megatron keeps beside the tensors: in a file, or as 0.19 does among the shards. Returns the index."""
    if not among_shards:
        (folder / "common.pt").write_bytes(content)
        return NO_INDEX
    (folder / "__0_0.distcp").write_bytes(b"before" + content + b"after")
    place = MetadataIndex("common_state/shard_0_1")
    return Metadata({place.fqn: BytesStorageMetadata()}, storage_data={place: _StorageInfo("__0_0.distcp", 6, len(content))})


@pytest.mark.parametrize("among_shards", [False, True])
def test_objects_beside_the_arguments_are_read_past(among_shards: bool, tmp_path: Path) -> None:
    values = {
        "kind": Kind.GPT,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "many": OrderedDict(a=[1, {2}]),
        "path": tmp_path,
    }
    values |= {"function": torch.nn.functional.silu, "number": 3, "share": 0.5, "text": "x", "flag": True, "none": None}
    state = {"args": argparse.Namespace(**values), "iteration": 5, "tensor": torch.ones(3), "scheduler": {"rng": torch.Generator}}
    torch.save(state, buffer := io.BytesIO())
    stored = read_arguments(tmp_path, put_common(tmp_path, buffer.getvalue(), among_shards))
    assert stored.iteration == 5
    plain = {name: value for name, value in stored.values.items() if not isinstance(value, NotPlain)}
    assert plain == {"number": 3, "share": 0.5, "text": "x", "flag": True, "none": None}
    assert stored.values.keys() == values.keys() and stored.values["dtype"] == NotPlain("type")


@pytest.mark.parametrize("among_shards", [False, True])
@pytest.mark.parametrize("content", [b"", b"no archive", pickle.dumps({"args": 1})], ids=["empty", "text", "bare pickle"])
def test_a_damaged_common_is_one_line(content: bytes, among_shards: bool, tmp_path: Path) -> None:
    index = put_common(tmp_path, content, among_shards)
    with pytest.raises(UserError, match=r"common(\.pt|_state/shard_0_1) cannot be read"):
        read_arguments(tmp_path, index)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**26 + 1))
    (tmp_path / "common.pt").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="holds more than"):
        read_arguments(tmp_path, NO_INDEX)


def test_an_index_of_an_older_torch_is_read(tokenizer_file: Path, tmp_path: Path) -> None:  # noqa: F811
    """Up to 2.2 the properties of a tensor were of another class, whose state is the same."""
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    folder = write_stock(tmp_path / "save")
    index = pickle.loads((folder / ".metadata").read_bytes())
    for entry in index.state_dict_metadata.values():
        entry.properties = TensorProperties(dtype=entry.properties.dtype)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert b"_shard.sharded_tensor.metadata" in (folder / ".metadata").read_bytes()
    import_model(folder, tmp_path / "checkpoint", tokenizer=tokenizer_file)


def test_a_mask_token_is_added(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/config.json").write_text(json.dumps({"model_type": "qwen2"}))
    write_qwen(tmp_path / "tokenizer")
    folder = write_stock(tmp_path / "save")
    options: dict[str, Any] = {"with_mask_token": True, "reference_logits": checkpoint_logits}
    report = import_model(folder, tmp_path / "checkpoint", tokenizer=tmp_path / "tokenizer", **options)
    assert (report.mask_token.how, report.mask_token.id, report.vocab_size) == ("appended", 1003, 1004)
    embedding, stored = CheckpointReader(tmp_path / "checkpoint").read("embedding.word_embeddings.weight"), stock_tensors()
    assert torch.equal(embedding[:1003], stored["embedding.word_embeddings.weight"][:1003])
    assert not torch.equal(embedding[1003], stored["embedding.word_embeddings.weight"][1003])


def test_a_sentencepiece_model_without_a_mask_token_becomes_a_folder(tmp_path: Path, tokenizer_file: Path) -> None:  # noqa: F811
    from megatron_ext.data.sentencepiece_conversion import read_model_proto

    proto, _ = read_model_proto(tokenizer_file)
    mask = next(piece for piece in proto.pieces if piece.piece == "[MASK]")
    mask.piece = "<spare>"
    plain = tmp_path / "plain.model"
    plain.write_bytes(proto.SerializeToString())
    before = load_tokenizer(plain)
    assert before.mask_id is None
    folder = write_stock(tmp_path / "save")
    report = import_model(folder, tmp_path / "kept", tokenizer=plain)
    assert report.mask_token is None and (tmp_path / "kept/tokenizer/plain.model").is_file()
    report = import_model(folder, tmp_path / "changed", tokenizer=plain, with_mask_token=True, reference_logits=checkpoint_logits)
    after = load_tokenizer(tmp_path / "changed/tokenizer")
    assert after.mask_id == report.mask_token.id == 1003
    text = "All human beings are born free and equal in dignity and rights."
    assert after.encode(text) == before.encode(text)


def test_a_wrong_tokenizer_is_refused_or_named(tokenizer_file: Path, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    tensors = stock_tensors()
    vocabulary = ("embedding.word_embeddings.weight", "output_layer.weight")
    few = {name: tensor[:1000] if name in vocabulary else tensor for name, tensor in tensors.items()}
    folder = write_stock(tmp_path / "few", tensors=few)
    with pytest.raises(UserError, match=r"has 1003 ids, the embedding of .* 1000 rows"):
        import_model(folder, tmp_path / "checkpoint", tokenizer=tokenizer_file)
    StockSource(write_stock(tmp_path / "many"), tokenizer_file, None)
    assert "1152 rows and the tokenizer 1003 ids, more apart than padding explains" in capsys.readouterr().err


def test_options_belong_to_one_source(tokenizer_file: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = write_stock(tmp_path / "save")
    with pytest.raises(UserError, match="name it with --tokenizer"):
        import_model(folder, tmp_path / "checkpoint")
    with pytest.raises(UserError, match="--tokenizer is for megatron checkpoints"):
        import_model(tmp_path / "elsewhere", tmp_path / "checkpoint", tokenizer=tokenizer_file)
    with pytest.raises(UserError, match="--model-config is for megatron checkpoints"):
        import_model(tmp_path / "elsewhere", tmp_path / "checkpoint", model_fields={})


@pytest.mark.parametrize(
    "word, message",
    [("71", "names iter_0000071, which is no checkpoint"), ("../x", "a number of iterations"), ("release", "names release")],
)
def test_a_latest_iteration_that_is_not_there(word: str, message: str, tokenizer_file: Path, tmp_path: Path) -> None:  # noqa: F811
    write_stock(tmp_path / "save")
    (tmp_path / "save/latest_checkpointed_iteration.txt").write_text(word)
    with pytest.raises(UserError, match=message):
        import_model(tmp_path / "save", tmp_path / "checkpoint", tokenizer=tokenizer_file)


def test_nan_and_missing_files_are_one_line(tokenizer_file: Path, tmp_path: Path) -> None:  # noqa: F811
    tensors = stock_tensors()
    tensors["decoder.layers.mlp.linear_fc2.weight"][2, 3, 4] = float("nan")
    with pytest.raises(UserError, match=r"decoder.layers.2.mlp.linear_fc2.weight .* holds NaN or infinity"):
        import_model(write_stock(tmp_path / "nan", tensors=tensors), tmp_path / "checkpoint", tokenizer=tokenizer_file)
    folder = write_stock(tmp_path / "missing")
    next(folder.glob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"names __0_0.distcp, which is missing"):
        import_model(folder, tmp_path / "checkpoint", tokenizer=tokenizer_file)


def test_a_tensor_that_was_changed_on_the_way_is_found(
    tokenizer_file: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_stock(tmp_path / "save")

    def swapped(target: Path, tensors: list[LazyTensor]) -> dict[str, Any]:
        norms = [tensor for tensor in tensors if tensor.key.endswith("layer_norm_weight")]
        first, second = norms[:2]
        exchanged = {first.key: second.load, second.key: first.load}
        return write_tensors(target, [LazyTensor(t.key, t.shape, t.dtype, exchanged.get(t.key, t.load)) for t in tensors])

    monkeypatch.setattr("megatron_ext.hf.import_model.write_tensors", swapped)
    with pytest.raises(VerificationError, match="is not what"):
        import_model(folder, tmp_path / "checkpoint", tokenizer=tokenizer_file, reference_logits=checkpoint_logits)
    assert not (tmp_path / "checkpoint").exists()


def test_a_model_that_sees_ahead_is_found(tokenizer_file: Path, tmp_path: Path) -> None:  # noqa: F811
    def all_alike(checkpoint: Path, rows: list[list[int]]) -> list[Tensor]:
        return [torch.full((len(row), 1003), float(sum(row))) for row in rows]

    with pytest.raises(VerificationError, match="a causal model moves the last one's alone"):
        import_model(write_stock(tmp_path / "save"), tmp_path / "checkpoint", tokenizer=tokenizer_file, reference_logits=all_alike)


def test_the_command_line(tokenizer_file: Path, tmp_path: Path) -> None:  # noqa: F811
    import yaml

    write_stock(tmp_path / "save", arguments=None)
    config = tmp_path / "model.yaml"
    config.write_text(yaml.safe_dump({"output_dir": "elsewhere", "model": FIELDS}))
    command = [sys.executable, "tools/convert_checkpoint.py", "import", str(tmp_path / "save"), str(tmp_path / "checkpoint")]

    def call(*options: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    config.write_text(yaml.safe_dump({"model": {**FIELDS, "num_layer": 3}}))
    refused = call("--tokenizer", str(tokenizer_file), "--model-config", str(config))
    assert refused.returncode == 2 and "num_layer is no key that is known (did you mean num_layers?)" in refused.stderr
    config.write_text(yaml.safe_dump({"output_dir": "elsewhere", "model": FIELDS}))
    done = call("--tokenizer", str(tokenizer_file), "--model-config", str(config))
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout and "verified: 21 tensors are the source's bit by bit" in done.stdout
