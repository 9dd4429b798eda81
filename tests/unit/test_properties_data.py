"""Properties of the way from texts to samples: for any texts, damage, order of work, documents and weights."""

import gzip
import io
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import torch
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_ext.config import DataSource
from megatron_ext.data import corpus as corpus_module
from megatron_ext.data.corpus import Counts, preprocess
from megatron_ext.data.dataset import (
    BLEND_PERIOD,
    Blend,
    DocumentBlocks,
    IndexedDocuments,
    Sample,
    open_blend,
    split_documents,
)
from megatron_ext.data.readers import ReaderSettings, Reject, read_documents
from megatron_ext.errors import UserError
from tests.conftest import Corpus
from tests.unit.properties import TEXTS, examples

EOS = 3
RECORDS = st.one_of(TEXTS, TEXTS, st.sampled_from(["\ud800", "", " \n", None, 5, ["x"]]))
CAUSES = {"broken_json", "missing_field", "not_text", "invalid_utf8", "empty_text", "too_long", "unreadable_file"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of its own for the examples, which empty it themselves."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


def write_records(folder: Path, records: list, cuts: list[int], formats: list[str]) -> list[Path]:
    """The records in files of several formats, cut at some places."""
    edges = sorted({0, len(records), *(cut for cut in cuts if cut < len(records))})
    paths = []
    for number, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        ending = formats[number % len(formats)]
        part = records[start:end]
        path = folder / f"{number:02d}{ending}"
        lines = "".join(json.dumps({"text": record}) + "\n" for record in part).encode()
        if ending == ".parquet" and all(isinstance(record, str) and "\ud800" not in record for record in part):
            pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(part, pyarrow.string())}), path)
        elif ending == ".jsonl.gz":
            path.write_bytes(gzip.compress(lines, 1))
        else:
            path = folder / f"{number:02d}.jsonl"
            path.write_bytes(lines)
        paths.append(path)
    return paths


def contents(prefix: Path) -> dict[str, bytes]:
    return {ending: Path(f"{prefix}{ending}").read_bytes() for ending in (".bin", ".idx", ".json")}


@examples(40)
@given(
    records=st.lists(RECORDS, min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 11), max_size=5),
    formats=st.lists(st.sampled_from([".jsonl", ".jsonl.gz", ".parquet"]), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_texts_come_back_whatever_the_order_of_work_and_the_stops(
    corpus: Corpus, folder: Path, records: list, cuts: list[int], formats: list[str], data: st.DataObject
) -> None:
    emptied(folder)
    paths = write_records(folder, records, cuts, formats)
    accepted = [text for text in records if isinstance(text, str) and text.strip() and "\ud800" not in text]
    options = {"workers": 1, "progress": False}
    if not accepted:
        with pytest.raises(UserError, match="no document in"):
            preprocess(paths, folder / "out", corpus.tokenizer, **options)
        return
    counts = preprocess(paths, folder / "out", corpus.tokenizer, **options)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(corpus.tokenizer))
    dataset = IndexedDataset(str(folder / "out"))
    assert [ids.tolist() for ids in dataset[:]] == [[*processor.encode(text), EOS] for text in accepted]
    assert counts.documents == len(accepted)
    assert counts.documents + sum(counts.rejected.values()) == len(records)
    # Now with the files done in another order, as workers may, and stopped some time on the way.
    order = data.draw(st.permutations(range(len(paths))))
    stop = data.draw(st.integers(0, len(paths)))
    make_one = corpus_module._make_shard

    def results(tasks, workers) -> Iterator[tuple[int, Counts]]:
        for done, index in enumerate([index for index in order if index in tasks]):
            if done == stop:
                raise KeyboardInterrupt
            yield index, make_one(*tasks[index])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "_results", results)
        for _ in range(len(paths) + 1 if stop else 1):
            try:
                preprocess(paths, folder / "again", corpus.tokenizer, **options)
            except KeyboardInterrupt:
                continue
    preprocess(paths, folder / "again", corpus.tokenizer, **options)
    assert contents(folder / "again") == contents(folder / "out")


