"""A run's checkpoints as revisions: every folder loads as what its phase made it, nothing is made twice or lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint

from megatron_ext.checkpoint_files import describe_files, seal
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.hf import hub_layout
from megatron_ext.hf.checkpoint_reader import CheckpointReader
from megatron_ext.hf.hub_layout import Options, Revision, export_run
from megatron_ext.hf.import_model import import_model
from megatron_ext.hf.verify import VerificationError
from megatron_ext.train.checkpoint_logits import checkpoint_logits
from tests.conftest import Corpus
from tests.unit.hf_models import Recipe, weights_of, write_model

SMALL = {"vocab_size": 540, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
RECIPE = Recipe("EuroBertConfig", "EuroBertForMaskedLM", {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0})
PHASES = [{"name": "0-clm", "start_step": 0, "end_step": 20}, {"name": "1-mlm", "start_step": 20, "end_step": 60}]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_step(run: Path, template: Path, step: int, run_key: str = "key") -> Path:
    """A published checkpoint of a CLM -> MLM run with weights of its own, sums and all."""
    reader = CheckpointReader(template)
    folder = run / f"checkpoints/step_{step:08d}"
    distributed_checkpoint.save(
        {key: reader.read(key) * (1 + step / 100) for key in reader.tensors}, checkpoint_id=folder, no_dist=True
    )
    shutil.copytree(template / "tokenizer", folder / "tokenizer")
    torch.save({}, folder / "common.pt")
    shutil.copy(template / "metadata.json", folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    record = {
        **{key: value for key, value in reader.record.tree.items() if key not in ("record_sha256", "imported")},
        "step": step,
        "phase": "0-clm" if step <= 20 else "1-mlm",
        "causal": step <= 20,
        "phases": PHASES,
        "tokens": step * 1000,
        "run_key": run_key,
        "files": describe_files(folder, names),
    }
    (folder / "run.json").write_text(json.dumps(seal(record)))
    return folder


@pytest.fixture(scope="module")
def template(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    write_model(folder / "hf", RECIPE, tokenizer=load_tokenizer(corpus.tokenizer).to_fast())
    import_model(folder / "hf", folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    """A run's folder: one checkpoint of the causal phase, two of the bidirectional one."""
    for step in (20, 30, 40):
        write_step(tmp_path / "run", template, step)
    return tmp_path / "run"


def revisions(out: Path) -> dict[str, Any]:
    return json.loads((out / "revisions.json").read_text())["revisions"]


def states(done: list[Revision]) -> dict[str, bool]:
    """Revision -> whether it was converted now."""
    return {revision.name: revision.report is not None for revision in done}


