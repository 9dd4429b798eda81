"""Text files to one Megatron indexed dataset: `prefix.bin` (token ids), `prefix.idx` (documents) and `prefix.json` (what they are).

Each input file is one shard, made by one worker process and published whole, so a run that was stopped continues with the
shards it lacks. The shards are joined in the order of the inputs: the result does not depend on the number of workers.
A document is one sequence of the index.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from megatron_ext.data.index_file import join, writing_documents
from megatron_ext.data.readers import (
    ReaderSettings,
    Reject,
    RejectList,
    check_regular,
    input_format,
    read_documents,
    rejects_summary,
)
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.errors import UserError

FORMAT_VERSION = 1
HASHING_THREADS = 8
BATCH_RECORDS, BATCH_CHARACTERS = 256, 2**20
"""Tokenized in one call, at most."""
SHARD_ENDINGS = (".bin", ".idx", ".rejects.jsonl", ".json")  # the last one says that the shard is finished


@dataclass
class Counts:
    """What came out of some inputs; `tokens` includes the EOS of each document."""

    documents: int = 0
    tokens: int = 0
    rejected: dict[str, int] = field(default_factory=dict)  # cause -> records

    def __add__(self, other: "Counts") -> "Counts":
        rejected = dict(sorted((Counter(self.rejected) + Counter(other.rejected)).items()))
        return Counts(self.documents + other.documents, self.tokens + other.tokens, rejected)


@dataclass(frozen=True)
class DatasetInfo:
    """The sidecar file of a data set."""

    tokenizer: str  # the path as it was given
    tokenizer_fingerprint: str
    vocab_size: int
    eos_id: int | None  # ends every document; None where none was appended
    documents: int
    tokens: int
    rejected: dict[str, int]
    inputs: list[dict[str, Any]]  # path, bytes, sha256
    settings: str  # SHA-256 over the format version, the tokenizer and the reader settings
    sha256: dict[str, str] = field(default_factory=dict)  # of `.bin` and `.idx`; empty in sidecars of earlier versions


@dataclass(frozen=True)
class _Job:
    """One input file and the shard it becomes."""

    source: Path
    state: tuple[int, int]  # size and time of the last change when the run began
    shard: str  # prefix of the shard's files
    tokenizer: Path
    eos_id: int | None
    reader: ReaderSettings
    settings: str


def preprocess(
    inputs: list[Path],
    output_prefix: Path,
    tokenizer_path: Path,
    *,
    json_field: str = "text",
    text_documents: str = "file",
    max_line_bytes: int = ReaderSettings.max_line_bytes,
    append_eos: bool = True,
    workers: int | None = None,
    progress: bool = True,
    rejects_path: Path | None = None,
) -> Counts:
    """Tokenize files into `output_prefix.bin`, `.idx` and `.json`.

    Running it again continues after an interruption, and does nothing once the data set is there.

    Args:
        inputs: files of the formats in `readers`, in the order their documents are to have.
        output_prefix: path of the data set without its endings.
        tokenizer_path: see `load_tokenizer`.
        json_field: field (JSON Lines) or column (Parquet) with the text.
        text_documents: what one document of a plain-text file is: `file`, `paragraph` or `line`.
        max_line_bytes: longer lines are rejected.
        append_eos: end every document with the tokenizer's EOS id.
        workers: processes; None takes one per processor, at most one per input.
        progress: show a bar on stderr (where that is a terminal).
        rejects_path: where rejected records are listed; None takes `output_prefix.rejects.jsonl`.

    Raises:
        UserError: a missing input or one that changes while it is read, no EOS to append, another data set at the prefix, no
            document at all (the rejects are listed), a place that cannot be written to, a lost worker.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers {workers} (allowed: 1 or more)")
    tokenizer = load_tokenizer(tokenizer_path)
    if append_eos and tokenizer.eos_id is None:
        raise UserError(f"tokenizer {tokenizer_path} has no EOS token to end documents with (use --no-append-eos)")
    reader = ReaderSettings(json_field, text_documents, max_line_bytes)
    eos_id = tokenizer.eos_id if append_eos else None
    settings = _digest([FORMAT_VERSION, tokenizer.fingerprint, tokenizer.vocab_size, eos_id, asdict(reader)])
    states = [_state(path) for path in inputs]
    identities = _identities(inputs)
    rejects_path = rejects_path or Path(f"{output_prefix}.rejects.jsonl")
    shards = Path(f"{output_prefix}.shards")
    if finished := _finished(output_prefix, shards, identities, settings):
        return finished
    jobs = [
        _Job(path, state, str(shards / f"{index:05d}"), Path(tokenizer_path), eos_id, reader, settings)
        for index, (path, state) in enumerate(zip(inputs, states, strict=True))
    ]
    try:
        shards.mkdir(parents=True, exist_ok=True)
        rejects_path.parent.mkdir(parents=True, exist_ok=True)
        counts = sum(_run(jobs, identities, workers, progress), Counts())
        if counts.documents == 0:
            _join_rejects(jobs, shards, rejects_path)
            shutil.rmtree(shards)
            names = f"input {inputs[0]}" if len(inputs) == 1 else f"{len(inputs)} inputs"
            raise UserError(f"no document in {names}: {rejects_summary(counts.rejected, rejects_path)}")
        info = DatasetInfo(
            tokenizer=str(tokenizer_path),
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=eos_id,
            **asdict(counts),
            inputs=identities,
            settings=settings,
        )
        _join(jobs, output_prefix, rejects_path, tokenizer, info)
        shutil.rmtree(shards)
    except OSError as error:  # inputs that cannot be read end otherwise
        raise UserError(f"output {output_prefix}: cannot be written ({error.strerror or error}: {error.filename})") from error
    return counts


