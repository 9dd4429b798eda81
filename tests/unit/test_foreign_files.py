"""Files from elsewhere: what they say is looked at, what they ask to run is not run, where they point is not gone to."""

import contextlib
import copy
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ext.checkpoint_files import read_run_file
from megatron_ext.config_reading import from_dict, load_config
from megatron_ext.data import demo_corpora
from megatron_ext.data.demo_corpora import read_members
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.model.presets import EncoderConfig, nano
from megatron_ext.regular_file import read_small_file
from megatron_ext.run_record import ENCODER, ENCODER_SINCE
from tests.unit.test_config import TREE

ROOT = Path(__file__).parents[2]
DIGEST = "0123456789abcdef" * 4
RECORD: dict[str, Any] = {
    "format": 1,
    "step": 4,
    "phase": "0-clm",
    "causal": True,
    "samples": 64,
    "tokens": 4096,
    "predicted_tokens": 4000,
    "flops": 1e9,
    "phases": [{"name": "0-clm", "start_step": 0, "end_step": 4}],
    "comparison_mask_ratio": 0.4,
    "parent": {"checkpoint": "/runs/old/checkpoints/step_00000002", "step": 2, "mlflow_run_id": "a" * 32},
    "mlflow_run_id": "b" * 32,
    "run_key": None,
    "encoder": dataclasses.asdict(nano()),
    "vocab_size": 540,
    "padded_vocab_size": 640,
    "tokenizer": {"path": "tokenizer/tokenizer.model", "fingerprint": DIGEST},
    "data": [{"prefix": "data/set", "split": "train", "weight": 1.0, "fingerprint": DIGEST}],
    "parallel": {"tensor": 1},
    "config": {"data": {}, "training": {}},
    "versions": {"torch": "2.13.0"},
    "files": {"common.pt": {"bytes": 10, "sha256": DIGEST}},
}
Edit = Callable[[dict[str, Any]], Any]


def write_record(folder: Path, text: str) -> Path:
    (folder / "run.json").write_text(text)
    return folder


def nested(depth: int) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _ in range(depth):
        tree = {"inner": tree}
    return tree


def test_a_whole_record_is_read(tmp_path: Path) -> None:
    assert read_run_file(write_record(tmp_path, json.dumps(RECORD | {"of a newer version": 1}))) == RECORD | {
        "of a newer version": 1
    }


def test_the_record_knows_the_encoders_fields() -> None:
    assert [*ENCODER, *ENCODER_SINCE] == [field.name for field in dataclasses.fields(EncoderConfig)]


