"""Sample i of a data set: fixed-length blocks of its documents, shuffled anew in each epoch; blends and splits.

Sample i is found without replaying what came before: the epoch is i // samples in an epoch, its document order comes from
(seed, source, epoch), and the block's documents from a search in their cumulated lengths.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_ext.config import DataSource
from megatron_ext.data.index_file import INDEX_HEADER, INDEX_MAGIC, TOKEN_TYPES
from megatron_ext.errors import UserError
from megatron_ext.objective import DOCUMENT_STREAM, random_generator

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

    samples_per_epoch: int
    """Samples without a repetition."""

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

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """[length] tokens of a document, from `offset` on."""
        pointer = int(self._pointers[document]) + offset * self._item_size
        return self._reader.read(dtype=self._dtype, count=length, offset=pointer)


def _open_indexed_dataset(prefix: str) -> Any:
    """megatron's reader. The index is looked through first: megatron trusts what it says, and its destructor fails half built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        for ending in (".bin", ".idx"):
            if not Path(prefix + ending).is_file():
                raise UserError(f"data set {prefix}: there is no file {prefix}{ending}")
        if Path(prefix + ".bin").stat().st_size == 0:
            raise UserError(f"data set {prefix}: {prefix}.bin is empty")
        _check_index(prefix)
        return IndexedDataset(prefix, mmap=True)
    except (AssertionError, ValueError, OSError) as error:
        raise UserError(f"data set {prefix}: {prefix}.idx is not a Megatron index ({error})") from error


def _check_index(prefix: str) -> None:
    """Hold an index against its own counts and against the token file, without allocating what it merely claims to hold.

    Raises `UserError` naming the file and what is wrong with it.
    """

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise UserError(f"data set {prefix}: {prefix}.idx {problem}")

    with open(prefix + ".idx", "rb") as file:
        header = file.read(INDEX_HEADER.size)
    require(header.startswith(INDEX_MAGIC) and len(header) == INDEX_HEADER.size, "is not a Megatron index")
    _, version, code, sequences, ends = INDEX_HEADER.unpack(header)
    require(version == 1, f"is not a Megatron index of version 1 but of version {version}")
    require(code in TOKEN_TYPES, f"is not a Megatron index of token ids: its dtype code is {code}")
    size, needed = Path(prefix + ".idx").stat().st_size, INDEX_HEADER.size + 12 * sequences + 8 * ends
    counts = f"with {sequences} sequences and {ends - 1} documents needs {needed} bytes"
    require(size in (needed, needed + sequences), f"has {size} bytes, but {counts}")  # multimodal sets have a byte a sequence more
    index = np.memmap(prefix + ".idx", mode="r")
    start = INDEX_HEADER.size
    lengths = np.frombuffer(index, np.int32, sequences, start)
    pointers = np.frombuffer(index, np.int64, sequences, start + 4 * sequences)
    documents = np.frombuffer(index, np.int64, ends, start + 12 * sequences)
    require(
        ends > 0 and documents[0] == 0 and documents[-1] == sequences, f"has documents that do not span its {sequences} sequences"
    )
    require(bool((documents[1:] >= documents[:-1]).all()), "has documents that run backwards")
    require(bool((lengths >= 0).all()), "has a sequence of negative length")
    found, item = Path(prefix + ".bin").stat().st_size, np.dtype(TOKEN_TYPES[code]).itemsize
    require(bool((pointers >= 0).all()), "has a sequence that begins before the token file")
    # A pointer near 2^63 must not wrap around.
    needed = int(np.max(np.minimum(pointers, found + 1) + lengths.astype(np.int64) * item, initial=0))
    if found < needed:
        raise UserError(
            f"data set {prefix}: {prefix}.bin has {found} bytes, but its index needs {needed} or more: it was cut short"
        )
    follows = pointers[1:] == pointers[:-1] + lengths[:-1].astype(np.int64) * item
    require(bool(follows.all()), "has sequences that do not follow one another in the token file")


