"""Files that are wrong, damaged or made to do harm, given to the real tools: one line or a counted reject, bounded memory."""

import gzip
import json
import os
import shutil
import socket
import struct
from collections import defaultdict
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.data import corpus as corpus_module
from megatron_ext.data.corpus import preprocess, read_dataset_info
from megatron_ext.data.dataset import IndexedDocuments
from megatron_ext.data.readers import expand_inputs
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import UserError
from tests.conftest import Corpus
from tests.unit.processes import refusal, run_tool

MIB = 2**20
JUNK = np.random.default_rng(3).bytes(5000).replace(b"\n", b"x")  # one line, and no UTF-8
GOOD = b'{"text": "ba do"}\n'
BIDI = "ba \u202edo\u202c \u2066ki\u2069 \u200blu\u200d \ufeffme"
SENTENCES = [f"{number} ba do ki lu me {number * 7919}" for number in range(4000)]
STEERING = "\x1b[31m\r\x9b2J\x7f\u202e"


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(column: object, name: str = "text", **options: object) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({name: column}), sink, **options)
    return sink.getvalue().to_pybytes()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


Expected = tuple[list[str], list[tuple[int, str]]]
"""The texts of a file that become documents, and (line, cause) of the rejects."""

TOTAL = {"unreadable_file": [(1, "unreadable_file")], "invalid_utf8": [(1, "invalid_utf8")]}


