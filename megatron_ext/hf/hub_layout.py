"""Every checkpoint of a run as a revision of one model repository, ready for the hub.

A hub repository keeps the checkpoints of one training as branches: `step-1000`, `step-2000`, ..., and `main` for the last. Here
each is a folder; `main` is a link to the last one; `revisions.json` says what they are, and README.md how to upload them.

A folder appears when it is complete and `revisions.json` is written anew after each, so that a failure leaves what was finished,
and the next call goes on behind it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint_files import EARLIER_SUM, RUN_FILE, describe_files, file_sum, published_checkpoints, read_run_file
from megatron_ext.errors import UserError, one_line
from megatron_ext.hf.export import ExportReport, export_checkpoint
from megatron_ext.hf.verify import ReferenceLogits

REVISIONS_FILE = "revisions.json"
FORMAT = 1
MAIN = "main"

README = """\
# Revisions of one training

Each folder is a complete model; `revisions.json` lists them. To upload them all (again), with `main` as the last checkpoint:

```python
import json
from huggingface_hub import HfApi

api, repository = HfApi(), "NAME/MODEL"
api.create_repo(repository, exist_ok=True)
first_commit = api.list_repo_commits(repository)[-1].commit_id  # empty: no file of one revision gets into another
for revision, entry in json.load(open("revisions.json"))["revisions"].items():
    if revision != "main":
        api.create_branch(repository, branch=revision, revision=first_commit, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=entry["folder"], revision=revision, delete_patterns="*")
```

To load one: `AutoModel.from_pretrained("NAME/MODEL", revision="REVISION")`, or the folder's path.
"""


@dataclass(frozen=True)
class Options:
    """How every revision is exported; see `export_checkpoint`."""

    family: str = "auto"
    dtype: str | None = None
    """A torch dtype's name; None keeps the dtype of the training."""
    max_shard_size: str = "5GB"


@dataclass(frozen=True)
class Revision:
    """One checkpoint's place in the layout."""

    name: str
    checkpoint: Path
    folder: Path
    report: ExportReport | None
    """None if it was there already."""


def revision_name(step: int) -> str:
    """Name of the branch and the folder of the checkpoint after `step` completed steps."""
    return f"step-{step}"


def export_run(
    checkpoints: Path,
    out_dir: Path,
    options: Options,
    *,
    reference_logits: ReferenceLogits | None = None,
    on_revision: Callable[[Revision], None] = lambda revision: None,
) -> list[Revision]:
    """Export every complete checkpoint of a run, oldest first, each to the class that its last step's attention asks for.

    A revision that was finished with the same options from the same checkpoint, and whose files are unchanged, is kept. One of
    a checkpoint that the run has removed since is kept too.

    Args:
        checkpoints: a run's `checkpoints` folder.
        out_dir: destination: absent, empty, or what an earlier call left of the same run.
        options: how to export.
        reference_logits: the training code's forward pass, to verify against; None leaves verification out.
        on_revision: called after each one.

    Raises:
        UserError: there are no checkpoints, the destination holds something else, or some checkpoints do not allow the export;
            the others were exported.
        VerificationError: an exported model is not the trained one. Finished revisions stay.
    """
    found = published_checkpoints(checkpoints)
    if not found:
        raise UserError(f"{checkpoints} holds no complete checkpoint: name a run's checkpoints folder")
    try:
        done, problems = _export_each(found, out_dir, options, reference_logits, on_revision)
    except OSError as error:
        raise UserError(f"{out_dir} cannot be written ({one_line(error)})") from error
    if problems:
        raise UserError(f"{len(done)} of {len(found)} checkpoints were exported: {'; '.join(problems)}")
    return done


def _export_each(
    found: list[Path],
    out_dir: Path,
    options: Options,
    reference_logits: ReferenceLogits | None,
    on_revision: Callable[[Revision], None],
) -> tuple[list[Revision], list[str]]:
    """The revisions, and what is wrong with each checkpoint that gave none: a damaged one does not stop those after it."""
    done: list[Revision] = []
    problems: list[str] = []
    listing: _Listing | None = None
    for checkpoint in found:
        try:
            record = read_run_file(checkpoint)
        except UserError as error:
            problems.append(str(error))
            continue
        listing = listing or _Listing(out_dir, record["run_key"])
        name = revision_name(record["step"])
        key = _source_key(checkpoint, options, is_verified=reference_logits is not None)
        try:
            report = None if listing.has(name, key) else _export(checkpoint, out_dir / name, options, reference_logits)
        except UserError as error:
            problems.append(str(error))
            continue
        if report is not None:
            listing.add(name, key, checkpoint, record, report)
        done.append(Revision(name, checkpoint, out_dir / name, report))
        on_revision(done[-1])
    if listing and done and done[-1].checkpoint == found[-1]:
        listing.set_main(done[-1].name)
    return done, problems