@dataclass(frozen=True)
class _Epoch:
    """Documents in a fresh order: 16 bytes for each."""

    number: int
    order: np.ndarray
    ends: np.ndarray


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
        """Samples without a repetition."""
        if self.samples_per_epoch == 0:
            raise UserError(
                f"{name} holds {self.tokens} tokens in {len(documents)} documents: data.sequence_length "
                f"{sequence_length} needs at least one sample"
            )
        self._epochs: tuple[_Epoch, ...] = ()

    def sample(self, index: int) -> Sample:
        """Sample `index`; indices beyond the first epoch go on into the next."""
        epoch, block = divmod(index, self.samples_per_epoch)
        order, ends = self._epoch(epoch)
        position = block * self._sequence_length
        place = int(np.searchsorted(ends, position, side="right"))
        tokens, lengths, missing = [], [], self._sequence_length
        while missing:
            document = int(order[place])
            offset = position - int(ends[place] - self._lengths[document])
            length = min(int(self._lengths[document]) - offset, missing)
            if length:
                tokens.append(self._indexed.read(self._first_document + document, offset, length))
                lengths.append(length)
            missing -= length
            position += length
            place += 1
        return Sample(np.concatenate(tokens).astype(np.int64), np.asarray(lengths, dtype=np.int64))

    def _epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in an epoch's order, and where each ends: about a second for 10 million documents, then kept.

        The last two epochs are: a reader that is ahead may cross into the next one. Threads read while others shuffle, so nothing
        that they may hold is changed.
        """
        for epoch in self._epochs:
            if epoch.number == number:
                return epoch.order, epoch.ends
        order = random_generator(self._seed, DOCUMENT_STREAM, number, self._source).permutation(len(self._lengths))
        made = _Epoch(number, order, np.cumsum(self._lengths[order]))
        self._epochs = (made, *self._epochs[:1])
        return made.order, made.ends


class Blend:
    """Several sources mixed by weight; which one sample i comes from is a fixed, evenly spread pattern."""

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float]):
        self.sources = list(sources)
        self._pattern, self._rank = _blend_pattern(np.asarray(weights, dtype=np.float64))
        self._counts = np.bincount(self._pattern, minlength=len(self.sources))

    @property
    def counts(self) -> list[int]:
        """Samples of each source in `BLEND_PERIOD` samples of the blend."""
        return self._counts.tolist()

    def repeated(self, samples: int) -> int:
        """How many of the first `samples` samples are there a second time, because a source has fewer than are drawn from it."""
        periods, rest = divmod(samples, BLEND_PERIOD)
        drawn = periods * self._counts + np.bincount(self._pattern[:rest], minlength=len(self.sources))
        held = [source.samples_per_epoch for source in self.sources]
        return int(np.maximum(drawn - held, 0).sum())

    def sample(self, index: int) -> Sample:
        """Sample `index` of the blend: the next one of the source whose turn it is."""
        source, number = self.locate(index)
        return self.sources[source].sample(number)

    def locate(self, index: int) -> tuple[int, int]:
        """The source whose turn it is at sample `index` of the blend, and the sample's number in that source."""
        period, place = divmod(index, BLEND_PERIOD)
        source = int(self._pattern[place])
        return source, period * int(self._counts[source]) + int(self._rank[place])


def _blend_pattern(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One period of a blend: the source of each place, and how often that source came before in the period."""
    with np.errstate(over="ignore"):
        weights = weights if np.isfinite(weights.sum()) else weights / weights.max()
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
    ends = [min(round(float(share) * count), count) for share in np.cumsum(shares)]  # shares sum to 1 up to a rounding
    return range(ends[0]), range(ends[0], ends[1]), range(ends[1], count)


def open_blend(sources: Sequence[DataSource], share: int, shares: Sequence[float], sequence_length: int, seed: int) -> Blend:
    """Open one split of a blend.

    Args:
        sources: data sets and weights.
        share: 0 training, 1 validation, 2 test.
        shares: the split's shares; (1, 0, 0) with share 0 takes whole sets.
        sequence_length: tokens in a sample.
        seed: the run's seed.

    Raises:
        UserError: a damaged data set, a split of less than one sample, or a weight too small to be drawn.
    """
    split = ("training", "validation", "test")[share]
    blocks = []
    for number, source in enumerate(sources):
        indexed = IndexedDocuments(source.prefix)
        documents = split_documents(len(indexed.lengths), shares)[share]
        blocks.append(DocumentBlocks(indexed, documents, sequence_length, seed, number, f"the {split} split of {source.prefix}"))
    blend = Blend(blocks, [source.weight for source in sources])
    for source, count in zip(sources, blend.counts, strict=True):
        if count == 0:
            raise UserError(
                f"data source {source.prefix} has the weight {source.weight}: below 1/{BLEND_PERIOD} of the sum of the weights "
                "none of its samples would be drawn (leave it out or give it more)"
            )
    return blend


def dataset_fingerprint(prefix: str) -> str:
    """SHA-256 over a data set's index and over the size and both ends of its token file (1 MiB each).

    Quick at the start of every run, and blind to the middle of the token file: the doctor holds that against the sidecar's sum.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(prefix + ".idx", "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
        with open(prefix + ".bin", "rb") as file:
            size = file.seek(0, 2)
            digest.update(str(size).encode())
            for start in (0, max(0, size - 2**20)):
                file.seek(start)
                digest.update(file.read(2**20))
    except OSError as error:
        name = error.filename or f"{prefix}.idx or .bin"
        raise UserError(f"data set {prefix}: {name} cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()