def read_dataset_info(prefix: Path) -> DatasetInfo | None:
    """The sidecar of a data set; None where there is none (a data set of stock Megatron). Raises `UserError` if it is damaged."""
    path = Path(f"{prefix}.json")
    if not os.path.isfile(path):
        return None
    try:
        info = DatasetInfo(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"data set {prefix}: {path} is not a sidecar of tools/preprocess_data.py ({error})") from None
    for name, kind in get_type_hints(DatasetInfo).items():
        if not isinstance(getattr(info, name), getattr(kind, "__origin__", kind)):
            raise UserError(f"data set {prefix}: {path} is not a sidecar of tools/preprocess_data.py ({name} has a wrong type)")
    if not all(isinstance(digest, str) for digest in info.sha256.values()):
        raise UserError(f"data set {prefix}: {path} is not a sidecar of tools/preprocess_data.py (sha256 has a wrong type)")
    return info


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _state(path: Path) -> tuple[int, int]:
    """Size and time of the last change: both the same before and after reading means that nobody wrote."""
    check_regular(path)
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _identities(paths: list[Path]) -> list[dict[str, Any]]:
    """What tells changed inputs from the same ones: the content, whole. Hashing is much faster than tokenizing."""
    for path in paths:
        input_format(path)
    with ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(_identity, paths))


def _identity(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
    except OSError as error:
        raise UserError(f"input {path}: cannot be read ({error.strerror})") from None
    return {"path": str(path.resolve()), "bytes": size, "sha256": digest}


def _finished(prefix: Path, shards: Path, identities: list[dict], settings: str) -> Counts | None:
    """The counts of the data set that is already there. Raises `UserError` if it is a different one."""
    if not any(Path(f"{prefix}{ending}").exists() for ending in (".bin", ".idx", ".json")):
        return None
    info = read_dataset_info(prefix)
    if info is None and shards.is_dir():
        return None  # stopped while publishing
    if info is None or (info.inputs, info.settings) != (identities, settings):
        raise UserError(f"output {prefix}: a data set of other inputs or settings is there; remove it or name another prefix")
    shutil.rmtree(shards, ignore_errors=True)
    return Counts(info.documents, info.tokens, info.rejected)


def _run(jobs: list[_Job], identities: list[dict], workers: int | None, progress: bool) -> list[Counts]:
    """Make the missing shards; the counts of all, in order."""
    from tqdm import tqdm

    results = [_read_shard(job, identity) for job, identity in zip(jobs, identities, strict=True)]
    missing = [index for index, counts in enumerate(results) if counts is None]
    total = sum(identity["bytes"] for identity in identities)
    done = total - sum(identities[index]["bytes"] for index in missing)
    bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="tokenizing", disable=None if progress else True)
    with bar:
        for index, counts in _results({index: (jobs[index], identities[index]) for index in missing}, workers):
            results[index] = counts
            bar.update(identities[index]["bytes"])
    return results


