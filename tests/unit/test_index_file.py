"""Our `.bin/.idx` pairs against the files of megatron-core's own builder, byte for byte."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_ext.data.index_file import join, token_dtype, writing_documents

VOCAB_SIZES = (100, 65_499, 65_500, 128_256)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_ids_are_stored_as_megatron_stores_them(vocab_size: int) -> None:
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize("eos_id", [None, 7])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_shards_and_their_join_are_megatrons(tmp_path: Path, vocab_size: int, eos_id: int | None) -> None:
    """Two shards, one of them empty in places, and the whole."""
    generator = np.random.default_rng(vocab_size)
    shards = [
        [[generator.integers(0, vocab_size, length, dtype=np.int32) for length in batch] for batch in batches]
        for batches in ([(3, 1, 400), (), (2,)], [(17,), (5_000, 1)])
    ]
    dtype = DType.optimal_dtype(vocab_size)
    whole = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for number, batches in enumerate(shards):
        theirs, tokens = IndexedDatasetBuilder(str(tmp_path / f"theirs{number}.bin"), dtype=dtype), 0
        with writing_documents(str(tmp_path / f"ours{number}"), vocab_size, eos_id) as write:
            for documents in batches:
                tokens += write(documents)
        for ids in (ids for documents in batches for ids in documents):
            ids = ids if eos_id is None else np.append(ids, eos_id)
            theirs.add_document(ids, [len(ids)])
            tokens -= len(ids)
        theirs.finalize(str(tmp_path / f"theirs{number}.idx"))
        whole.add_index(str(tmp_path / f"theirs{number}"))
        assert tokens == 0
        assert_same(tmp_path, str(number))
    whole.finalize(str(tmp_path / "theirs.idx"))
    sums = join((str(tmp_path / f"ours{number}") for number in range(2)), str(tmp_path / "ours"), vocab_size)
    assert_same(tmp_path, "")
    assert sums == {ending: hashlib.sha256((tmp_path / f"theirs{ending}").read_bytes()).hexdigest() for ending in (".bin", ".idx")}
    read = IndexedDataset(str(tmp_path / "ours"))
    assert len(read) == 7 and list(read[0][:3]) == list(shards[0][0][0])


def assert_same(folder: Path, number: str) -> None:
    for ending in (".bin", ".idx"):
        assert (folder / f"ours{number}{ending}").read_bytes() == (folder / f"theirs{number}{ending}").read_bytes()