def packed(lines: bytes, ending: str) -> bytes:
    if ending == ".parquet":
        sink = io.BytesIO()
        texts = [f"text {number}" for number in range(len(lines) % 50)]
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), sink)
        return sink.getvalue()
    if ending.endswith(".gz"):
        return gzip.compress(lines)
    return zstandard.compress(lines) if ending.endswith(".zst") else lines


@examples(250)
@given(
    lines=st.lists(TEXTS.map(lambda text: json.dumps({"text": text}).encode()) | st.binary(max_size=40), max_size=8),
    ending=st.sampled_from([".jsonl", ".txt", ".jsonl.gz", ".txt.zst", ".parquet"]),
    text_documents=st.sampled_from(["file", "paragraph", "line"]),
    damage=st.lists(st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=4)), max_size=3),
    cut=st.none() | st.integers(0, 600),
)
def test_any_file_gives_texts_and_rejects_only(folder: Path, lines, ending, text_documents, damage, cut) -> None:
    content = bytearray(packed(b"\n".join(lines), ending))
    for place, junk in damage:
        place %= len(content) + 1
        content[place : place + len(junk)] = junk
    path = folder / f"file{ending}"
    path.write_bytes(content[:cut])
    places = []
    for record in read_documents(path, ReaderSettings(text_documents=text_documents, max_line_bytes=50)):
        if isinstance(record, Reject):
            assert record.cause in CAUSES and len(record.head) <= 4 * 200
            places.append(record.line)
            continue
        line, text = record
        assert text.strip() and 0 < len(text.encode("utf-8")) <= 50
        places.append(line)
    assert places == sorted(places)
    marks = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
    if ending == ".jsonl" and not damage and cut is None and not content.startswith(marks):
        assert len(places) == sum(bool(line.strip()) for line in b"\n".join(lines).split(b"\n"))


