"""Conversion moves one tensor at a time: the bytes are safetensors' own, the memory is bounded, and a failure leaves nothing."""

import io
import struct
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.serialization import config

from megatron_ext.checkpoint_files import find_damage, read_run_file
from megatron_ext.errors import UserError
from megatron_ext.hf import summed_files
from megatron_ext.hf.checkpoint_writer import TENSOR_FILE, LazyTensor, write_tensors
from megatron_ext.hf.finite import all_finite
from megatron_ext.hf.hashed_file import BLOCK, HashedFile
from megatron_ext.hf.mapped_tensor import load_mapped
from megatron_ext.hf.one_ahead import one_ahead
from megatron_ext.hf.output_folder import published_when_complete
from megatron_ext.hf.weight_files import write_safetensors
from megatron_ext.hf.weight_source import WeightSource
from tests.conversion.large_model import Shape, write_large_model
from tests.unit.processes import run_tool

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def some_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    """Of one, two and no dimensions, one that is no block of memory, and names that JSON must escape."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7,), "b.weight": (3, 5), 'quote " and ü': (1,), "scalar": ()}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**tensors, "turned": torch.randn(4, 6, generator=generator).to(dtype).t()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_streamed_file_holds_what_safetensors_would_write(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = some_tensors(dtype)
    write_safetensors(tmp_path / "ours", {name: tuple(value.shape) for name, value in tensors.items()}, dtype, tensors.items())
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].dtype != dtype or not torch.equal(ours[name], theirs[name])] == []
    with safe_open(tmp_path / "ours", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    (tmp_path / "plain").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert int.from_bytes((tmp_path / "ours").read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_source_reads_what_safetensors_wrote(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: value.contiguous() for name, value in some_tensors(dtype).items()}
    save_file({**tensors, "empty": torch.empty(0, 3, dtype=dtype)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    source = WeightSource(tmp_path)
    for name, value in tensors.items():
        read = source.read(name)
        assert read.dtype == dtype and torch.equal(read, value)
        assert read.untyped_storage().nbytes() == value.nbytes, "torch.save would store the rest of the file too"
        read.zero_()  # a private view: the file stays as it is
    assert source.read("empty").shape == (0, 3)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert source.files.sums() == {"model.safetensors": blake3(before).hexdigest()}


def test_a_source_that_becomes_shorter_is_one_line(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(10_000)}, tmp_path / "model.safetensors")
    source = WeightSource(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="tensor a cannot be read"):
        source.read("a")


def test_one_tensor_of_a_checkpoint_is_alive_while_the_next_is_made(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def make(value: int) -> Tensor:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        tensor = torch.full((10, 10), float(value))
        alive.append(weakref.ref(tensor))
        return tensor

    tensors = [LazyTensor(f"decoder.{index}", (10, 10), torch.float32, lambda index=index: make(index)) for index in range(20)]
    written = write_tensors(tmp_path, tensors)
    assert len(alive) == 20 and most <= 1
    content = (tmp_path / TENSOR_FILE).read_bytes()
    assert written == {TENSOR_FILE: {"bytes": len(content), "blake3": blake3(content).hexdigest()}}


def test_one_tensor_of_a_model_is_alive_while_the_next_is_made(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for index in range(20):
            most = max(most, sum(reference() is not None for reference in alive))
            tensor = torch.full((10, 10), float(index))
            alive.append(weakref.ref(tensor))
            yield str(index), tensor
            del tensor

    write_safetensors(tmp_path / "file", {str(index): (10, 10) for index in range(20)}, torch.float32, tensors())
    assert len(alive) == 20 and most <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    assert all_finite(torch.empty(0, dtype=dtype))
    for size in (1, 3, 16, 17, 1000, 100_003):
        for place in {0, size // 2, size - 1}:
            tensor = torch.randn(size).to(dtype)
            assert all_finite(tensor)
            tensor[place] = bad
            assert not all_finite(tensor), (size, place)


def test_sums_are_those_of_the_file(tmp_path: Path) -> None:
    pieces = [b"a" * 10, memoryview(bytes(range(256)) * (BLOCK // 256) + b"end"), b"", b"z"]
    with HashedFile(tmp_path / "file") as file:
        assert [file.write(piece) for piece in pieces] == [len(piece) for piece in pieces]
        assert file.tell() == sum(map(len, pieces))
    content = (tmp_path / "file").read_bytes()
    assert content == b"".join(pieces)
    assert file.description == {"bytes": len(content), "blake3": blake3(content).hexdigest()}


def test_a_write_that_fails_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    def refuse() -> Tensor:
        raise UserError("the folder holds NaN or infinity")

    tensors = [LazyTensor("a", (3,), torch.float32, lambda: torch.zeros(3)), LazyTensor("b", (3,), torch.float32, refuse)]
    with pytest.raises(UserError, match="holds NaN or infinity"), published_when_complete(tmp_path / "out") as folder:
        write_tensors(folder, tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder with 390 MB of weights, and the bytes of its largest tensor."""
    folder = tmp_path_factory.mktemp("large")
    return folder, write_large_model(folder, Shape(layers=10, hidden=1024, ffn=4096, heads=16, groups=4, vocabulary=20_480))


