"""A data set's files held against each other and against the tokenizer, and sample i as a run sees it."""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_ext.config import (
    DataConfig,
    DataSource,
    ModelConfig,
    ParallelConfig,
    PhaseConfig,
    PrecisionConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron_ext.doctor.index import Damaged, Index, read_index
from megatron_ext.doctor.report import Report
from megatron_ext.doctor.sample import show_sample
from megatron_ext.doctor.sums import check_sums
from megatron_ext.errors import UserError
from megatron_ext.runtime.capabilities import check_apex

if TYPE_CHECKING:
    from megatron_ext.data.corpus import DatasetInfo
    from megatron_ext.data.tokenizer import Tokenizer

TOKENS_AT_ONCE = 2**24
SEQUENCE_LENGTH = 2048


@dataclass(frozen=True)
class DataQuestion:
    """What is asked of `check_data`."""

    prefix: str
    """A data set without its endings; empty for all sets of `config`."""
    tokenizer: Path | None = None
    """None takes the one that the configuration or the data set names."""
    config: Path | None = None
    """A run's YAML."""
    sample: int | None = None
    """The sample to show."""
    phase: int | None = None
    """The phase to show it in; None is the one that consumes it."""
    objective: str | None = None
    """None is the phase's, or mlm without a configuration."""
    ratio: float | None = None
    """None is the phase's mask ratio."""
    sequence_length: int | None = None
    seed: int | None = None


def check_data(question: DataQuestion) -> Report:
    """Verify one data set, or those of a configuration, and show a sample if one is asked for.

    Raises:
        UserError: a file is not there, or the question does not fit the configuration.
    """
    check_apex()
    config = _load(question)
    prefixes = _prefixes(question, config)
    report = Report("data", {"sets": [], "sample": None})
    for prefix in prefixes:
        try:
            report.facts["sets"].append(_check_set(prefix, question, config, report, many=len(prefixes) > 1))
        except OSError as error:
            raise UserError(f"data set {prefix}: {error.filename or prefix} cannot be read ({error.strerror or error})") from None
    if question.sample is None:
        return report
    try:
        report.facts["sample"] = show_sample(config or _made_up_config(question, report), question, report)
    except UserError as error:
        if report.ok:
            raise
        report.notes.append(f"the sample cannot be shown: {error}")
    return report


def _load(question: DataQuestion) -> RunConfig | None:
    """The run's configuration with the question's changes; what training checks beyond the data is set aside."""
    from megatron_ext.config_reading import load_config

    if question.config is None:
        if not question.prefix:
            raise UserError("--data names no data set: give its path without the endings, or a run's --config")
        if question.phase is not None:
            raise UserError(f"--phase is {question.phase}, but only a --config has phases: use --objective")
        return None
    config, _ = load_config(["--config", str(question.config)])
    tokenizer = str(question.tokenizer or config.data.tokenizer)
    length = config.data.sequence_length if question.sequence_length is None else question.sequence_length
    seed = config.training.seed if question.seed is None else question.seed
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tokenizer=tokenizer, sequence_length=length),
        parallel=ParallelConfig(),
        precision=PrecisionConfig(),
        training=dataclasses.replace(config.training, seed=seed, backend="local"),
        validation=dataclasses.replace(config.validation, interval=0),
    )


def _prefixes(question: DataQuestion, config: RunConfig | None) -> list[str]:
    if config is None:
        found = [question.prefix]
    else:
        found = [source.prefix for source in (*config.data.train, *config.data.validation)]
        if question.prefix:
            found = [prefix for prefix in found if Path(prefix).resolve() == Path(question.prefix).resolve()][:1]
            if not found:
                raise UserError(f"--data {question.prefix} is none of the data sets of --config {question.config}")
    for prefix in found:
        for ending in (".bin", ".idx"):
            if not os.path.isfile(prefix + ending):  # unlike Path.is_file it says no where it may not look
                raise UserError(f"data set {prefix}: there is no file {prefix}{ending}")
    return found


