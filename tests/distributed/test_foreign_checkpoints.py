"""Checkpoints that attack whoever opens them: nothing of theirs runs, whichever door they come in by."""

import io
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_ext.checkpoint_files import seal
from megatron_ext.errors import UserError
from megatron_ext.hf.checkpoint_reader import CheckpointReader
from megatron_ext.runtime.launch import run_on_ranks
from megatron_ext.runtime.megatron_versions import common_writer
from tests.conftest import Corpus
from tests.distributed.test_training import config_tree, run_training

ROOT = Path(__file__).parents[2]
SAVED = 2


class Payload:
    """Unpickled by plain pickle, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.fixture(scope="session")
def small(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint of a run of two steps."""
    folder = tmp_path_factory.mktemp("small")
    run_on_ranks(run_training, 1, [_tree(corpus, folder / "run", "never")])
    return folder / f"run/checkpoints/step_{SAVED:08d}"


def _tree(corpus: Corpus, output_dir: Path, resume: str) -> dict[str, Any]:
    changes = {"validation": {"interval": 0}, "training": {"stop_at_step": SAVED}}
    return config_tree(corpus, output_dir, {}, resume=resume, **changes)


def _copy(small: Path, target: Path) -> Path:
    shutil.copytree(small, target)
    return target


def _record(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "run.json").read_text())


def _sign(checkpoint: Path, **changes: Any) -> None:
    """Write sizes and sums of the files as they are now: whoever changes a checkpoint can change these too."""
    record = _record(checkpoint) | changes
    for name in record["files"]:
        content = (checkpoint / name).read_bytes()
        record["files"][name] = {"bytes": len(content), "blake3": blake3(content).hexdigest()}
    (checkpoint / "run.json").write_text(json.dumps(seal(record)))


def _index(checkpoint: Path) -> Any:
    with open(checkpoint / ".metadata", "rb") as file:
        return pickle.load(file)


def _write_index(checkpoint: Path, index: Any) -> None:
    with open(checkpoint / ".metadata", "wb") as file:
        pickle.dump(index, file)


def _object_place(index: Any) -> MetadataIndex:
    names = [name for name, entry in index.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]
    return MetadataIndex(sorted(names)[-1])


def _replace_object(checkpoint: Path, content: bytes) -> None:
    """Let an object be read from bytes at the end of its file."""
    index = _index(checkpoint)
    info = index.storage_data[_object_place(index)]
    with open(checkpoint / info.relative_path, "ab") as file:
        info.offset, info.length = file.tell(), len(content)
        file.write(content)
    _write_index(checkpoint, index)


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def attack_index(checkpoint: Path, marker: Path) -> None:
    index = _index(checkpoint)
    index.planner_data = Payload(marker)
    _write_index(checkpoint, index)


def attack_common(checkpoint: Path, marker: Path) -> None:
    common = torch.load(checkpoint / "common.pt", weights_only=True)
    torch.save({**common, "extra": Payload(marker)}, checkpoint / "common.pt")


def attack_common_with_a_bare_pickle(checkpoint: Path, marker: Path) -> None:
    (checkpoint / "common.pt").write_bytes(pickle.dumps(Payload(marker)))


def attack_object(checkpoint: Path, marker: Path) -> None:
    _replace_object(checkpoint, _saved([Payload(marker)]))


def attack_fp8_state(checkpoint: Path, marker: Path) -> None:
    """Transformer Engine unpickles a tensor of bytes."""
    _replace_object(checkpoint, _saved([torch.frombuffer(bytearray(pickle.dumps(Payload(marker))), dtype=torch.uint8)]))


def _load_index_as_torch_does(checkpoint: Path) -> None:
    FileSystemReader(str(checkpoint)).read_metadata()


def _load_common_unguarded(checkpoint: Path) -> None:
    torch.load(checkpoint / "common.pt", weights_only=False)


def _load_bare_pickle(checkpoint: Path) -> None:
    pickle.loads((checkpoint / "common.pt").read_bytes())


def _object_bytes(checkpoint: Path) -> io.BytesIO:
    index = _index(checkpoint)
    info = index.storage_data[_object_place(index)]
    return io.BytesIO((checkpoint / info.relative_path).read_bytes()[info.offset : info.offset + info.length])


def _load_object_as_torch_does(checkpoint: Path) -> None:
    torch.load(_object_bytes(checkpoint), weights_only=False)


