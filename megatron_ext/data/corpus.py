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
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.data.readers import ReaderSettings, Reject, input_format, read_documents
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.errors import UserError

FORMAT_VERSION = 1
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
    inputs: list[dict[str, Any]]  # path, bytes, modified_ns, digest
    settings: str  # SHA-256 over the format version, the tokenizer and the reader settings


@dataclass(frozen=True)
class _Job:
    """One input file and the shard it becomes."""

    source: Path
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
        UserError: a missing input, no EOS to append, another data set at the prefix, no document at all, a lost worker.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    if append_eos and tokenizer.eos_id is None:
        raise UserError(f"tokenizer {tokenizer_path} has no EOS token to end documents with (use --no-append-eos)")
    reader = ReaderSettings(json_field, text_documents, max_line_bytes)
    eos_id = tokenizer.eos_id if append_eos else None
    settings = _digest([FORMAT_VERSION, tokenizer.fingerprint, tokenizer.vocab_size, eos_id, asdict(reader)])
    identities = [_identity(path) for path in inputs]
    shards = Path(f"{output_prefix}.shards")
    if finished := _finished(output_prefix, shards, identities, settings):
        return finished
    shards.mkdir(parents=True, exist_ok=True)
    jobs = [
        _Job(path, str(shards / f"{index:05d}-{path.name}"), Path(tokenizer_path), eos_id, reader, settings)
        for index, path in enumerate(inputs)
    ]
    counts = sum(_run(jobs, identities, workers, progress), Counts())
    if counts.documents == 0:
        raise UserError(f"no document in {len(inputs)} input files; rejected: {counts.rejected} (see {shards})")
    info = DatasetInfo(
        tokenizer=str(tokenizer_path),
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=eos_id,
        **asdict(counts),
        inputs=identities,
        settings=settings,
    )
    _join(jobs, output_prefix, rejects_path or Path(f"{output_prefix}.rejects.jsonl"), tokenizer, info)
    shutil.rmtree(shards)
    return counts


def read_dataset_info(prefix: Path) -> DatasetInfo | None:
    """The sidecar of a data set; None where there is none (a data set of stock Megatron). Raises `UserError` if it is damaged."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    try:
        return DatasetInfo(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"data set {prefix}: {path} is not a sidecar of tools/preprocess_data.py ({error})") from None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _identity(path: Path) -> dict[str, Any]:
    """What tells a changed input from the same one: size, time, and a digest of the first and the last MiB."""
    input_format(path)
    try:
        status = path.stat()
        with open(path, "rb") as stream:
            ends = stream.read(2**20)
            stream.seek(max(0, status.st_size - 2**20))
            ends += stream.read(2**20)
    except OSError as error:
        raise UserError(f"input {path}: cannot be read ({error.strerror})") from None
    digest = hashlib.sha256(ends).hexdigest()
    return {"path": str(path.resolve()), "bytes": status.st_size, "modified_ns": status.st_mtime_ns, "digest": digest}


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
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
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
    """The counts of a finished shard of this very input and these settings."""
    try:
        record = json.loads(Path(f"{job.shard}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Counts(**record["counts"]) if (record["input"], record["settings"]) == (identity, job.settings) else None


@functools.lru_cache(maxsize=1)
def _worker_tokenizer(path: Path) -> Tokenizer:
    """A worker's tokenizer, loaded for its first shard."""
    return load_tokenizer(path)


def _make_shard(job: _Job, identity: dict) -> Counts:
    """Tokenize one input file and publish its shard."""
    tokenizer = _worker_tokenizer(job.tokenizer)
    aside = f"{job.shard}.{os.getpid()}"
    builder = _builder(f"{aside}.bin", tokenizer)
    counts, rejected = Counts(), Counter()
    with open(f"{aside}.rejects.jsonl", "w", encoding="utf-8") as rejects:
        for record in read_documents(job.source, job.reader):
            if not isinstance(record, Reject):
                ids = tokenizer.encode(record[1])
                if ids:
                    ids += [] if job.eos_id is None else [job.eos_id]
                    builder.add_document(ids, [len(ids)])
                    counts.documents, counts.tokens = counts.documents + 1, counts.tokens + len(ids)
                    continue
                record = Reject(record[0], "empty_text", ascii(record[1][:100]))  # nothing but what the tokenizer drops
            rejected[record.cause] += 1
            rejects.write(json.dumps({"input": str(job.source), **asdict(record)}) + "\n")
    builder.finalize(f"{aside}.idx")
    counts = counts + Counts(rejected=rejected)
    _write_json(Path(f"{aside}.json"), {"counts": asdict(counts), "input": identity, "settings": job.settings})
    for ending in SHARD_ENDINGS:
        os.replace(aside + ending, job.shard + ending)
    return counts


def _builder(path: str, tokenizer: Tokenizer):
    indexed_dataset = _indexed_dataset()
    return indexed_dataset.IndexedDatasetBuilder(path, dtype=indexed_dataset.DType.optimal_dtype(tokenizer.vocab_size))


def _indexed_dataset():
    """Megatron's module, imported without its warnings about Transformer Engine and Apex, which tokenizing has no use for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def _join(jobs: list[_Job], prefix: Path, rejects_path: Path, tokenizer: Tokenizer, info: DatasetInfo) -> None:
    """Join the shards aside and publish them, the sidecar last."""
    aside = f"{prefix}.shards/joined"
    builder = _builder(f"{aside}.bin", tokenizer)
    with open(f"{aside}.rejects.jsonl", "wb") as rejects:
        for job in jobs:
            builder.add_index(job.shard)
            with open(f"{job.shard}.rejects.jsonl", "rb") as stream:
                shutil.copyfileobj(stream, rejects)
    builder.finalize(f"{aside}.idx")
    _write_json(Path(f"{aside}.json"), asdict(info))
    for ending in (".bin", ".idx"):
        os.replace(aside + ending, f"{prefix}{ending}")
    if info.rejected:
        shutil.move(f"{aside}.rejects.jsonl", rejects_path)
    os.replace(f"{aside}.json", f"{prefix}.json")


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