def hostile_files() -> dict[str, tuple[bytes, Expected]]:
    """Name -> content, and what is to come of it."""
    return {
        "junk.jsonl": (JUNK, ([], TOTAL["invalid_utf8"])),
        "junk.txt": (JUNK, ([], TOTAL["invalid_utf8"])),
        "junk.jsonl.gz": (JUNK, ([], TOTAL["unreadable_file"])),
        "junk.txt.zst": (JUNK, ([], TOTAL["unreadable_file"])),
        "junk.parquet": (JUNK, ([], TOTAL["unreadable_file"])),
        "empty.jsonl": (b"", ([], [])),
        "empty.txt": (b"", ([], [])),
        "empty.jsonl.zst": (b"", ([], [])),
        "empty.jsonl.gz": (b"", ([], [])),
        "empty.parquet": (b"", ([], TOTAL["unreadable_file"])),
        "bom.jsonl": (b"\xef\xbb\xbf", ([], [])),
        "bom.txt": (b"\xef\xbb\xbf", ([], [])),
        "utf16.jsonl": (GOOD.decode().encode("utf-16"), ([], TOTAL["unreadable_file"])),
        "utf16.txt": ("ba\ndo\n".encode("utf-16-be").join([b"\xfe\xff", b""]), ([], TOTAL["unreadable_file"])),
        "crlf.jsonl": (GOOD[:-1] + b"\r\n\r\n" + GOOD[:-1] + b"\r\n", (["ba do", "ba do"], [])),
        "crlf.txt": (b"ba\r\ndo\r\n", (["ba\r\ndo"], [])),
        "nul.jsonl": (
            b'{"text": "ba \\u0000 do"}\n{"text": "ba \0 do"}\n\0\0\0\n' + GOOD,
            (["ba \0 do", "ba do"], [(2, "broken_json"), (3, "broken_json")]),
        ),
        "nul.txt": (b"ba \0 do", (["ba \0 do"], [])),
        "surrogates.jsonl": (
            b'{"text": "\\ud800"}\n{"text": "\xed\xa0\x80"}\n{"text": "\\ud83d\\ude42"}\n',
            (["🙂"], [(1, "invalid_utf8"), (2, "invalid_utf8")]),
        ),
        "bidi.jsonl": (jsonl(BIDI), ([BIDI], [])),
        "bidi.txt": (BIDI.encode(), ([BIDI], [])),
        "deep.jsonl": (
            b"[" * 100_000
            + b"\n"
            + b'{"text": ' * 100_000
            + b"\n"
            + b'{"text": "ba", "x": '
            + b"[" * 100_000
            + b"]" * 100_000
            + b"}\n"
            + GOOD,
            (["ba do"], [(1, "broken_json"), (2, "broken_json"), (3, "broken_json")]),
        ),
        "numbers.jsonl": (
            b'{"text": NaN}\n{"text": 1e999}\n{"text": ' + b"9" * 10_000 + b'}\n{"text": -Infinity}\n',
            ([], [(1, "not_text"), (2, "not_text"), (3, "broken_json"), (4, "not_text")]),
        ),
        "twice.jsonl": (b'{"text": "ba", "text": "do"}\n', (["do"], [])),  # as JSON readers have it, the last one counts
        "steering.jsonl": (STEERING.encode() + b"\n" + GOOD, (["ba do"], [(1, "broken_json")])),
        "long.jsonl": (b'{"text": "' + b"a" * (2 * MIB) + b'"}\n' + GOOD, (["ba do"], [(1, "too_long")])),
        "long.txt": (b"ba " * MIB, ([], [(1, "too_long")])),
        "bomb.jsonl.gz": (gzip.compress(b"\0" * 8 * MIB, 1) * 4 + gzip.compress(b"\n" + GOOD), (["ba do"], [(1, "too_long")])),
        "bomb.txt.gz": (gzip.compress(b"\n" * MIB) * 3, ([], [(1, "too_long")])),
        "nested.jsonl.gz": (gzip.compress(gzip.compress(GOOD, mtime=0)), ([], TOTAL["invalid_utf8"])),
        "tail.jsonl.gz": (gzip.compress(GOOD) + b"no archive", (["ba do"], [(2, "unreadable_file")])),
        "tail.jsonl.zst": (zstandard.compress(GOOD) + zstandard.compress(GOOD) + b"no archive", ([], TOTAL["unreadable_file"])),
        "cut.parquet": (half(parquet(SENTENCES)), ([], TOTAL["unreadable_file"])),
        "column.parquet": (parquet(["ba"], name="body"), ([], [(0, "missing_field")])),
        "rows.parquet": (parquet(pyarrow.array([], pyarrow.string())), ([], [])),
        "integers.parquet": (parquet([1, 2]), ([], [(0, "not_text")])),
        "nested.parquet": (parquet([[["ba"]], [["do"]]]), ([], [(0, "not_text")])),
        "struct.parquet": (parquet([{"text": "ba"}]), ([], [(0, "not_text")])),
        "nulls.parquet": (parquet(pyarrow.nulls(3)), ([], [(0, "not_text")])),
        "times.parquet": (parquet(pyarrow.array([2**60], pyarrow.timestamp("ms"))), ([], [(0, "not_text")])),
        "decimals.parquet": (parquet([Decimal("1.5")]), ([], [(0, "not_text")])),
        "large.parquet": (
            parquet(pyarrow.array(["ba", None, " "], pyarrow.large_string())),
            (["ba"], [(2, "not_text"), (3, "empty_text")]),
        ),
        "bytes.parquet": (parquet([b"ba", b"\xff"]), (["ba"], [(2, "invalid_utf8")])),
        "dictionary.parquet": (parquet(pyarrow.array(["ba", "do", "ba"]).dictionary_encode()), (["ba", "do", "ba"], [])),
        "cells.parquet": (parquet(["ba", "x" * (3 * MIB), "do"]), (["ba", "do"], [(2, "too_long")])),
        # 100 rows that all name one text of 8 MiB: 800 MiB if they were decoded together.
        "amplified.parquet": (
            parquet(pyarrow.DictionaryArray.from_arrays([0] * 100, ["x" * (8 * MIB)]), store_schema=False),
            ([], [(row, "too_long") for row in range(1, 101)]),
        ),
    }