def _load_fp8_state_as_te_does(checkpoint: Path) -> None:
    pickle.loads(torch.load(_object_bytes(checkpoint), weights_only=True)[0].numpy().tobytes())


Attack = Callable[[Path, Path], None]
ATTACKS: dict[str, tuple[Attack, Callable[[Path], None], str]] = {
    "index": (attack_index, _load_index_as_torch_does, ".metadata holds the global posix.system"),
    "object": (attack_object, _load_object_as_torch_does, "holds the global posix.system"),
    "FP8 state": (attack_fp8_state, _load_fp8_state_as_te_does, "holds bytes that could be code"),
}
if common_writer() is not None:  # from megatron-core 0.19 on there is no such file, and nothing that reads it
    ATTACKS |= {
        "common": (attack_common, _load_common_unguarded, "common.pt holds the global posix.system"),
        "bare pickle": (attack_common_with_a_bare_pickle, _load_bare_pickle, "common.pt is not plain data"),
    }


@pytest.fixture(params=ATTACKS)
def attacked(request: pytest.FixtureRequest, small: Path, tmp_path: Path) -> tuple[Path, Path, str]:
    """A checkpoint that attacks, the file that shows its success, and what is to be said of it."""
    attack, load, message = ATTACKS[request.param]
    checkpoint, marker = _copy(small, tmp_path / "attacked" / small.name), tmp_path / "marker"
    attack(checkpoint, marker)
    _sign(checkpoint)
    load(checkpoint)
    assert marker.exists()  # the attack works
    marker.unlink()
    return checkpoint, marker, message


def test_reader_and_export_tool_refuse_in_one_line(
    attacked: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    checkpoint, marker, message = attacked
    with pytest.raises(UserError, match=message):
        CheckpointReader(checkpoint)
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "export", str(checkpoint), str(tmp_path / "model")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "tools/convert_checkpoint.py"), run_name="__main__")
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "model").exists()
    assert not marker.exists()


def errors_of(checkpoints: list[str], clean: str) -> list[tuple[str, str]]:
    """In a rank: the errors of loading each checkpoint with megatron; then again without having looked into it before."""
    from megatron_ext.train import checkpoint
    from megatron_ext.train.checkpoint_logits import checkpoint_logits
    from megatron_ext.unpickling import read_metadata

    def error(path: str) -> str:
        try:
            checkpoint_logits(Path(path), [[5, 6, 7]])
        except UserError as error:
            return str(error)
        return ""

    looked = [error(path) for path in checkpoints]
    checkpoint.refuse_foreign_code = lambda path: read_metadata(Path(clean))
    return list(zip(looked, [error(path) for path in checkpoints], strict=True))


def test_megatron_runs_nothing_even_if_nothing_was_found_before(small: Path, tmp_path: Path) -> None:
    marker, checkpoints = tmp_path / "marker", []
    for name, (attack, _, _) in ATTACKS.items():
        checkpoints.append(_copy(small, tmp_path / name / small.name))
        attack(checkpoints[-1], marker)
        _sign(checkpoints[-1])
    (errors,) = run_on_ranks(errors_of, 1, [*map(str, checkpoints), str(small)], str(small))
    *refused, loaded = errors
    for (looked, unlooked), (_, _, message) in zip(refused, ATTACKS.values(), strict=True):
        assert message in looked
        assert message.removeprefix("common.pt ") in unlooked
        assert "\n" not in looked + unlooked
    assert loaded == ("", "")
    assert not marker.exists()


