"""Samples of Megatron data sets against a reconstruction that concatenates and cuts, blends and splits against their definition."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ext.config import DataSource
from megatron_ext.data.dataset import (
    BLEND_PERIOD,
    Blend,
    DocumentBlocks,
    IndexedDocuments,
    Sample,
    dataset_fingerprint,
    open_blend,
    split_documents,
)
from megatron_ext.errors import UserError
from megatron_ext.objective import DOCUMENT_STREAM, random_generator

LENGTHS = (5, 1, 17, 40, 3, 8, 8, 29, 2, 11, 64, 7, 1, 13, 23)  # 232 tokens
SEED = 11


def write_dataset(prefix: Path, lengths: Sequence[int], first_token: int = 0, dtype: type = np.int32) -> str:
    """A data set in which every token is unique: counting up from `first_token`."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for start, length in zip(np.cumsum([first_token, *lengths]), lengths, strict=False):
        builder.add_document(torch.arange(start, start + length), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def documents_of(lengths: Sequence[int], first_token: int = 0) -> list[list[int]]:
    ends = np.cumsum([first_token, *lengths])
    return [list(range(start, end)) for start, end in zip(ends, ends[1:], strict=False)]


def blocks(prefix: str, sequence_length: int, source: int = 0, seed: int = SEED, documents: range | None = None) -> DocumentBlocks:
    indexed = IndexedDocuments(prefix)
    return DocumentBlocks(indexed, documents or range(len(indexed.lengths)), sequence_length, seed, source, "the set")


def reconstruct(documents: list[list[int]], order: Sequence[int], sequence_length: int) -> list[tuple[list[int], list[int]]]:
    """(tokens, lengths of the pieces) of every sample of one epoch: lay the documents end to end, cut, drop the rest."""
    stream = [(token, number) for number in order for token in documents[number]]
    samples = []
    for start in range(0, len(stream) - sequence_length + 1, sequence_length):
        cut = stream[start : start + sequence_length]
        pieces: list[list[int]] = []
        for k, (token, number) in enumerate(cut):
            if k == 0 or cut[k - 1][1] != number:
                pieces.append([])
            pieces[-1].append(token)
        samples.append(([token for token, _ in cut], [len(piece) for piece in pieces]))
    return samples


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", LENGTHS)


@pytest.mark.parametrize("sequence_length", [1, 8, 29, 100, 232])
def test_samples_equal_a_plain_reconstruction(prefix: str, sequence_length: int) -> None:
    data = blocks(prefix, sequence_length, source=2)
    expected = []
    for epoch in range(3):
        order = random_generator(SEED, DOCUMENT_STREAM, epoch, 2).permutation(len(LENGTHS))
        expected += reconstruct(documents_of(LENGTHS), order, sequence_length)
    assert data.samples_per_epoch == 232 // sequence_length
    for index, (tokens, lengths) in enumerate(expected):
        sample = data.sample(index)
        assert sample.tokens.tolist() == tokens
        assert sample.segment_lengths.tolist() == lengths
        assert sample.tokens.dtype == sample.segment_lengths.dtype == np.int64


@pytest.mark.parametrize("sequence_length", [8, 29])
def test_every_epoch_holds_each_document_once(prefix: str, sequence_length: int) -> None:
    data = blocks(prefix, sequence_length)  # both lengths divide the 232 tokens, so nothing is dropped
    count = 232 // sequence_length
    epochs = [[data.sample(epoch * count + k) for k in range(count)] for epoch in range(4)]
    streams = [np.concatenate([sample.tokens for sample in epoch]).tolist() for epoch in epochs]
    for stream in streams:
        assert sorted(stream) == list(range(232))
        for document in documents_of(LENGTHS):
            start = stream.index(document[0])
            assert stream[start : start + len(document)] == document, "documents stay in one piece"
    assert len({tuple(stream) for stream in streams}) == 4, "each epoch has an order of its own"


def test_order_depends_on_seed_and_source(prefix: str) -> None:
    first = [blocks(prefix, 232, source, seed).sample(0).tokens.tolist() for source, seed in ((0, 1), (1, 1), (0, 2), (0, 1))]
    assert first[0] == first[3]
    assert first[0] != first[1] and first[0] != first[2]


def test_samples_do_not_depend_on_the_order_of_reading(prefix: str) -> None:
    forward = blocks(prefix, 29)
    expected = [forward.sample(index).tokens.tolist() for index in range(40)]
    shuffled = blocks(prefix, 29)
    for index in np.random.default_rng(0).permutation(40):
        assert shuffled.sample(int(index)).tokens.tolist() == expected[index]


def test_far_samples_are_found_without_replay(prefix: str) -> None:
    data = blocks(prefix, 8)
    start = time.perf_counter()
    sample = data.sample(10**9)
    assert time.perf_counter() - start < 1.0
    epoch, block = divmod(10**9, 29)
    order = random_generator(SEED, DOCUMENT_STREAM, epoch, 0).permutation(len(LENGTHS))
    assert sample.tokens.tolist() == reconstruct(documents_of(LENGTHS), order, 8)[block][0]


def test_small_tokens_and_empty_documents(tmp_path: Path) -> None:
    lengths = (3, 0, 4, 0, 0, 5)
    data = blocks(write_dataset(tmp_path / "set", lengths, first_token=65_000, dtype=np.uint16), 4)
    stream = np.concatenate([data.sample(k).tokens for k in range(3)])
    assert sorted(stream.tolist()) == list(range(65_000, 65_012))
    assert all((data.sample(k).segment_lengths > 0).all() for k in range(30))


class Recorder:
    """A source whose sample says where it came from."""

    def __init__(self, number: int):
        self.number = number

    def sample(self, index: int) -> Sample:
        return Sample(np.array([self.number, index]), np.array([2]))


@pytest.mark.parametrize("weights", [[1.0], [3.0, 1.0], [0.7, 0.2, 0.1], [1.0, 1.0, 1.0], [1e-4, 1.0], [1e-9, 2.0, 5.0]])
def test_blend_keeps_weights_and_spreads_sources(weights: list[float]) -> None:
    blend = Blend([Recorder(number) for number in range(len(weights))], weights)
    drawn = np.array([blend.sample(index).tokens for index in range(BLEND_PERIOD)])
    shares = np.array(weights) / sum(weights)
    seen = np.stack([drawn[:, 0] == number for number in range(len(weights))])
    assert np.abs(seen.mean(axis=1) - shares).max() <= 1 / BLEND_PERIOD
    # Rounding a source's count to the nearest is off by 1/2, and so is the place in the row by 1/2 for each source.
    ideal = shares[:, None] * np.arange(1, BLEND_PERIOD + 1)
    assert np.abs(np.cumsum(seen, axis=1) - ideal).max() <= 1.5 + len(weights) / 2
    for number in range(len(weights)):
        own = drawn[drawn[:, 0] == number, 1]
        np.testing.assert_array_equal(own, np.arange(len(own)), "each source is read in order, without gaps")


def test_blend_goes_on_after_its_period() -> None:
    blend = Blend([Recorder(0), Recorder(1)], [2.0, 1.0])
    window = range(BLEND_PERIOD - 500, BLEND_PERIOD + 500)
    drawn = [tuple(blend.sample(index).tokens.tolist()) for index in window]
    for number in (0, 1):
        own = [index for source, index in drawn if source == number]
        assert own == list(range(own[0], own[0] + len(own)))
    far = blend.sample(10**9).tokens
    assert far[1] == pytest.approx(10**9 * (2 / 3, 1 / 3)[far[0]], rel=1e-4)


@pytest.mark.parametrize("shares", [(0.98, 0.01, 0.01), (1.0, 0.0, 0.0), (0.5, 0.25, 0.25), (0.34, 0.33, 0.33), (0.0, 0.5, 0.5)])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 100, 12_345])
def test_splits_are_disjoint_and_complete(count: int, shares: tuple[float, ...]) -> None:
    parts = split_documents(count, shares)
    assert [index for part in parts for index in part] == list(range(count))
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - share * count) <= 1