def test_every_revision_loads_as_what_its_phase_made_it(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    done = export_run(run / "checkpoints", tmp_path / "out", Options(), reference_logits=checkpoint_logits)
    assert states(done) == {"step-20": True, "step-30": True, "step-40": True}
    found = revisions(tmp_path / "out")
    assert list(found) == ["step-20", "step-30", "step-40", "main"]
    assert found["main"] == {**found["step-40"], "same_as": "step-40"}
    assert [entry["attention"] for entry in found.values()] == ["causal", "bidirectional", "bidirectional", "bidirectional"]
    ids = torch.tensor([[7, 8, 9, 10, 11, 12]])
    for name in (*found, "main"):
        folder, entry = tmp_path / "out" / name, found[name]
        auto = AutoModelForCausalLM if entry["attention"] == "causal" else AutoModelForMaskedLM
        model, loading = auto.from_pretrained(folder, output_loading_info=True)
        assert type(model).__name__ == entry["architecture"] and not any(loading.values()), name
        (logits,) = checkpoint_logits(run / "checkpoints" / entry["checkpoint"], ids.tolist())
        torch.testing.assert_close(model.eval()(ids).logits[0].detach(), logits, rtol=0, atol=1e-4)
        assert AutoModel.from_pretrained(folder) is not None and len(AutoTokenizer.from_pretrained(folder)) == 540
        assert describe_files(folder, sorted(entry["files"])) == entry["files"]
        assert sorted(path.name for path in folder.iterdir()) == sorted(entry["files"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*found, "README.md", "revisions.json"}


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("step-*/*")}


def test_nothing_is_converted_twice_and_whatever_changed_is(run: Path, template: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_run(run / "checkpoints", out, Options())
    before, listing = stamps(out), (out / "revisions.json").read_bytes()
    assert states(export_run(run / "checkpoints", out, Options())) == dict.fromkeys(("step-20", "step-30", "step-40"), False)
    assert stamps(out) == before and (out / "revisions.json").read_bytes() == listing

    write_step(run, template, 50)
    (out / "step-30/config.json").write_text("{}")
    shutil.rmtree(run / "checkpoints/step_00000020")  # the run keeps its newest only
    done = export_run(run / "checkpoints", out, Options())
    assert states(done) == {"step-30": True, "step-40": False, "step-50": True}
    assert list(revisions(out)) == ["step-20", "step-30", "step-40", "step-50", "main"]
    assert (out / "main").resolve().name == "step-50"
    assert json.loads((out / "step-30/config.json").read_text())["model_type"] == "eurobert"

    shutil.rmtree(run / "checkpoints/step_00000040")
    write_step(run, template, 40)
    assert states(export_run(run / "checkpoints", out, Options(dtype="bfloat16"))) == dict.fromkeys(
        ("step-30", "step-40", "step-50"), True
    )
    assert {tensor.dtype for tensor in weights_of(out / "step-40").values()} == {torch.bfloat16}


def test_a_failure_leaves_what_was_finished_and_the_next_call_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def reference(checkpoint: Path, rows: list[list[int]]) -> list[torch.Tensor]:
        return [logits + (checkpoint.name == "step_00000030") for logits in checkpoint_logits(checkpoint, rows)]

    with pytest.raises(VerificationError):
        export_run(run / "checkpoints", out, Options(), reference_logits=reference)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "revisions.json", "step-20"]
    assert list(revisions(out)) == ["step-20"]
    done = export_run(run / "checkpoints", out, Options(), reference_logits=checkpoint_logits)
    assert states(done) == {"step-20": False, "step-30": True, "step-40": True}

    # One that is made anew, and fails, leaves the old one.
    (run / "checkpoints/step_00000040/run.json").write_text((run / "checkpoints/step_00000040/run.json").read_text() + "\n")
    before = stamps(out)
    monkeypatch.setattr(hub_layout, "export_checkpoint", lambda *args, **options: (_ for _ in ()).throw(UserError("broken")))
    with pytest.raises(UserError, match="broken"):
        export_run(run / "checkpoints", out, Options(), reference_logits=checkpoint_logits)
    assert stamps(out) == before and (out / "main").resolve().name == "step-40"


def test_a_damaged_checkpoint_does_not_stop_those_after_it(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints/step_00000030/run.json").unlink()
    with pytest.raises(UserError, match=r"2 of 3 checkpoints were exported: .*step_00000030.*run\.json"):
        export_run(run / "checkpoints", tmp_path / "out", Options())
    assert list(revisions(tmp_path / "out")) == ["step-20", "step-40", "main"]
    (tmp_path / "out/main").unlink()
    (tmp_path / "out/main").mkdir()
    with pytest.raises(UserError, match="main is no link of ours"):
        export_run(run / "checkpoints", tmp_path / "out", Options())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        export_run(run / "checkpoints", tmp_path / "file/out", Options())


def test_other_folders_are_left_alone(run: Path, template: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(UserError, match=r"holds no revisions\.json"):
        export_run(run / "checkpoints", out, Options())
    (out / "mine").rename(out / "revisions.json")
    with pytest.raises(UserError, match=r"revisions\.json cannot be read"):
        export_run(run / "checkpoints", out, Options())
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        export_run(run, tmp_path / "new", Options())
    assert not (tmp_path / "new").exists()
    export_run(run / "checkpoints", tmp_path / "new", Options())
    write_step(tmp_path / "other", template, 20, run_key="another")
    with pytest.raises(UserError, match="of another run"):
        export_run(tmp_path / "other/checkpoints", tmp_path / "new", Options())


class Hub:
    """What the README's commands ask of `huggingface_hub`, with the signatures of the real client, and branches as folders."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, bytes]] = {"main": {}}
        self.history = [{}]

    def create_repo(self, repo_id: str, **options: Any) -> None:
        pass

    def list_repo_commits(self, repo_id: str) -> list[Any]:
        return [type("Commit", (), {"commit_id": str(number)}) for number in reversed(range(len(self.history)))]

    def create_branch(self, repo_id: str, *, branch: str, revision: str, exist_ok: bool) -> None:
        self.branches.setdefault(branch, dict(self.history[int(revision)]))

    def upload_folder(self, *, repo_id: str, folder_path: str, revision: str, delete_patterns: str) -> None:
        assert delete_patterns == "*"
        self.branches[revision] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        if revision == "main":
            self.history.append(self.branches["main"])


def test_the_commands_of_the_readme_make_the_branches(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    import huggingface_hub

    for name in ("create_repo", "list_repo_commits", "create_branch", "upload_folder"):
        real = inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters
        ours = inspect.signature(getattr(Hub, name)).parameters
        assert {key for key in ours if key != "options"} <= real.keys(), name
    out = tmp_path / "out"
    export_run(run / "checkpoints", out, Options())
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.chdir(out)
    program = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    for _ in range(2):
        exec(program, {})  # noqa: S102 - our own README
        assert set(hub.branches) == {"main", "step-20", "step-30", "step-40"}
        for branch, files in hub.branches.items():
            assert files == {path.name: path.read_bytes() for path in (out / branch).iterdir()}, branch