def test_the_entry_point_ends_with_code_2_and_one_line(corpus: Corpus, small: Path, tmp_path: Path) -> None:
    checkpoint, marker = _copy(small, tmp_path / "attacked" / small.name), tmp_path / "marker"
    attack_object(checkpoint, marker)
    _sign(checkpoint)
    config = tmp_path / "config.yaml"  # JSON is YAML
    config.write_text(json.dumps(_tree(corpus, tmp_path / "run", str(checkpoint))))
    command = [sys.executable, "pretrain_encoder.py", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1 and "posix.system" in errors[0]
    assert "Traceback" not in done.stderr
    assert not marker.exists()


def _point_elsewhere(checkpoint: Path, **changes: Any) -> None:
    index = _index(checkpoint)
    vars(next(iter(index.storage_data.values()))).update(changes)
    _write_index(checkpoint, index)


def _link_out(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    outside = checkpoint.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def _claim_terabytes(checkpoint: Path) -> None:
    index = _index(checkpoint)
    entry = index.state_dict_metadata["decoder.final_layernorm.weight"]
    entry.size = entry.chunks[0].sizes = torch.Size([2**40])
    _write_index(checkpoint, index)


def _first_shard(checkpoint: Path) -> str:
    return sorted(path.name for path in checkpoint.glob("*.distcp"))[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: _point_elsewhere(c, relative_path="../outside/__0_0.distcp"), "only paths inside the checkpoint"),
        (lambda c: _point_elsewhere(c, relative_path="/etc/passwd"), "only paths inside the checkpoint"),
        (lambda c: _point_elsewhere(c, relative_path="no.distcp"), r"names no\.distcp, which is missing"),
        (lambda c: _point_elsewhere(c, length=2**40), "it names the bytes"),
        (lambda c: _point_elsewhere(c, offset=-1), "position is expected"),
        (lambda c: _point_elsewhere(c, transform_descriptors=["zstd"]), "asks to transform"),
        (_claim_terabytes, "does not say where the"),
        (lambda c: _write_index(c, {"state_dict_metadata": {}}), "where Metadata is expected"),
        (lambda c: (c / ".metadata").write_bytes(b"\x80\x05garbage"), "cannot be read"),
        (lambda c: (c / ".metadata").unlink(), "cannot be read"),
        (lambda c: (c / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "names the format 'zarr'"),
        (lambda c: _link_out(c, ".metadata"), r"names \.metadata, a link that leads out"),
        (lambda c: _link_out(c, "tokenizer"), "tokenizer.*, a link that leads out"),
        (lambda c: _link_out(c, "tokenizer/tokenizer.model"), "a link that leads out"),
        (lambda c: _link_out(c, _first_shard(c)), "a link that leads out"),
        (lambda c: _sign(c, tokenizer={**_record(c)["tokenizer"], "path": "../tokenizer.model"}), "only paths inside"),
        (lambda c: _sign(c, tokenizer={**_record(c)["tokenizer"], "path": "/etc/passwd"}), "only paths inside"),
    ],
)
def test_nothing_outside_the_checkpoint_is_read(small: Path, tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    checkpoint = _copy(small, tmp_path / small.name)
    change(checkpoint)
    with pytest.raises(UserError, match=message) as caught:
        CheckpointReader(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_link_inside_the_checkpoint_is_followed(small: Path, tmp_path: Path) -> None:
    checkpoint = _copy(small, tmp_path / small.name)
    shard = checkpoint / _first_shard(checkpoint)
    shard.rename(checkpoint / "shard")
    shard.symlink_to("shard")
    assert CheckpointReader(checkpoint).tensors.keys() == CheckpointReader(small).tensors.keys()


class Naming:
    """Pickled as a call of a function of this name."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (subprocess.run, "subprocess.run"),
        (torch.load, "torch.serialization.load"),
        # megatron-core 0.19 puts a function of its own in its place.
        (torch.storage._load_from_bytes, f"{torch.storage._load_from_bytes.__module__}.{torch.storage._load_from_bytes.__name__}"),
        (pickle.loads, "_pickle.loads"),
    ],
)
def test_an_index_names_nothing_but_what_it_needs(small: Path, tmp_path: Path, function: Any, name: str) -> None:
    checkpoint = _copy(small, tmp_path / small.name)
    _write_index(checkpoint, Naming(function, "1"))
    with pytest.raises(UserError, match=f"holds the global {name}, which"):
        CheckpointReader(checkpoint)


def test_an_index_changes_no_class_of_torch(small: Path, tmp_path: Path) -> None:
    """A pickle may set attributes of a class that it names: (class, BUILD with slots)."""
    from torch.distributed.checkpoint.metadata import StorageMeta

    checkpoint = _copy(small, tmp_path / small.name)
    poison = b"\x80\x02ctorch.distributed.checkpoint.metadata\nStorageMeta\nN}X\x08\x00\x00\x00poisonedI1\ns\x86b."
    (checkpoint / ".metadata").write_bytes(poison)
    pickle.loads(poison)
    assert StorageMeta.poisoned == 1  # plain pickle does it
    del StorageMeta.poisoned
    with pytest.raises(UserError, match="cannot be read"):
        CheckpointReader(checkpoint)
    assert not hasattr(StorageMeta, "poisoned")


def test_the_index_is_read_as_torch_reads_it(small: Path) -> None:
    from megatron_ext.unpickling import read_metadata

    expected, found = FileSystemReader(str(small)).read_metadata(), read_metadata(small)
    assert found.storage_data == expected.storage_data
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.version == expected.version
