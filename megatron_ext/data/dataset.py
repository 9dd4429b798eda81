"""Sample i of a data set: fixed-length blocks of its documents, shuffled anew in each epoch; blends and splits.

Sample i is found without replaying what came before: the epoch is i // samples in an epoch, its document order comes from
(seed, source, epoch), and the block's documents from a search in their cumulated lengths.
"""

import hashlib
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_ext.config import DataSource
from megatron_ext.errors import UserError
from megatron_ext.objective import DOCUMENT_STREAM, random_generator

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER_BYTES = 34
"""Magic, version, dtype code, number of sequences, number of documents."""

BLEND_PERIOD = 2**16
"""Samples after which the pattern of a blend repeats; weights are kept to one part in this."""


@dataclass(frozen=True)
class Sample:
    """A block of tokens and the pieces of documents it is made of."""

    tokens: np.ndarray
    """[s] int64."""
    segment_lengths: np.ndarray
    """[k] int64 lengths of the pieces, in order; they sum to s."""


class SampleSource(Protocol):
    """Anything that has a sample for every index >= 0."""

    def sample(self, index: int) -> Sample:
        """The sample with this index."""


class IndexedDocuments:
    """The documents of a Megatron `.bin/.idx` pair. A document of several sequences (sentences, say) counts as one."""

    def __init__(self, prefix: str):
        """
        Args:
            prefix: path without the endings.

        Raises:
            UserError: a file is missing, damaged, or not a Megatron data set.
        """
        indexed = _open_indexed_dataset(prefix)
        sequence_ends = np.concatenate([[0], np.cumsum(indexed.sequence_lengths, dtype=np.int64)])
        first_sequences = np.asarray(indexed.document_indices, dtype=np.int64)
        self.lengths = np.diff(sequence_ends[first_sequences])
        """[documents] int64 tokens in each."""
        self._dtype = indexed.index.dtype
        self._item_size = int(np.dtype(self._dtype).itemsize)
        pointers = np.append(indexed.index.sequence_pointers, 0)
        self._pointers = pointers[first_sequences[:-1]]
        self._reader = indexed.bin_reader
        self._indexed = indexed
        needed = int(np.max(self._pointers + self.lengths * self._item_size, initial=0))
        found = Path(prefix + ".bin").stat().st_size
        if found < needed:
            raise UserError(f"data set {prefix}: {prefix}.bin has {found} bytes, but its index needs {needed}: it was cut short")

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """[length] tokens of a document, from `offset` on."""
        pointer = int(self._pointers[document]) + offset * self._item_size
        return self._reader.read(dtype=self._dtype, count=length, offset=pointer)