def test_splits_of_a_blend_share_no_token(tmp_path: Path) -> None:
    lengths = [16] * 20
    sources = [
        DataSource(prefix=write_dataset(tmp_path / "a", lengths), weight=1.0),
        DataSource(prefix=write_dataset(tmp_path / "b", lengths, first_token=10_000), weight=1.0),
    ]
    tokens = []
    for share, samples in enumerate((24, 8, 8)):  # 12, 4 and 4 documents of each source
        blend = open_blend(sources, share, (0.6, 0.2, 0.2), 16, SEED)
        tokens.append({int(token) for index in range(samples) for token in blend.sample(index).tokens})
    assert [len(part) for part in tokens] == [24 * 16, 8 * 16, 8 * 16]
    assert set.union(*tokens) == {first + k for first in (0, 10_000) for k in range(320)}


@pytest.mark.parametrize("share, name", [(1, "validation"), (2, "test")])
def test_too_small_split_is_named(prefix: str, share: int, name: str) -> None:
    with pytest.raises(UserError, match=f"the {name} split of {prefix} holds 0 tokens.*data.sequence_length 8") as caught:
        open_blend([DataSource(prefix=prefix)], share, (1.0, 0.0, 0.0), 8, SEED)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="holds 232 tokens in 15 documents: data.sequence_length 233"):
        open_blend([DataSource(prefix=prefix)], 0, (1.0, 0.0, 0.0), 233, SEED)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_missing_file_is_named(prefix: str, tmp_path: Path, ending: str) -> None:
    for other in {".bin", ".idx"} - {ending}:
        (tmp_path / f"set{other}").write_bytes(Path(prefix + other).read_bytes())
    with pytest.raises(UserError, match=f"there is no file {tmp_path}/set{ending}"):
        IndexedDocuments(str(tmp_path / "set"))