def test_a_folder_of_hostile_files_is_tokenized(corpus: Corpus, tmp_path: Path) -> None:
    """Every good record of the folder becomes a document, every other one is listed, and memory stays bounded."""
    folder = tmp_path / "texts"
    folder.mkdir()
    files = hostile_files()
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    for name, compress in (("cut.jsonl.gz", gzip.compress), ("cut.jsonl.zst", zstandard.compress)):
        (folder / name).write_bytes(half(compress(jsonl(*SENTENCES))))
    odd_name = f"odd {STEERING} {'n' * 220}.jsonl"  # with a shard's name in front of it no file system would take it
    (folder / odd_name).write_bytes(b"[]\n")
    (folder / "loop").symlink_to(folder)
    (folder / "turn").symlink_to("turn")
    os.mkfifo(folder / "pipe.jsonl")
    arguments = ("--tokenizer", corpus.tokenizer, "--output-prefix", tmp_path / "out", "--max-line-bytes", MIB, "--workers", 1)
    ended = run_tool("tools/preprocess_data.py", folder, *arguments)
    assert (ended.code, ended.err) == (0, "")
    rejects = defaultdict(list)
    listed = (tmp_path / "out.rejects.jsonl").read_bytes()
    assert set(listed) <= {10, *range(32, 127)}, "nothing in the list steers a terminal"
    for line in listed.splitlines():
        record = json.loads(line)
        rejects[Path(record["input"]).name].append((record["line"], record["cause"]))
    cut = {name: rejects.pop(name) for name in ("cut.jsonl.gz", "cut.jsonl.zst")}
    assert rejects.pop(odd_name) == [(1, "missing_field")]
    assert rejects == {name: expected for name, (_, (_, expected)) in files.items() if expected}
    tokenizer = load_tokenizer(corpus.tokenizer)
    expected = []
    for name in sorted([*files, *cut]):
        if name in cut:
            ((line, cause),) = cut[name]  # the line at which the archive breaks off
            assert cause == "unreadable_file" and (100 if name.endswith("gz") else 1) <= line < len(SENTENCES)
            expected += SENTENCES[: line - 1]
        else:
            expected += files[name][1][0]
    dataset = IndexedDataset(str(tmp_path / "out"))  # its arrays die with it
    found = [tokenizer.decode(ids.tolist()) for ids in dataset[:]]
    assert [text.rstrip("\r\n") for text in found] == expected
    # About 360 MiB are Python with torch (830 with torch's CUDA build and megatron-core 0.19), and 64 MiB a batch of Parquet cells,
    # of which the allocator may keep another.
    limit = (700 if torch.version.cuda is None else 1200) * MIB
    assert ended.peak_bytes < limit, f"{ended.peak_bytes / MIB:.0f} MiB"