def _results(tasks: dict[int, tuple[_Job, dict]], workers: int | None) -> Iterator[tuple[int, Counts]]:
    """Yield (index, counts) as the shards get done, in this process or in several."""
    workers = min(workers or (os.cpu_count() or 1), len(tasks))
    if workers <= 1:
        for index, task in tasks.items():
            yield index, _make_shard(*task)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(_make_shard, *task): index for index, task in tasks.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            reason = "a worker process died (out of memory?)"
            raise UserError(f"{reason}: finished shards are kept, run again with fewer workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read_shard(job: _Job, identity: dict) -> Counts | None:
    """The counts of a finished shard of this very input and these settings; None where anything of it is not as it should be."""
    try:
        record = json.loads(Path(f"{job.shard}.json").read_text(encoding="utf-8"))
        if (record["input"], record["settings"]) != (identity, job.settings):
            return None
        sizes = {ending: os.path.getsize(job.shard + ending) for ending in SHARD_ENDINGS[:-1]}
        return Counts(**record["counts"]) if record["sizes"] == sizes else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


@functools.lru_cache(maxsize=1)
def _worker_tokenizer(path: Path) -> Tokenizer:
    """A worker's tokenizer, loaded for its first shard."""
    return load_tokenizer(path)


def _make_shard(job: _Job, identity: dict) -> Counts:
    """Tokenize one input file and publish its shard."""
    tokenizer = _worker_tokenizer(job.tokenizer)
    aside = f"{job.shard}.{os.getpid()}"
    counts = Counts()
    output = writing_documents(aside, tokenizer.vocab_size, job.eos_id)
    with output as write, open(f"{aside}.rejects.jsonl", "w", encoding="ascii") as stream:
        rejects = RejectList(stream)
        for records in _batches(read_documents(job.source, job.reader)):
            ids_of_texts = iter(tokenizer.encode_batch([record[1] for record in records if not isinstance(record, Reject)]))
            documents = []
            for record in records:
                if isinstance(record, Reject):
                    rejects.add(job.source, record)
                elif len(ids := next(ids_of_texts)):
                    documents.append(ids)
                else:  # nothing but what the tokenizer drops
                    rejects.add(job.source, Reject(record[0], "empty_text", ascii(record[1][:100])))
            counts.documents, counts.tokens = counts.documents + len(documents), counts.tokens + write(documents)
    if _state(job.source) != job.state:
        raise UserError(f"input {job.source}: changed while it was read (run again when nobody writes to it)")
    counts = counts + Counts(rejected=rejects.counts)
    sizes = {ending: os.path.getsize(aside + ending) for ending in SHARD_ENDINGS[:-1]}
    shard = {"counts": asdict(counts), "input": identity, "settings": job.settings, "sizes": sizes}
    _write_json(Path(f"{aside}.json"), shard)
    for ending in SHARD_ENDINGS:
        os.replace(aside + ending, job.shard + ending)
    return counts


def _batches(records: Iterator[tuple[int, str] | Reject]) -> Iterator[list[tuple[int, str] | Reject]]:
    """Records in their order, so many at a time that what is done once for them costs little; a few megabytes."""
    batch: list[tuple[int, str] | Reject] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += 0 if isinstance(record, Reject) else len(record[1])
        if len(batch) == BATCH_RECORDS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _join(jobs: list[_Job], prefix: Path, rejects_path: Path, tokenizer: Tokenizer, info: DatasetInfo) -> None:
    """Join the shards aside and publish them, the sidecar last."""
    aside = f"{prefix}.shards/joined"
    sums = join((job.shard for job in jobs), aside, tokenizer.vocab_size)
    _write_json(Path(f"{aside}.json"), asdict(replace(info, sha256=sums)))
    for ending in (".bin", ".idx"):
        os.replace(aside + ending, f"{prefix}{ending}")
    if info.rejected:
        _join_rejects(jobs, Path(f"{prefix}.shards"), rejects_path)
    else:
        rejects_path.unlink(missing_ok=True)  # of an earlier try
    os.replace(f"{aside}.json", f"{prefix}.json")


def _join_rejects(jobs: list[_Job], shards: Path, rejects_path: Path) -> None:
    """Join the lists of rejected records and publish the whole."""
    aside = shards / "joined.rejects.jsonl"
    with open(aside, "wb") as rejects:
        for job in jobs:
            with open(f"{job.shard}.rejects.jsonl", "rb") as stream:
                shutil.copyfileobj(stream, rejects)
    shutil.move(aside, rejects_path)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