def _made_up_config(question: DataQuestion, report: Report) -> RunConfig:
    """A run over one whole data set, one phase, one sample a step: sample i is the data set's own."""
    tokenizer = question.tokenizer or report.facts["sets"][0]["tokenizer"]
    if tokenizer is None:
        raise UserError("--sample needs --tokenizer: the data set does not name one that is there")
    length = SEQUENCE_LENGTH if question.sequence_length is None else question.sequence_length
    source = DataSource(prefix=question.prefix)
    return RunConfig(
        output_dir=".",
        data=DataConfig(tokenizer=str(tokenizer), train=[source], split=[1.0, 0.0, 0.0], sequence_length=length),
        model=ModelConfig(max_position_embeddings=length),
        phases=[PhaseConfig(objective=question.objective or "mlm", steps=max(question.sample, 0) + 1)],
        training=TrainingConfig(seed=question.seed or 0, global_batch_size=1, backend="local"),
        validation=ValidationConfig(interval=0),
    )


def _check_set(prefix: str, question: DataQuestion, config: RunConfig | None, report: Report, many: bool) -> dict[str, Any]:
    """Every check on one data set; its facts."""
    from megatron_ext.data.corpus import read_dataset_info
    from megatron_ext.data.dataset import dataset_fingerprint

    found = Report("data")
    info = None
    try:
        info = read_dataset_info(Path(prefix))
        if info is None:
            found.notes.append("there is no sidecar .json: nobody knows which tokenizer it was made with")
    except UserError as error:
        found.problems.append(str(error))
    tokenizer = _tokenizer(question, config, info, found)
    facts: dict[str, Any] = {"prefix": prefix, "bin_bytes": Path(prefix + ".bin").stat().st_size}
    try:
        index = read_index(Path(prefix + ".idx"))
        facts |= _check_pair(Path(prefix + ".bin"), index, tokenizer, info, found)
    except Damaged as error:
        found.problems.append(str(error))
    if info is not None:
        _check_sidecar(info, facts, tokenizer, found)
        facts |= check_sums(prefix, info, found)
    facts |= {
        "tokenizer": str(tokenizer.source) if tokenizer else None,
        "tokenizer_fingerprint": tokenizer.fingerprint if tokenizer else None,
        "fingerprint": dataset_fingerprint(prefix),
    }
    name = f"{prefix}: " if many else ""
    report.problems += [name + line for line in found.problems]
    report.notes += [name + line for line in found.notes]
    return facts


def _tokenizer(question: DataQuestion, config: RunConfig | None, info: "DatasetInfo | None", found: Report) -> "Tokenizer | None":
    """The tokenizer that was named, or the one that the sidecar names if it is still there."""
    from megatron_ext.data.tokenizer import load_tokenizer

    if question.tokenizer is not None or config is not None:
        return load_tokenizer(question.tokenizer or config.data.tokenizer)
    if info is None or not Path(info.tokenizer).exists():
        found.notes.append("no tokenizer is known: name it with --tokenizer to check ids and fingerprint")
        return None
    try:
        return load_tokenizer(info.tokenizer)
    except UserError as error:
        found.notes.append(f"the tokenizer that the data set names cannot be read: {error}")
        return None


def _check_pair(
    path: Path, index: Index, tokenizer: "Tokenizer | None", info: "DatasetInfo | None", found: Report
) -> dict[str, Any]:
    """Index against token file, and tokens against the vocabulary."""
    size, width = path.stat().st_size, index.dtype.itemsize
    ends = np.concatenate([[0], np.cumsum(index.lengths)])
    tokens = int(ends[-1])
    facts: dict[str, Any] = {"dtype": str(index.dtype), "documents": max(0, len(index.edges) - 1), "sequences": len(index.lengths)}
    facts["tokens"] = tokens
    if np.any(index.lengths < 0):
        raise Damaged(f"{path.with_suffix('.idx').name} holds negative lengths")
    if not np.array_equal(index.pointers, ends[:-1] * width):
        found.problems.append("the index's pointers are not where its lengths put them")
    if size != tokens * width:
        found.problems.append(f"{path.name} has {size} bytes: the index's {tokens} tokens of {width} bytes need {tokens * width}")
    if not len(index.edges) or index.edges[0] != 0 or index.edges[-1] != len(index.lengths) or np.any(np.diff(index.edges) < 0):
        raise Damaged(
            f"the document edges of {path.with_suffix('.idx').name} do not run from 0 to its {len(index.lengths)} sequences"
        )
    return facts | _check_tokens(path, index.dtype, ends[index.edges], tokenizer, info, found)