@pytest.fixture(scope="module")
def small_run_bytes(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Memory of training a tokenizer on next to nothing."""
    prefix = tmp_path_factory.mktemp("small") / "tokenizer"
    ended = run_tool("tools/train_tokenizer.py", corpus.text, "--output-prefix", prefix, "--vocab-size", 520)
    assert ended.code == 0, ended.err
    return ended.peak_bytes


def write_line(path: Path) -> None:
    with open(path, "wb") as file:
        for _ in range(100):
            file.write(b"x" * 1_000_000)


def write_gzip_bomb(path: Path) -> None:
    path.write_bytes(gzip.compress(b"\0" * 16 * MIB) * 24)


def write_zstd_bomb(path: Path) -> None:
    compress = zstandard.ZstdCompressor(level=1).compress
    path.write_bytes(compress(b'{"text": "') + compress(b"a" * 32 * MIB) * 64)


BOMBS: dict[str, Callable[[Path], None]] = {
    "100 MB in one line.jsonl": write_line,
    "384 MiB of zeros.txt.gz": write_gzip_bomb,
    "2 GiB in one JSON line.jsonl.zst": write_zstd_bomb,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_huge_line_costs_the_limit_and_little_more(name: str, small_run_bytes: int, tmp_path: Path) -> None:
    BOMBS[name](tmp_path / name)
    output = ("--output-prefix", tmp_path / "tokenizer", "--vocab-size", 520)
    ended = run_tool("tools/train_tokenizer.py", tmp_path / name, *output)
    refusal(ended, tmp_path / name, "line 1", "1 too_long", "tokenizer.rejects.jsonl")
    # 64 MiB is the default limit; a buffer that grows has an eighth to spare; the pyarrow library takes some 50 MiB.
    assert ended.peak_bytes < small_run_bytes + (64 + 8 + 64) * MIB, f"{ended.peak_bytes / MIB:.0f} MiB"
    assert not (tmp_path / "tokenizer.model").exists()


@pytest.mark.parametrize("tool", ["preprocess_data", "train_tokenizer"])
def test_what_is_no_file_is_refused(tool: str, corpus: Corpus, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.jsonl"))
    own = {"preprocess_data": ("--tokenizer", corpus.tokenizer), "train_tokenizer": ("--vocab-size", 520)}[tool]
    for name in ("pipe.jsonl", "zero.jsonl", "socket.jsonl", "n" * 5000, "**x/*.jsonl", "missing\x1b[31m.jsonl"):
        ended = run_tool(f"tools/{tool}.py", tmp_path / name, "--output-prefix", tmp_path / "out", *own)
        refusal(ended, f"input {tmp_path}")
    assert not list(tmp_path.glob("out*"))


def test_nothing_to_tokenize_names_file_and_line(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"\n{}\n")
    with pytest.raises(UserError, match=f"{tmp_path}/bad.jsonl line 2: missing_field .*out.rejects.jsonl"):
        preprocess([tmp_path / "bad.jsonl"], tmp_path / "out", corpus.tokenizer, workers=1, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "out.rejects.jsonl"]


def test_wrong_options_are_one_line(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    both = (corpus.text, "--tokenizer", corpus.tokenizer, "--output-prefix")
    refusal(run_tool("tools/preprocess_data.py", *both, tmp_path / "out", "--workers", 0), "workers 0")
    refusal(run_tool("tools/preprocess_data.py", *both, tmp_path / "out", "--workers", "many"), "--workers", "many")
    refusal(run_tool("tools/preprocess_data.py", *both, tmp_path / "out", "--max-line-bytes", 2**31), "2147483648", "1073741824")
    refusal(run_tool("tools/preprocess_data.py", *both, tmp_path / "file/out"), f"output {tmp_path}/file/out", "cannot be written")
    size = ("--vocab-size", 520, "--sample-sentences", 0)
    refusal(run_tool("tools/train_tokenizer.py", corpus.text, "--output-prefix", tmp_path / "out", *size), "0 sentences")


def test_training_a_tokenizer_counts_rejects(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"junk\n" + JUNK)
    arguments = (corpus.text, tmp_path / "bad.jsonl", "--vocab-size", 520, "--output-prefix", tmp_path / "out")
    ended = run_tool("tools/train_tokenizer.py", *arguments)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[1:] == ["rejected: 1 broken_json", "rejected: 1 invalid_utf8"]
    listed = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [(record["input"], record["line"]) for record in listed] == [(f"{tmp_path}/bad.jsonl", 1), (f"{tmp_path}/bad.jsonl", 2)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_bytes(GOOD)
    (tmp_path / "secret.jsonl").chmod(0)
    with pytest.raises(UserError, match="secret.jsonl: cannot be read"):
        preprocess([tmp_path / "secret.jsonl"], tmp_path / "out", corpus.tokenizer, workers=1)


@pytest.mark.parametrize("change", ["grows", "vanishes", "is touched"])
def test_a_file_that_changes_while_it_is_read_stops_the_run(
    change: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "text.jsonl"
    source.write_bytes(GOOD * 3)
    read = corpus_module.read_documents

    def disturbed(path, settings):
        yield from read(path, settings)
        if change == "vanishes":
            path.unlink()
        elif change == "grows":
            path.write_bytes(GOOD * 4)
        else:
            os.utime(path, ns=(0, 0))

    monkeypatch.setattr(corpus_module, "read_documents", disturbed)
    with pytest.raises(UserError, match=f"input {source}: (changed while|cannot be read)"):
        preprocess([source], tmp_path / "out", corpus.tokenizer, workers=1, progress=False)
    assert not (tmp_path / "out.json").exists()


def test_a_touched_file_is_the_same_and_a_changed_one_is_not(corpus: Corpus, tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"

    def run():
        return preprocess([source], tmp_path / "out", corpus.tokenizer, workers=1, progress=False)

    source.write_bytes(GOOD * 100)
    counts = run()
    os.utime(source, ns=(10**18, 10**18))
    assert run() == counts
    times = source.stat().st_mtime_ns
    source.write_bytes(GOOD * 50 + GOOD.replace(b"ba", b"ki") + GOOD * 49)
    os.utime(source, ns=(times, times))
    with pytest.raises(UserError, match="other inputs"):
        run()


def test_damaged_shards_are_made_again(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [tmp_path / f"{number}.jsonl" for number in range(4)]
    for number, source in enumerate(sources):
        source.write_bytes(jsonl(f"ba {number}"))
    preprocess(sources, tmp_path / "whole", corpus.tokenizer, workers=1, progress=False)
    join = corpus_module._join
    monkeypatch.setattr(corpus_module, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        preprocess(sources, tmp_path / "out", corpus.tokenizer, workers=1, progress=False)
    shards = tmp_path / "out.shards"
    (shards / "00000.bin").unlink()
    (shards / "00001.idx").write_bytes(b"")
    (shards / "00002.json").write_bytes(b"[" * 100_000)
    (shards / "00003.json").write_text('{"input": 1}')
    monkeypatch.setattr(corpus_module, "_join", join)
    preprocess(sources, tmp_path / "out", corpus.tokenizer, workers=1, progress=False)
    for ending in (".bin", ".idx"):
        assert Path(f"{tmp_path}/out{ending}").read_bytes() == Path(f"{tmp_path}/whole{ending}").read_bytes()


def test_links_form_no_endless_folders(tmp_path: Path) -> None:
    """Three loops: a pattern that followed them would list 3^40 folders."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.jsonl").write_bytes(GOOD)
    (tmp_path / "deep/.hidden.jsonl").write_bytes(GOOD)
    for number in range(3):
        (tmp_path / f"deep/loop{number}").symlink_to(tmp_path)
    assert expand_inputs([f"{tmp_path}/**/*.jsonl"]) == [tmp_path / "deep/a.jsonl"]
    assert expand_inputs([str(tmp_path)]) == [tmp_path / "deep/.hidden.jsonl", tmp_path / "deep/a.jsonl"]
    assert expand_inputs([f"{tmp_path}/deep/loop1/deep/*.jsonl"]) == [tmp_path / "deep/loop1/deep/a.jsonl"]