def _export(checkpoint: Path, folder: Path, options: Options, reference_logits: ReferenceLogits | None) -> ExportReport:
    """Export to a folder that may hold an earlier export, which goes when the new one is complete."""
    aside = folder.with_name(f".{folder.name}.new")
    for leftover in (aside, *folder.parent.glob(f".{aside.name}.*.tmp")):  # of a call that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    report = export_checkpoint(
        checkpoint,
        aside,
        family=options.family,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        max_shard_size=options.max_shard_size,
        reference_logits=reference_logits,
    )
    if folder.is_dir():
        shutil.rmtree(folder)
    aside.rename(folder)
    return ExportReport(**{**vars(report), "folder": folder})


def _source_key(checkpoint: Path, options: Options, is_verified: bool) -> str:
    """SHA-256 over what decides the outcome: run.json, which holds the sums of all other files, and the options."""
    identity = {"run.json": file_sum(checkpoint / RUN_FILE, EARLIER_SUM), "verified": is_verified, **asdict(options)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class _Listing:
    """`revisions.json`: {format, run_key, revisions: {name: {folder, step, ..., files}}}; `main` last."""

    def __init__(self, out_dir: Path, run_key: str | None):
        self._out_dir = out_dir
        self._tree = self._read() or {"format": FORMAT, "run_key": run_key, "revisions": {}}
        if (out_dir / MAIN).exists() and not (out_dir / MAIN).is_symlink():
            raise UserError(f"{out_dir / MAIN} is no link of ours: name another folder")
        if None not in (run_key, self._tree["run_key"]) and run_key != self._tree["run_key"]:
            raise UserError(f"{out_dir} holds the revisions of another run: name another folder")
        out_dir.mkdir(parents=True, exist_ok=True)
        self._write()  # what an interrupted call leaves is known as ours

    def has(self, name: str, key: str) -> bool:
        """Whether a revision was made of this source, and lies there as it was made. Reads every byte."""
        entry = self._tree["revisions"].get(name)
        if entry is None or entry.get("source_key") != key:
            return False
        folder = self._out_dir / name
        return folder.is_dir() and describe_files(folder, _file_names(folder)) == entry.get("files")

    def add(self, name: str, key: str, checkpoint: Path, record: dict[str, Any], report: ExportReport) -> None:
        """Write down a finished revision."""
        self._tree["revisions"][name] = {
            "folder": name,
            "step": record["step"],
            "phase": record["phase"],
            "tokens": record["tokens"],
            "attention": "causal" if record["causal"] else "bidirectional",
            "architecture": report.architecture,
            "dtype": str(report.dtype).removeprefix("torch."),
            "verified": bool(report.verifications),
            "checkpoint": checkpoint.name,
            "source_key": key,
            "files": describe_files(report.folder, _file_names(report.folder)),
        }
        self._write()

    def set_main(self, name: str) -> None:
        """Let `main` be a revision."""
        link = self._out_dir / f".{MAIN}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, self._out_dir / MAIN)
        self._tree["revisions"].pop(MAIN, None)
        revisions = sorted(self._tree["revisions"].items(), key=lambda item: item[1]["step"])
        self._tree["revisions"] = {**dict(revisions), MAIN: {**self._tree["revisions"][name], "same_as": name}}
        self._write()

    def _read(self) -> dict[str, Any] | None:
        path = self._out_dir / REVISIONS_FILE
        if not path.is_file():
            if self._out_dir.exists() and (not self._out_dir.is_dir() or any(self._out_dir.iterdir())):
                raise UserError(f"{self._out_dir} exists and holds no {REVISIONS_FILE}: name another folder, or empty it")
            return None
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            steps = [entry["step"] for entry in tree["revisions"].values()]
            is_sound = tree["format"] == FORMAT and "run_key" in tree and all(isinstance(step, int) for step in steps)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)})") from None
        if not is_sound:
            raise UserError(f"{path} is of a format that this version does not know")
        return tree

    def _write(self) -> None:
        """Each file is there whole or as it was before."""
        tree = json.dumps(self._tree, indent=1, ensure_ascii=False) + "\n"
        for name, text in (("README.md", README), (REVISIONS_FILE, tree)):
            aside = self._out_dir / f".{name}.new"
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, self._out_dir / name)


def _file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())