def test_the_benchmark_measures_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make bench-conversion` calls for each family; the limit is that of the documents."""
    from tests.conversion.measure import measure_parity
    from tests.unit import hf_models

    monkeypatch.setattr(hf_models, "RECIPES", {"qwen3 tied": hf_models.RECIPES["qwen3 tied"]})
    (found,) = measure_parity(tmp_path).values()
    assert found["class"] == "Qwen3ForCausalLM" and 0 < max(found["import"], found["export"]) < 1e-4


def test_memory_does_not_grow_with_the_model(large_model: tuple[Path, int], tmp_path: Path) -> None:
    """Against a model of next to no size, whose conversion takes the memory that Python, torch and transformers take."""
    folder, largest = large_model
    (tmp_path / "tiny").mkdir()
    write_large_model(tmp_path / "tiny", Shape(layers=1, hidden=64, ffn=64, heads=2, groups=1, vocabulary=512))
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    allowed = 3 * largest + 50_000_000
    assert allowed < total / 2
    peaks = {}
    for name, model in (("tiny", tmp_path / "tiny"), ("large", folder)):
        checkpoint, out = tmp_path / f"{name}-checkpoint", tmp_path / f"{name}-out"
        steps = (("import", model, checkpoint), ("export", checkpoint, out))
        ended = [run_tool("tools/convert_checkpoint.py", *step, "--no-verify") for step in steps]
        assert [run.code for run in ended] == [0, 0], [run.err[-2000:] for run in ended]
        peaks[name] = [run.peak_bytes for run in ended]
    growth = [large - tiny for large, tiny in zip(peaks["large"], peaks["tiny"], strict=True)]
    assert max(growth) < allowed, (growth, largest, total)
    before = WeightSource(folder)
    after = WeightSource(tmp_path / "large-out")
    assert before.shapes.keys() == after.shapes.keys()
    assert [name for name in before.shapes if not torch.equal(before.read(name), after.read(name))] == []
    record = read_run_file(tmp_path / "large-checkpoint")
    assert record["imported"]["files"].items() >= before.files.sums().items()
    assert find_damage(tmp_path / "large-checkpoint") == {}


TENSORS = {
    "plain": torch.arange(60.0).view(3, 4, 5),
    "bfloat16": torch.randn(7, 3).bfloat16(),
    "float8": torch.randn(16).to(torch.float8_e4m3fn),
    "integers": torch.arange(10),
    "empty": torch.empty(0, 4),
    "one number": torch.tensor(3.5),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "part of a larger one": torch.arange(12.0)[4:8],
    "beginning of a larger one": torch.arange(12.0)[:8],
    "two in a list": [torch.ones(2), torch.zeros(3)],
    "parameter": torch.nn.Parameter(torch.ones(3)),
    "negated view": torch._neg_view(torch.arange(4.0)),
    "conjugated view": torch.conj(torch.tensor([1 + 2j])),
}


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("with_sums", [True, False])
def test_a_mapped_archive_is_what_torch_loads(name: str, with_sums: bool, tmp_path: Path) -> None:
    start, path = 1003, tmp_path / "file"
    with open(path, "wb") as file, config.patch("save.compute_crc32", with_sums):
        file.write(b"x" * start)
        torch.save(TENSORS[name], file)
        length = file.tell() - start
        file.write(b"what follows")
    expected = torch.load(io.BytesIO(path.read_bytes()[start : start + length]), weights_only=True)
    for dtype in (torch.float64, flat(expected)[0].dtype):  # another one than expected, and the right one
        found = load_mapped(path, start, length, dtype)
        assert type(found) is type(expected)
        for one, other in zip(flat(found), flat(expected), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(*(value.resolve_neg().resolve_conj().reshape(-1).view(torch.uint8) for value in (one, other)))


def test_a_quantized_tensor_is_read_and_not_mapped(tmp_path: Path) -> None:
    torch.save(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), tmp_path / "file")
    for dtype in (torch.float32, torch.uint8, torch.quint8):
        found = load_mapped(tmp_path / "file", 0, (tmp_path / "file").stat().st_size, dtype)
        assert torch.equal(found.dequantize(), torch.ones(3))


def test_a_damaged_archive_is_not_mapped(tmp_path: Path) -> None:
    torch.save(torch.ones(1000), tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    for damaged in (whole[:-30], whole[:2000], b"", b"junk" * 100):
        (tmp_path / "file").write_bytes(damaged)
        with pytest.raises((OSError, RuntimeError, zipfile.BadZipFile)):
            load_mapped(tmp_path / "file", 0, len(whole), torch.float32)


def test_an_index_that_points_elsewhere_is_no_map(tmp_path: Path) -> None:
    """What lies there are other numbers: torch refuses it, and so must we."""
    torch.save(torch.ones(1000), tmp_path / "file")
    content = bytearray((tmp_path / "file").read_bytes())
    length = len(content)
    index = content.rindex(b"file/data/0") - 46  # the central directory's entry; its offset is the last of its fixed part
    assert content[index : index + 4] == b"PK\x01\x02"
    for moved in (-4, 4, 400, 4000):
        changed = bytearray(content)
        (offset,) = struct.unpack_from("<I", changed, index + 42)
        struct.pack_into("<I", changed, index + 42, offset + moved)
        (tmp_path / "file").write_bytes(changed + bytes(10_000))
        with pytest.raises(RuntimeError):
            load_mapped(tmp_path / "file", 0, length, torch.float32)


def test_a_file_that_cannot_be_summed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(10)}, tmp_path / "model.safetensors")

    def fails(path: Path) -> str:
        raise MemoryError("no room")

    monkeypatch.setattr(summed_files, "file_sum", fails)
    with pytest.raises(UserError, match=r"model.safetensors cannot be read \(MemoryError: no room\)"):
        summed_files.SummedFiles(tmp_path).sums()


def test_one_ahead_keeps_the_order_and_fails_when_its_turn_comes() -> None:
    assert list(one_ahead(iter(range(100)))) == list(range(100))
    assert list(one_ahead([])) == []

    def fails() -> Iterator[int]:
        yield 1
        yield 2
        raise UserError("the third")

    items = one_ahead(fails())
    assert (next(items), next(items)) == (1, 2)
    with pytest.raises(UserError, match="the third"):
        next(items)