# --- tokenizers -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_folder(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer(corpus.tokenizer).to_fast().save_pretrained(folder)
    return folder


HUGE_IDS = {"type": "WordLevel", "vocab": {"[UNK]": 0, "ba": 2**32 - 2}, "unk_token": "[UNK]"}
PLAIN = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
BROKEN_FOLDERS = {
    "broken json": lambda text: text[:-20],
    "deep json": lambda text: '{"version": ' * 100_000,
    "junk": lambda text: "\x1b[31m no json",
    "empty": lambda text: "",
    "other json": lambda text: "[]",
    "huge ids": lambda text: json.dumps({**PLAIN, "truncation": None, "padding": None, "model": HUGE_IDS}),
    "no model": lambda text: json.dumps({**json.loads(text), "model": None}),
}


@pytest.mark.parametrize("name", BROKEN_FOLDERS)
def test_a_broken_tokenizer_folder_is_named(name: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer/tokenizer.json"
    file.write_text(BROKEN_FOLDERS[name](file.read_text()))
    with pytest.raises(UserError, match=f"tokenizer {tmp_path}/tokenizer: ") as caught:
        load_tokenizer(tmp_path / "tokenizer")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_code_in_a_tokenizer_folder_is_not_run(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\nclass Mine: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "code.Mine"]}, "tokenizer_class": "Mine"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        load_tokenizer(folder)
    except UserError as error:
        assert str(folder) in str(error)
    assert not (tmp_path / "it ran").exists()