def _check_tokens(
    path: Path,
    dtype: np.dtype,
    edges: np.ndarray,
    tokenizer: "Tokenizer | None",
    info: "DatasetInfo | None",
    found: Report,
) -> dict[str, Any]:
    """Ids within the vocabulary, documents that are not empty and end with EOS. `edges` counts tokens: [documents + 1]."""
    lengths = np.diff(edges)
    empty = int(np.count_nonzero(lengths == 0))
    facts: dict[str, Any] = {"empty_documents": empty}
    if lengths.size:
        facts |= {"shortest": int(lengths.min()), "longest": int(lengths.max()), "mean_length": round(float(lengths.mean()), 1)}
    if empty:
        found.notes.append(f"{empty} of {len(lengths)} documents ({empty / len(lengths):.1%}) are empty")
    if path.stat().st_size < dtype.itemsize:
        raise Damaged(f"{path.name} holds no tokens")
    ids = np.memmap(path, dtype=dtype, mode="r", shape=(path.stat().st_size // dtype.itemsize,))
    eos_id = info.eos_id if info else tokenizer.eos_id if tokenizer else None
    smallest, largest, eos_count = 0, 0, 0
    for block in _blocks(ids, path.name):
        smallest, largest = min(smallest, int(block.min())), max(largest, int(block.max()))
        eos_count += 0 if eos_id is None else int(np.count_nonzero(block == eos_id))
    facts["largest_id"] = largest
    vocab_size = tokenizer.vocab_size if tokenizer else info.vocab_size if info else None
    if smallest < 0:
        found.problems.append(f"{path.name} holds the negative id {smallest}")
    if vocab_size is not None and largest >= vocab_size:
        found.problems.append(f"{path.name} holds the id {largest}: the tokenizer has {vocab_size} ids")
    if eos_id is not None:
        facts |= _check_ends(ids, edges[1:][lengths > 0], eos_id, eos_count, info, found)
    return facts


def _check_ends(
    ids: np.ndarray, ends: np.ndarray, eos_id: int, eos_count: int, info: "DatasetInfo | None", found: Report
) -> dict[str, Any]:
    """Which documents end with EOS. They all must if the sidecar says that it was appended."""
    ends = ends[ends <= len(ids)]
    ending = int(np.count_nonzero(ids[ends - 1] == eos_id))
    line = f"{len(ends) - ending} of {len(ends)} documents do not end with EOS, id {eos_id}"
    if ending < len(ends):
        (found.notes if info is None else found.problems).append(line)
    if eos_count > ending:
        found.notes.append(f"EOS, id {eos_id}, stands {eos_count - ending} times inside documents")
    return {"documents_ending_with_eos": ending}


def _blocks(ids: np.ndarray, name: str) -> Iterator[np.ndarray]:
    """The tokens in blocks, with a bar on stderr where that is a terminal."""
    from tqdm import tqdm

    for start in tqdm(range(0, len(ids), TOKENS_AT_ONCE), desc=name, unit="block", disable=None):
        yield ids[start : start + TOKENS_AT_ONCE]


def _check_sidecar(info: "DatasetInfo", facts: dict[str, Any], tokenizer: "Tokenizer | None", found: Report) -> None:
    for name in ("documents", "tokens"):
        if name in facts and facts[name] != getattr(info, name):
            found.problems.append(f"the sidecar counts {getattr(info, name)} {name}, the index {facts[name]}")
    if tokenizer is None:
        return
    if info.tokenizer_fingerprint != tokenizer.fingerprint:
        found.problems.append(
            f"it was made with another tokenizer (fingerprint {info.tokenizer_fingerprint[:12]}) than {tokenizer.source} "
            f"({tokenizer.fingerprint[:12]})"
        )
    elif info.vocab_size != tokenizer.vocab_size:
        found.problems.append(f"the sidecar says {info.vocab_size} ids, the tokenizer has {tokenizer.vocab_size}")
