"""Preprocessing: what is read back with Megatron's own reader, what is rejected, and that neither workers nor stops change it."""

import gzip
import hashlib
import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.data import corpus
from megatron_ext.data.corpus import Counts, preprocess, read_dataset_info
from megatron_ext.data.readers import ReaderSettings, Reject, expand_inputs, read_documents
from megatron_ext.errors import UserError

EOS = 2
TEXTS = [f"document {number} speaks of {'many ' * (number % 5)}things" for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("tokenizer") / "tok"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(prefix),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return Path(f"{prefix}.model")


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def inputs(tmp_path) -> list[Path]:
    """One file of each format; their documents in order are TEXTS."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(TEXTS[:10]) + b"\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[10:20])))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(jsonl(TEXTS[20:25])) + zstandard.compress(jsonl(TEXTS[25:30])))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[30:40], "id": list(range(10))}), folder / "d.parquet")
    (folder / "e.txt").write_text("\n\n".join(TEXTS[40:50]))
    (folder / "f.txt.gz").write_bytes(gzip.compress("\n \n\n".join(TEXTS[50:]).encode()))
    return expand_inputs([str(folder)])


def run(inputs, prefix, tokenizer, **options) -> Counts:
    return preprocess(inputs, prefix, tokenizer, progress=False, text_documents="paragraph", **{"workers": 1, **options})


def rejected(path: Path, **settings) -> list[tuple[int, str]]:
    records = read_documents(path, ReaderSettings(**settings))
    return [(record.line, record.cause) for record in records if isinstance(record, Reject)]


def test_megatron_reads_the_documents_back(inputs, tmp_path, tokenizer):
    counts = run(inputs, tmp_path / "out", tokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    dataset = IndexedDataset(str(tmp_path / "out"))
    assert [ids.tolist() for ids in dataset[:]] == [[*processor.encode(text), EOS] for text in TEXTS]
    assert dataset.document_indices.tolist() == list(range(len(TEXTS) + 1))
    assert dataset.index.dtype.__name__ == "uint16"
    assert counts == Counts(60, int(dataset.sequence_lengths.sum()), {})
    info = read_dataset_info(tmp_path / "out")
    assert (info.documents, info.tokens, info.eos_id, info.vocab_size) == (60, counts.tokens, EOS, processor.vocab_size())
    assert not (tmp_path / "out.shards").exists()
    assert not (tmp_path / "out.rejects.jsonl").exists()


def test_workers_change_nothing(inputs, tmp_path, tokenizer):
    run(inputs, tmp_path / "one", tokenizer)
    run(inputs, tmp_path / "two", tokenizer, workers=2)
    for ending in (".bin", ".idx", ".json"):
        assert Path(f"{tmp_path}/one{ending}").read_bytes() == Path(f"{tmp_path}/two{ending}").read_bytes()


def test_bad_lines_are_counted_and_listed(tmp_path, tokenizer):
    lines = [
        b'{"text": "good \\u0000 one"}',
        b'{"text": "cut off',
        b'{"content": "elsewhere"}',
        b"[1, 2]",
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": "\xff\xfe"}',
        b'{"text": "\\ud800"}',
        b'{"text": " \\n "}',
        b'{"text": "' + b"x" * 3000 + b'"}',
        b"[" * 2500,
        b'{"text": "good two"}',
    ]
    source = tmp_path / "bad.jsonl"
    source.write_bytes(b"\n".join(lines))
    counts = run([source], tmp_path / "out", tokenizer, max_line_bytes=2800)
    expected = {"broken_json": 2, "empty_text": 1, "invalid_utf8": 2, "missing_field": 2, "not_text": 2, "too_long": 1}
    assert (counts.documents, counts.rejected) == (2, expected)
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [record["line"] for record in rejects] == list(range(2, 12))
    assert all(record["input"] == str(source) and len(record["head"]) <= 800 for record in rejects)
    dataset = IndexedDataset(str(tmp_path / "out"))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    assert processor.decode(dataset[0].tolist()) == "good \x00 one"
    assert read_dataset_info(tmp_path / "out").rejected == expected


@pytest.mark.parametrize("ending, compress", [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_damaged_archives_keep_what_was_read(tmp_path, ending, compress):
    texts = [f"{number} {hashlib.sha256(str(number).encode()).hexdigest()}" for number in range(10_000)]
    whole = compress(jsonl(texts))
    path = tmp_path / f"cut.jsonl{ending}"
    path.write_bytes(whole[: len(whole) // 2])
    records = list(read_documents(path, ReaderSettings()))
    assert records[-1].cause == "unreadable_file"
    assert [text for _, text in records[:-1]] == texts[: len(records) - 1]
    assert len(records) > 1000
    path.write_bytes(b"not an archive")
    assert rejected(path) == [(1, "unreadable_file")]


def test_parquet_rejects(tmp_path):
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"good", None, b"\xff", b"x" * 99]}), path)
    assert rejected(path, max_line_bytes=50) == [(2, "not_text"), (3, "invalid_utf8"), (4, "too_long")]
    assert rejected(path, json_field="body") == [(0, "missing_field")]
    path.write_bytes(b"PAR1 nonsense")
    assert rejected(path) == [(1, "unreadable_file")]


@pytest.mark.parametrize(
    "cut, expected",
    [
        ("file", [(1, "one\ntwo\n\n\nthree\n")]),
        ("paragraph", [(1, "one\ntwo"), (5, "three")]),
        ("line", [(1, "one"), (2, "two"), (5, "three")]),
    ],
)
def test_plain_text_documents(tmp_path, cut, expected):
    path = tmp_path / "t.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    assert [(line, text.rstrip("\n")) for line, text in read_documents(path, ReaderSettings(text_documents=cut))] == [
        (line, text.rstrip("\n")) for line, text in expected
    ]
    assert rejected(path, text_documents=cut, max_line_bytes=4)[-1][1] == "too_long"


def test_a_stopped_run_continues(inputs, tmp_path, tokenizer, monkeypatch):
    run(inputs, tmp_path / "whole", tokenizer)
    make_shard, made = corpus._make_shard, []

    def stop_at_fourth(job, identity):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(job.source)
        return make_shard(job, identity)

    monkeypatch.setattr(corpus, "_make_shard", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(inputs, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out.bin").exists()
    inputs[1].write_bytes(gzip.compress(jsonl(TEXTS[10:20]), mtime=1))  # a touched input is read again
    made.clear()
    monkeypatch.setattr(corpus, "_make_shard", lambda job, identity: made.append(job.source) or make_shard(job, identity))
    run(inputs, tmp_path / "out", tokenizer)
    assert made == [inputs[1], *inputs[3:]]
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()
    assert (tmp_path / "out.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()


def test_a_finished_run_is_left_alone_and_never_overwritten(inputs, tmp_path, tokenizer):
    counts = run(inputs, tmp_path / "out", tokenizer)
    written = (tmp_path / "out.bin").stat().st_mtime_ns
    assert run(inputs, tmp_path / "out", tokenizer) == counts
    assert (tmp_path / "out.bin").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="other inputs or settings"):
        run(inputs, tmp_path / "out", tokenizer, append_eos=False)
    (tmp_path / "out.json").unlink()
    assert read_dataset_info(tmp_path / "out") is None
    with pytest.raises(UserError, match="other inputs or settings"):
        run(inputs, tmp_path / "out", tokenizer)


def test_without_eos(inputs, tmp_path, tokenizer):
    counts = run(inputs, tmp_path / "out", tokenizer, append_eos=False)
    assert counts.tokens == run(inputs, tmp_path / "with", tokenizer).tokens - counts.documents
    assert read_dataset_info(tmp_path / "out").eos_id is None


def test_mistakes_are_named(tmp_path, tokenizer):
    empty, unknown = tmp_path / "empty.jsonl", tmp_path / "data.csv"
    empty.write_bytes(b"")
    shutil.copy(empty, unknown)
    for files, message in (([tmp_path / "no.jsonl"], "cannot be read"), ([unknown], "format"), ([empty], "no document")):
        with pytest.raises(UserError, match=message):
            run(files, tmp_path / "out", tokenizer)
    with pytest.raises(UserError, match="nowhere"):
        expand_inputs([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="page"):
        ReaderSettings(text_documents="page")