def test_wrong_files_as_tokenizer_are_refused_before_anything_is_written(corpus: Corpus, tmp_path: Path) -> None:
    model = corpus.tokenizer.read_bytes()
    os.mkfifo(tmp_path / "pipe.model")
    files = {"cut.model": half(model), "zeros.model": bytes(3000), "empty.model": b"", "text.model": corpus.text.read_bytes()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    for name in (*files, "pipe.model", "none.model"):
        with pytest.raises(UserError, match=f"tokenizer {tmp_path}/{name}: "):
            load_tokenizer(tmp_path / name)
    output = ("--output-prefix", tmp_path / "out")
    refusal(run_tool("tools/preprocess_data.py", corpus.text, "--tokenizer", tmp_path / "cut.model", *output), "cut.model")
    assert sorted(tmp_path.iterdir()) == before


# --- data sets --------------------------------------------------------------------------------------------------------------

HEADER = struct.Struct("<9sQBQQ")


def reheaded(version: int | None = None, code: int | None = None, sequences: int | None = None, ends: int | None = None):
    """An edit of an index that replaces fields of its header."""

    def edit(index: bytes) -> bytes:
        magic, *fields = HEADER.unpack(index[: HEADER.size])
        new = [old if given is None else given for old, given in zip(fields, (version, code, sequences, ends), strict=True)]
        return HEADER.pack(magic, *new) + index[HEADER.size :]

    return edit


def with_array(which: int, place: int, value: int):
    """An edit of one number: array 0 holds lengths, 1 pointers, 2 documents."""

    def edit(index: bytes) -> bytes:
        _, _, _, sequences, _ = HEADER.unpack(index[: HEADER.size])
        starts = [HEADER.size, HEADER.size + 4 * sequences, HEADER.size + 12 * sequences]
        kind = "<i" if which == 0 else "<q"
        count = sequences + (which == 2)
        offset = starts[which] + struct.calcsize(kind) * (place % count)
        changed = bytearray(index)
        struct.pack_into(kind, changed, offset, value)
        return bytes(changed)

    return edit


INDEX_DAMAGES = {
    "version": (reheaded(version=2), "version 2"),
    "dtype of no integer": (reheaded(code=6), "dtype code is 6"),
    "unknown dtype": (reheaded(code=200), "dtype code is 200"),
    "2^63 sequences": (reheaded(sequences=2**63), "9223372036854775808 sequences"),
    "-1 sequences": (reheaded(sequences=2**64 - 1), "sequences"),
    "2^60 documents": (reheaded(ends=2**60), "documents"),
    "no documents": (reheaded(sequences=0, ends=0), "bytes"),
    "one sequence more": (reheaded(sequences=401), "401 sequences"),
    "shorter than it says": (lambda index: index[:-8], "bytes"),
    "longer than it says": (lambda index: index + b"\0" * 8, "bytes"),
    "negative length": (with_array(0, 5, -1), "negative length"),
    "huge length": (with_array(0, 5, 2**31 - 1), "cut short"),
    "pointer beyond the tokens": (with_array(1, 5, 2**40), "cut short"),
    "pointer of 2^63": (with_array(1, 5, 2**63 - 1), "cut short"),
    "negative pointer": (with_array(1, 5, -2), "before the token file"),
    "pointers that overlap": (with_array(1, 5, 0), "follow one another"),
    "document beyond the sequences": (with_array(2, 5, 2**40), "backwards"),
    "negative document": (with_array(2, 5, -3), "backwards"),
    "documents that end early": (with_array(2, -1, 399), "span"),
    "documents that begin late": (with_array(2, 0, 1), "span"),
}


@pytest.mark.parametrize("name", INDEX_DAMAGES)
def test_an_index_that_lies_is_refused(name: str, corpus: Corpus, tmp_path: Path) -> None:
    edit, word = INDEX_DAMAGES[name]
    shutil.copy(f"{corpus.prefix}.bin", tmp_path / "set.bin")
    (tmp_path / "set.idx").write_bytes(edit(Path(f"{corpus.prefix}.idx").read_bytes()))
    with pytest.raises(UserError, match=f"^data set {tmp_path}/set: ") as caught:
        IndexedDocuments(str(tmp_path / "set"))
    assert word in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000, JUNK, b'{"documents": 1}', b"null"])
def test_a_junk_sidecar_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/set.json is not a sidecar"):
        read_dataset_info(tmp_path / "set")


def test_a_sidecar_of_wrong_types_is_named(corpus: Corpus, tmp_path: Path) -> None:
    written = json.loads(Path(f"{corpus.prefix}.json").read_text())
    for name, value in (("tokenizer_fingerprint", 5), ("documents", "many"), ("rejected", []), ("inputs", {}), ("eos_id", "2")):
        (tmp_path / "set.json").write_text(json.dumps({**written, name: value}))
        with pytest.raises(UserError, match=f"{name} has a wrong type"):
            read_dataset_info(tmp_path / "set")


def test_the_trainer_names_a_damaged_data_set(corpus: Corpus, tmp_path: Path) -> None:
    for ending in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus.prefix}{ending}", tmp_path / f"set{ending}")
    index = (tmp_path / "set.idx").read_bytes()
    (tmp_path / "set.idx").write_bytes(with_array(2, 5, 2**40)(index))
    tree = {
        "output_dir": str(tmp_path / "run"),
        "data": {"tokenizer": str(corpus.tokenizer), "train": [{"prefix": str(tmp_path / "set")}], "sequence_length": 32},
        "phases": [{"objective": "clm", "steps": 2}],
        "model": {"preset": "nano"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    refusal(run_tool("pretrain_encoder.py", "--config", tmp_path / "run.yaml"), f"{tmp_path}/set.idx", "backwards")
    assert not (tmp_path / "run").exists()