def _open_indexed_dataset(prefix: str) -> Any:
    """megatron's reader, with its errors as one line. The magic is checked first: megatron's destructor complains otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    for ending in (".bin", ".idx"):
        if not Path(prefix + ending).is_file():
            raise UserError(f"data set {prefix}: there is no file {prefix}{ending}")
    if Path(prefix + ".bin").stat().st_size == 0:
        raise UserError(f"data set {prefix}: {prefix}.bin is empty")
    with open(prefix + ".idx", "rb") as file:
        header = file.read(INDEX_HEADER_BYTES)
    if not header.startswith(INDEX_MAGIC) or len(header) < INDEX_HEADER_BYTES:
        raise UserError(f"data set {prefix}: {prefix}.idx is not a Megatron index")
    try:
        return IndexedDataset(prefix, mmap=True)
    except (AssertionError, ValueError, OSError, struct.error) as error:
        raise UserError(f"data set {prefix}: {prefix}.idx is not a Megatron index ({error})") from error


class DocumentBlocks:
    """The documents of one split of a data set, cut into blocks of `sequence_length` tokens.

    An epoch is all documents in a fresh order, laid end to end and cut; what is left over at its end is dropped.
    """

    def __init__(self, indexed: IndexedDocuments, documents: range, sequence_length: int, seed: int, source: int, name: str):
        """
        Args:
            indexed: the data set.
            documents: the documents of this split.
            sequence_length: tokens in a sample.
            seed: the run's seed.
            source: number of this set in its blend: sets in a blend are shuffled independently.
            name: for error messages.

        Raises:
            UserError: the split holds less than one sample.
        """
        self._indexed = indexed
        self._first_document = documents.start
        self._lengths = indexed.lengths[documents.start : documents.stop]
        self._sequence_length = sequence_length
        self._seed, self._source = seed, source
        self.tokens = int(self._lengths.sum())
        self.samples_per_epoch = self.tokens // sequence_length
        if self.samples_per_epoch == 0:
            raise UserError(
                f"{name} holds {self.tokens} tokens in {len(documents)} documents: data.sequence_length "
                f"{sequence_length} needs at least one sample"
            )
        self._epoch = -1
        self._order = self._ends = np.zeros(0, dtype=np.int64)

    def sample(self, index: int) -> Sample:
        """Sample `index`; indices beyond the first epoch go on into the next."""
        epoch, block = divmod(index, self.samples_per_epoch)
        self._prepare(epoch)
        position = block * self._sequence_length
        place = int(np.searchsorted(self._ends, position, side="right"))
        tokens, lengths, missing = [], [], self._sequence_length
        while missing:
            document = int(self._order[place])
            offset = position - int(self._ends[place] - self._lengths[document])
            length = min(int(self._lengths[document]) - offset, missing)
            if length:
                tokens.append(self._indexed.read(self._first_document + document, offset, length))
                lengths.append(length)
            missing -= length
            position += length
            place += 1
        return Sample(np.concatenate(tokens).astype(np.int64), np.asarray(lengths, dtype=np.int64))

    def _prepare(self, epoch: int) -> None:
        """Shuffle for an epoch: 8 bytes a document twice, about a second for 10 million documents."""
        if epoch != self._epoch:
            generator = random_generator(self._seed, DOCUMENT_STREAM, epoch, self._source)
            self._order = generator.permutation(len(self._lengths))
            self._ends = np.cumsum(self._lengths[self._order])
            self._epoch = epoch


class Blend:
    """Several sources mixed by weight; which one sample i comes from is a fixed, evenly spread pattern."""

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float]):
        self._sources = list(sources)
        self._pattern, self._rank = _blend_pattern(np.asarray(weights, dtype=np.float64))
        self._counts = np.bincount(self._pattern, minlength=len(self._sources))

    def sample(self, index: int) -> Sample:
        """Sample `index` of the blend: the next one of the source whose turn it is."""
        period, place = divmod(index, BLEND_PERIOD)
        source = int(self._pattern[place])
        return self._sources[source].sample(period * int(self._counts[source]) + int(self._rank[place]))


def _blend_pattern(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One period of a blend: the source of each place, and how often that source came before in the period."""
    exact = weights / weights.sum() * BLEND_PERIOD
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: BLEND_PERIOD - counts.sum()]] += 1
    sources = np.repeat(np.arange(len(weights)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    # Source d would ideally come at the times (rank + 1/2) / count_d: merging these times spreads each source evenly.
    order = np.argsort((ranks + 0.5) / np.maximum(counts[sources], 1), kind="stable")
    return sources[order], ranks[order]


def split_documents(count: int, shares: Sequence[float]) -> tuple[range, range, range]:
    """Cut `count` documents, in order, into training, validation and test."""
    ends = [round(float(share) * count) for share in np.cumsum(shares)]
    return range(ends[0]), range(ends[0], ends[1]), range(ends[1], count)


def open_blend(sources: Sequence[DataSource], share: int, shares: Sequence[float], sequence_length: int, seed: int) -> Blend:
    """Open one split of a blend.

    Args:
        sources: data sets and weights.
        share: 0 training, 1 validation, 2 test.
        shares: the split's shares; (1, 0, 0) with share 0 takes whole sets.
        sequence_length: tokens in a sample.
        seed: the run's seed.
    """
    split = ("training", "validation", "test")[share]
    blocks = []
    for number, source in enumerate(sources):
        indexed = IndexedDocuments(source.prefix)
        documents = split_documents(len(indexed.lengths), shares)[share]
        blocks.append(DocumentBlocks(indexed, documents, sequence_length, seed, number, f"the {split} split of {source.prefix}"))
    return Blend(blocks, [source.weight for source in sources])


def dataset_fingerprint(prefix: str) -> str:
    """SHA-256 over a data set's index and over the size and both ends of its token file (1 MiB each)."""
    digest = hashlib.sha256()
    with open(prefix + ".idx", "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    with open(prefix + ".bin", "rb") as file:
        size = file.seek(0, 2)
        digest.update(str(size).encode())
        for start in (0, max(0, size - 2**20)):
            file.seek(start)
            digest.update(file.read(2**20))
    return digest.hexdigest()