@pytest.mark.parametrize("key", sorted(RECORD))
def test_missing_keys_are_named(tmp_path: Path, key: str) -> None:
    rest = {name: value for name, value in RECORD.items() if name != key}
    with pytest.raises(UserError, match=rf"lacks {key}|format None"):
        read_run_file(write_record(tmp_path, json.dumps(rest)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(format=2), "has format 2: this version reads format 1"),
        (lambda r: r.update(step="4"), "step is '4': it must be a whole number"),
        (lambda r: r.update(step=True), "step is True"),
        (lambda r: r.update(step=-1), "step is -1"),
        (lambda r: r.update(causal="yes"), "causal is 'yes': it must be true or false"),
        (lambda r: r.update(flops=float("nan")), "NaN is not a number that JSON has"),
        (lambda r: r.update(flops=float("inf")), "Infinity is not a number that JSON has"),
        (lambda r: r.update(mlflow_run_id="../../other"), "mlflow_run_id is '../../other'"),
        (lambda r: r.update(run_key="x' OR tags.a = 'b"), "run_key is "),
        (lambda r: r.update(parent=[]), "parent is "),
        (lambda r: r["parent"].pop("step"), "lacks parent.step"),
        (lambda r: r.update(encoder=[1]), "encoder is "),
        (lambda r: r["encoder"].update(rope="yarn"), "unknown field rope"),
        (lambda r: r["encoder"].pop("hidden_size"), "lacks encoder.hidden_size"),
        (lambda r: r["encoder"].update(num_layers=10**9), "encoder.num_layers is 1000000000"),
        (lambda r: r["encoder"].update(num_attention_heads=0), "encoder.num_attention_heads is 0"),
        (lambda r: r["encoder"].update(hidden_size=2.5), "encoder.hidden_size is 2.5"),
        (lambda r: r.update(vocab_size=2**40), "vocab_size is "),
        (lambda r: r.update(padded_vocab_size=539), "padded_vocab_size 539 is below vocab_size 540"),
        (lambda r: r["tokenizer"].update(path=3), "tokenizer.path is 3"),
        (lambda r: r["tokenizer"].update(path="../tokenizer.model"), "only paths inside the checkpoint"),
        (lambda r: r["tokenizer"].update(path="/etc/passwd"), "only paths inside the checkpoint"),
        (lambda r: r["tokenizer"].update(path=""), "only paths inside the checkpoint"),
        (lambda r: r["tokenizer"].update(path="a\0b"), "only paths inside the checkpoint"),
        (lambda r: r["tokenizer"].update(fingerprint="short"), "tokenizer.fingerprint is 'short'"),
        (lambda r: r.update(data={}), "data is {}: it must be a list of objects"),
        (lambda r: r["data"][0].pop("fingerprint"), r"lacks data\[0\].fingerprint"),
        (lambda r: r["config"].update(data="file.yaml"), "config.data is 'file.yaml'"),
        (lambda r: r["files"].update({"../../x": {"bytes": 1, "sha256": DIGEST}}), "only paths inside the checkpoint"),
        (lambda r: r["files"].update({"x": {"bytes": -1, "sha256": DIGEST}}), r"files\['x'\].bytes is -1"),
        (lambda r: r["files"].update({"x": 3}), r"files\['x'\] is 3: it must be an object"),
        (lambda r: r["versions"].update(nested(30)), "nested too deeply"),
        (lambda r: r["versions"].update({"": "1"}), "it must be an object of package names and texts"),
        (lambda r: r["versions"].update({"../torch": "1"}), "it must be an object of package names and texts"),
        (lambda r: r["versions"].update(torch=None), "it must be an object of package names and texts"),
        (lambda r: r.update(changes={}), "changes is {}: it must be a list of objects"),
        (lambda r: r.update(changes=["seed"]), r"changes is \['seed'\]: it must be a list of objects"),
        (lambda r: r.update(skipped_steps="2"), "skipped_steps is '2': it must be a whole number"),
        (lambda r: r.update(skipped_in_a_row=-1), "skipped_in_a_row is -1: it must be a whole number"),
        (lambda r: r.update(step=5), "step is 5, but its phases end with step 4"),
    ],
)
def test_impossible_records_are_one_line(tmp_path: Path, edit: Edit, message: str) -> None:
    record = copy.deepcopy(RECORD)
    edit(record)
    with pytest.raises(UserError, match=message) as caught:
        read_run_file(write_record(tmp_path, json.dumps(record)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "run.json") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(RECORD).replace('"step": 4', '"step": 4, "step": 5', 1), "the key 'step' occurs twice"),
        (json.dumps(RECORD).replace("1000000000.0", "1e999"), "1e999 is too large a number"),
        ('{"format": 1, "step": ' + "[" * 100_000, "nested too deeply"),
        ('{"format": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ("[1]", "has format 'list'"),
        ("", "cannot be read as JSON"),
    ],
)
def test_texts_that_are_no_record_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_run_file(write_record(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_later_keys_may_be_there(tmp_path: Path) -> None:
    later = {"changes": [{"step": 2, "field": "training.seed"}], "skipped_steps": 1, "skipped_in_a_row": 0}
    assert read_run_file(write_record(tmp_path, json.dumps(RECORD | later))) == RECORD | later


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """What waits for longer ends with an error."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"nothing came for {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_only_small_regular_files_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_small_file(path, 5) == b"12345"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    wrong = {path: "a file of 5 bytes", tmp_path / "pipe": "a pipe", tmp_path / "folder": "a folder", Path("/dev/zero"): "a device"}
    for wrong_path, kind in wrong.items():
        with alarm(10), pytest.raises(UserError, match=f"{wrong_path} is {kind}.* 4 ") as caught:
            read_small_file(wrong_path, 4)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_small_file(tmp_path / "nothing", 5)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_a_pipe_in_a_checkpoint_holds_nobody_up(tmp_path: Path, name: str) -> None:
    from megatron_ext import unpickling

    os.mkfifo(tmp_path / name)
    read = {".metadata": unpickling.read_metadata, "common.pt": unpickling.read_common, "metadata.json": unpickling._check_backend}
    with alarm(10), pytest.raises(UserError, match=f"{name} is a pipe"):
        read[name](tmp_path)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """Name of a module that makes a file when it is imported, and that file."""
    marker = tmp_path / "marker"
    (tmp_path / "trap_module.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Trap:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "trap_module", marker
    sys.modules.pop("trap_module", None)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t, name: t.update(model={"class_path": f"{name}.Trap"}),
        lambda t, name: t.update(model={"class_path": f"{name}.Trap", "init_args": {}}),
        lambda t, name: t.update(model=f"{name}.Trap"),
        lambda t, name: t["phases"].append({"class_path": f"{name}.Trap"}),
        lambda t, name: t["data"].update(train=[f"{name}.Trap"]),
    ],
)
def test_a_configuration_imports_nothing(tmp_path: Path, trap: tuple[str, Path], edit: Callable) -> None:
    tree = copy.deepcopy(TREE)
    edit(tree, trap[0])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    for load in (lambda: from_dict(tree), lambda: load_config(["--config", str(tmp_path / "config.yaml")])):
        with pytest.raises(UserError) as caught:
            load()
        assert "\n" not in str(caught.value)
    assert not trap[1].exists()


def test_a_stored_configuration_reads_no_other_file(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("output_dir: elsewhere\npreset: tiny\n")
    for change in ({"config": str(other)}, {"config": [str(other)]}, {"model": str(other)}):
        with pytest.raises(UserError):
            from_dict({**TREE, **change})


def test_yaml_tags_make_no_objects(tmp_path: Path) -> None:
    marker, config = tmp_path / "marker", tmp_path / "config.yaml"
    attack = f"resume: !!python/object/apply:os.system ['touch {marker}']\n"
    config.write_text(yaml.safe_dump(TREE) + attack)
    yaml.unsafe_load(attack)
    assert marker.exists()  # the attack works
    marker.unlink()
    command = [sys.executable, "pretrain_encoder.py", "--config", str(config), "--print-config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert not marker.exists()


def test_yaml_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("output_dir: " + "[" * 5000 + "]" * 5000)
    with pytest.raises(UserError) as caught:
        load_config(["--config", str(tmp_path / "config.yaml")])
    assert "\n" not in str(caught.value)


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A small Hugging Face tokenizer, and code beside it that makes a file when it is imported."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    pipeline = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    pipeline.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}')
    (folder / "custom.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Custom(PreTrainedTokenizerFast):\n    pass\n"
    )
    return folder


def test_a_plain_tokenizer_folder_is_read(tokenizer_folder: Path) -> None:
    assert load_tokenizer(tokenizer_folder).encode("b a") == [2, 1]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": [None, "custom.Custom"]}, [None, "custom.Custom"], {"AutoConfig": "someone/else--custom.Custom"}]
)
def test_a_tokenizers_own_code_is_not_run(tokenizer_folder: Path, tmp_path: Path, name: str, auto_map: Any) -> None:
    path = tokenizer_folder / name
    tree = json.loads(path.read_text()) if path.exists() else {"model_type": "llama"}
    path.write_text(json.dumps({**tree, "auto_map": auto_map}))
    with pytest.raises(UserError, match=rf"{re.escape(name)} asks for code of its own") as caught:
        load_tokenizer(tokenizer_folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "marker").exists()


def test_a_tokenizer_configuration_that_is_no_json_is_one_line(tokenizer_folder: Path) -> None:
    for text in ("{", "[" * 100_000, "[1]", '"text"'):
        (tokenizer_folder / "tokenizer_config.json").write_text(text)
        with pytest.raises(UserError, match=r"tokenizer_config\.json") as caught:
            load_tokenizer(tokenizer_folder)
        assert "\n" not in str(caught.value)


def tar_package(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in ("../../outside.txt", "/tmp/megatron_ext_outside.txt", "inside.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"text"))
        for kind, name in ((tarfile.SYMTYPE, "symbolic.txt"), (tarfile.LNKTYPE, "hard.txt"), (tarfile.FIFOTYPE, "pipe.txt")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
    return path


def zip_package(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("../../outside.txt", "/tmp/megatron_ext_outside.txt", "inside.txt"):
            archive.writestr(name, b"text")
        link = zipfile.ZipInfo("symbolic.txt")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    return path


@pytest.mark.parametrize("make", [tar_package, zip_package])
def test_members_are_read_and_never_written(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    package = make(tmp_path / "a/b/package")
    members = read_members(package, "*.txt")
    assert {content for name, content in members.items() if name != "symbolic.txt"} == {b"text"}
    assert members.get("symbolic.txt", b"/etc/passwd") == b"/etc/passwd"  # a zip's link is a file with that text
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["package"]
    assert not Path("/tmp/megatron_ext_outside.txt").exists()


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_member_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(demo_corpora, "LARGEST_MEMBER", 10_000)
    package = tmp_path / "package"
    if kind == "zip":
        with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("large.txt", bytes(10_001))
    else:
        with tarfile.open(package, "w:gz") as archive:
            member = tarfile.TarInfo("large.txt")
            member.size = 10_001
            archive.addfile(member, io.BytesIO(bytes(10_001)))
    assert package.stat().st_size < 1000
    with pytest.raises(UserError, match="unpacks to more than 10,000 bytes"):
        read_members(package, "*.txt")