def write_dataset(prefix: Path, lengths: list[int]) -> str:
    """Documents in which every token is unique: counting up."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    start = 0
    for length in lengths:
        builder.add_document(torch.arange(start, start + length), [length])
        start += length
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@examples(80)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 40), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_an_epoch_is_all_documents_in_some_order_cut_into_samples(
    folder: Path, lengths: list[int], sequence_length: int, seed: int, epoch: int
) -> None:
    total = sum(lengths)
    prefix = write_dataset(folder / "set", [*lengths, 1])  # a token file must not be empty
    indexed = IndexedDocuments(prefix)
    if total < sequence_length:
        with pytest.raises(UserError, match="needs at least one sample"):
            DocumentBlocks(indexed, range(len(lengths)), sequence_length, seed, 0, "the set")
        return
    blocks = DocumentBlocks(indexed, range(len(lengths)), sequence_length, seed, 0, "the set")
    count = blocks.samples_per_epoch
    assert count == total // sequence_length
    samples = [blocks.sample(epoch * count + k) for k in range(count)]
    assert all(len(sample.tokens) == sequence_length == sample.segment_lengths.sum() for sample in samples)
    assert all((sample.segment_lengths > 0).all() for sample in samples)
    stream = np.concatenate([sample.tokens for sample in samples]).tolist()
    assert len(set(stream)) == len(stream) and set(stream) <= set(range(total))
    starts = {sum(lengths[:k]): sum(lengths[: k + 1]) for k, length in enumerate(lengths) if length}
    position = 0
    while position < len(stream):
        document = list(range(stream[position], starts[stream[position]]))  # fails unless a document begins here
        part = stream[position : position + len(document)]
        assert part == document[: len(part)]
        position += len(part)
    assert total - len(stream) < sequence_length


@examples(200)
@example(10**9, 0.5, 1.0, 9e-7)
@given(st.integers(0, 10**9), st.floats(0, 1), st.floats(0, 1) | st.just(1.0), st.floats(-9e-7, 9e-7))
def test_splits_part_the_documents(count: int, first: float, second: float, error: float) -> None:
    shares = [first, max(0.0, (1 - first) * second + error), (1 - first) * (1 - second)]  # a sum of almost 1 is accepted
    parts = split_documents(count, shares)
    assert parts[0].start == 0 and parts[2].stop == count
    assert all(0 <= part.start <= part.stop <= count for part in parts)
    assert (parts[0].stop, parts[1].stop) == (parts[1].start, parts[2].start)


class Recorder:
    """A source whose sample says where it came from."""

    samples_per_epoch = 1000

    def __init__(self, number: int):
        self.number = number

    def sample(self, index: int) -> Sample:
        return Sample(np.array([self.number, index]), np.array([2]))


@examples(40)
@given(st.lists(st.floats(1e-320, 1.7e308) | st.integers(1, 100).map(float), min_size=1, max_size=6), st.integers(0, 10**12))
def test_blends_are_within_one_of_exact(weights: list[float], start: int) -> None:
    blend = Blend([Recorder(number) for number in range(len(weights))], weights)
    total = sum(map(Fraction, weights))
    assert sum(blend.counts) == BLEND_PERIOD
    for weight, count in zip(weights, blend.counts, strict=True):
        assert abs(count - Fraction(weight) / total * BLEND_PERIOD) <= 1
    seen: dict[int, int] = {}
    for index in range(start, start + 50):
        source, own = blend.sample(index).tokens.tolist()
        assert own == seen.get(source, own), "each source is read without gaps"
        seen[source] = own + 1


@examples(60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 100))
def test_repeated_samples_are_counted(folder: Path, first: int, second: int, samples: int) -> None:
    sources = [write_dataset(folder / name, [1] * size) for name, size in (("a", first), ("b", second))]
    blend = open_blend([DataSource(prefix=prefix) for prefix in sources], 0, (1, 0, 0), 1, 0)
    asked: list[tuple[str, int]] = []
    for number, source in enumerate(blend.sources):
        source.sample = lambda index, number=number, source=source: asked.append((number, index % source.samples_per_epoch))
    for index in range(samples):
        blend.sample(index)
    assert blend.repeated(samples) == len(asked) - len(set(asked))


@pytest.mark.parametrize("weight", [1e-6, 1e-300])
def test_a_source_that_would_never_be_drawn_is_refused(folder: Path, weight: float) -> None:
    prefix = write_dataset(folder / "set", [10])
    with pytest.raises(UserError, match=f"{prefix} has the weight {weight}: below 1/65536"):
        open_blend([DataSource(prefix=prefix), DataSource(prefix=prefix, weight=weight)], 0, (1, 0, 0), 2, 0)


@examples(300)
@given(st.data(), st.lists(st.integers(0, 9), min_size=1, max_size=12), st.booleans())
def test_a_damaged_index_is_refused_or_harmless(folder: Path, data: st.DataObject, lengths: list[int], cut: bool) -> None:
    """Whatever bytes change: every document that is offered can be read, and lies within the token file."""
    prefix = write_dataset(folder / "set", [*lengths, 1])
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(9, len(index) - 1))
        if data.draw(st.booleans()):
            number = data.draw(st.sampled_from([-1, 0, 1, 2**31 - 1, 2**40, 2**63 - 1, -(2**63)]))
            index[place : place + 8] = struct.pack("<q", number)[: len(index) - place]
        else:
            index[place] = data.draw(st.integers(0, 255))
    Path(f"{prefix}.idx").write_bytes(index[: data.draw(st.integers(0, len(index)))] if cut else index)
    try:
        documents = IndexedDocuments(prefix)
    except UserError as error:
        assert str(error).startswith(f"data set {prefix}: ") and str(error).isprintable()
        return
    size = Path(f"{prefix}.bin").stat().st_size
    for number, length in enumerate(documents.lengths.tolist()):
        assert 0 <= length <= size
        assert len(documents.read(number, 0, length)) == length