HEADER = 9  # "MMIDIDX" and two zero bytes; then version (8 bytes), dtype (1), sequences (8), documents (8)
DAMAGES = {
    "empty": lambda index: b"",
    "text": lambda index: b"this is no index\n" * 20,
    "other version": lambda index: index[:HEADER] + b"\x07" + index[HEADER + 1 :],
    "unknown dtype": lambda index: index[: HEADER + 8] + b"\x63" + index[HEADER + 9 :],
    "impossible count": lambda index: index[: HEADER + 9] + b"\xff" * 7 + b"\x7f" + index[HEADER + 17 :],
    "cut after the magic": lambda index: index[:HEADER],
    "cut in the header": lambda index: index[: HEADER + 12],
    "cut after the header": lambda index: index[: HEADER + 25],
    "cut in the lengths": lambda index: index[: HEADER + 35],
    "last byte missing": lambda index: index[:-1],
}


def refusal(prefix: str) -> tuple[type, str] | None:
    """Type and message of the error on opening a data set; the error itself would keep megatron's half-built reader alive."""
    try:
        IndexedDocuments(prefix)
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # megatron's reader cannot be deleted half built
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_index_is_named(prefix: str, tmp_path: Path, damage: str) -> None:
    (tmp_path / "set.bin").write_bytes(Path(prefix + ".bin").read_bytes())
    (tmp_path / "set.idx").write_bytes(DAMAGES[damage](Path(prefix + ".idx").read_bytes()))
    kind, message = refusal(str(tmp_path / "set")) or (None, "")
    assert kind is UserError, f"{kind}: {message}"
    assert message.startswith(f"data set {tmp_path}/set: ")
    assert "\n" not in message


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kept", [0, 100])
def test_cut_token_file_is_named(prefix: str, tmp_path: Path, kept: int) -> None:
    """A copy that was interrupted is found when the set is opened, not in the middle of the training."""
    (tmp_path / "set.bin").write_bytes(Path(prefix + ".bin").read_bytes()[:kept])
    (tmp_path / "set.idx").write_bytes(Path(prefix + ".idx").read_bytes())
    kind, message = refusal(str(tmp_path / "set")) or (None, "")
    assert kind is UserError, f"{kind}: {message}"
    assert f"{tmp_path}/set.bin" in message


def test_fingerprint_follows_the_documents(tmp_path: Path) -> None:
    same = [dataset_fingerprint(write_dataset(tmp_path / name, LENGTHS)) for name in ("a", "b")]
    assert same[0] == same[1]
    assert dataset_fingerprint(write_dataset(tmp_path / "c", LENGTHS[::-1])) != same[0]
    assert dataset_fingerprint(write_dataset(tmp_path / "d", [*LENGTHS, 1])) != same[0]


def test_sentences_of_a_document_stay_together(tmp_path: Path) -> None:
    """Stock Megatron data may hold a document as several sequences."""
    prefix = str(tmp_path / "set")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(torch.arange(9), [4, 3, 2])
    builder.add_document(torch.arange(20, 25), [5])
    builder.finalize(f"{prefix}.idx")
    documents = IndexedDocuments(prefix)
    assert documents.lengths.tolist() == [9, 5]
    assert documents.read(0, 3, 5).tolist() == [3, 4, 5, 6, 7]
    assert documents.read(1, 1, 4).tolist() == [21, 22, 23, 24]


def test_threads_that_are_in_different_epochs_do_not_disturb_each_other(prefix: str) -> None:
    """The log of what was trained on looks samples up while the loader is two steps ahead."""
    shared, alone = blocks(prefix, 8), blocks(prefix, 8)
    edge = alone.samples_per_epoch
    expected = {index: alone.sample(index).tokens.tolist() for index in range(3 * edge)}
    wrong: list[int] = []

    def read(start: int) -> None:
        for turn in range(4000):
            index = (start + turn) % len(expected)
            if shared.sample(index).tokens.tolist() != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(start,)) for start in (0, edge - 2, 2 * edge)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
