"""The doctor on machines, data sets and samples: what is whole passes, and everything that is broken is named."""

import builtins
import errno
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.doctor.data import DataQuestion, check_data
from megatron_ext.doctor.equivalence import TOLERANCES, compare, parse_layout
from megatron_ext.doctor.report import Report
from megatron_ext.doctor.text import Painter, printable, render, width
from megatron_ext.errors import UserError
from megatron_ext.runtime.capabilities import architecture, check_apex, find_apex, trains_fp8
from tests.conftest import Corpus

ROOT = Path(__file__).parents[2]
HEADER_BYTES = 34
PLAIN = Painter(coloured=False)


def doctor(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """Run the tool as a user would; `path` comes first on Python's path, as an installed package does."""
    places = [str(place) for place in (path, ROOT) if place is not None]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, str(ROOT / "tools/doctor.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


# --- the machine -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign_apex(tmp_path: Path) -> Path:
    """A folder as PyPI's web toolkit leaves it in site-packages; running any of it leaves a mark and fails."""
    package = tmp_path / "site/apex"
    package.mkdir(parents=True)
    trap = "import pathlib\npathlib.Path(__file__).with_name('was_run').touch()\nraise SyntaxError('print x')\n"
    for name in ("__init__", "models", "views", "forms"):
        (package / f"{name}.py").write_text(trap)
    about = tmp_path / "site/apex-0.9.10.dev0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\nSummary: Pyramid toolkit to add auth\n"
    )
    return tmp_path / "site"


@pytest.fixture
def nvidia_apex(tmp_path: Path) -> Path:
    """The files of NVIDIA's layout."""
    for name in ("", "optimizers/", "multi_tensor_apply/", "normalization/"):
        (tmp_path / f"site/apex/{name}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"site/apex/{name}__init__.py").touch()
    (tmp_path / "site/apex/optimizers/fused_adam.py").touch()
    return tmp_path / "site"


def test_the_foreign_apex_is_refused_unrun(foreign_apex: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(foreign_apex))
    assert find_apex().kind == "foreign"
    with pytest.raises(UserError, match=r"apex-?.*0\.9\.10\.dev0.*is not NVIDIA Apex"):
        check_apex()
    assert not list(foreign_apex.rglob("was_run"))


def test_doctor_and_training_refuse_the_foreign_apex(foreign_apex: Path, corpus: Corpus, tmp_path: Path) -> None:
    done = doctor("--json", path=foreign_apex)
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (1, False)
    assert any("not NVIDIA Apex" in problem and str(foreign_apex) in problem for problem in report["problems"])
    assert report["will_use"] is None
    config = {"output_dir": str(tmp_path / "run"), "phases": [{"objective": "clm", "steps": 1}]}
    config["data"] = {"tokenizer": str(corpus.tokenizer), "train": [{"prefix": str(corpus.prefix)}]}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    environment = {**os.environ, "PYTHONPATH": f"{foreign_apex}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(ROOT / "pretrain_encoder.py"), "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*not NVIDIA Apex.*\n", done.stderr)
    assert not (tmp_path / "run").exists()
    assert not list(foreign_apex.rglob("was_run"))


def test_the_backend_asks_too(foreign_apex: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_ext.runtime.backend import choose_backend

    choose_backend("auto")
    monkeypatch.syspath_prepend(str(foreign_apex))
    with pytest.raises(UserError, match="not NVIDIA Apex"):
        choose_backend("auto")


def test_nvidias_apex_is_known_by_its_files(nvidia_apex: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(nvidia_apex))
    assert find_apex().kind == "nvidia"
    check_apex()


def test_a_folder_called_apex_without_code_is_foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex/docs").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="not NVIDIA Apex"):
        check_apex()


@pytest.mark.parametrize(
    "capability, name, fp8",
    [((7, 0), "Volta", False), ((8, 0), "Ampere", False), ((8, 9), "Ada Lovelace", False), ((9, 0), "Hopper", True)]
    + [((10, 0), "Blackwell", True), ((12, 0), "Blackwell", True), ((6, 1), "Pascal", False), ((99, 0), "unknown", True)],
)
def test_gpu_generations(capability: tuple[int, int], name: str, fp8: bool) -> None:
    assert (architecture(capability), trains_fp8(capability)) == (name, fp8)


def test_machine_report_says_what_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from megatron_ext.doctor.machine import check_machine

    report = check_machine()
    assert report.ok, report.problems
    json.dumps(report.as_dict())
    # The package's version; torch itself may add its build, such as +cu130.
    assert report.facts["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    used = report.facts["will_use"]
    masks = {(row["objective"], row["packed"]): (row["mask_type"], row["runs"]) for row in used["attention"]}
    causal, whole = ("padding_causal", "padding") if used["layers"] == "transformer_engine" else ("causal", "no_mask")
    assert masks == {
        **{(name, packed): (whole, 12 if packed else 3) for name in ("mlm", "mntp") for packed in (True, False)},
        **{("clm", packed): (causal, 12 if packed else 3) for packed in (True, False)},
    }
    text = "\n".join(render(report, PLAIN))
    assert torch.__version__.partition("+")[0] in text
    assert "machine: all good" in text


def test_a_package_outside_its_range_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_ext.doctor import machine

    versions = {"transformers": "4.51.0", "sentencepiece": None}
    installed = machine.installed_version
    monkeypatch.setattr(machine, "installed_version", lambda name: versions[name] if name in versions else installed(name))
    report = machine.check_machine()
    assert [problem.split()[0] for problem in report.problems] == ["transformers", "sentencepiece"]
    assert "4.51.0" in report.problems[0]


BROKEN = {
    "transformer_engine": ("raise AssertionError('no kernels\\nfor this GPU')", "AssertionError: no kernels"),
    "psutil": ("raise ModuleNotFoundError('no psutil')", "ModuleNotFoundError: no psutil"),
    "megatron": ("raise ModuleNotFoundError('no megatron')", "ModuleNotFoundError: no megatron"),
    "torch": ("raise OSError('libcudart.so.12: cannot open')", "OSError: libcudart.so.12"),
}


@pytest.mark.parametrize("module", BROKEN)
def test_a_module_that_cannot_be_imported_is_a_problem_and_the_report_stands(tmp_path: Path, module: str) -> None:
    source, message = BROKEN[module]
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(source)
    done = doctor("--json", path=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    report = json.loads(done.stdout)
    assert any(message in problem for problem in report["problems"])
    assert not any("\n" in problem for problem in report["problems"])
    assert report["packages"]["numpy"]
    # megatron-core imports Transformer Engine and lets pass nothing but its absence.
    assert (report["will_use"] is not None) == (module == "psutil")
    facts = {name: value for name, value in report.items() if name not in ("check", "ok", "problems", "notes")}
    assert "software" in render(Report("machine", facts), PLAIN)


# --- layouts ---------------------------------------------------------------------------------------------------------------


def test_layouts_are_read() -> None:
    parallel, data = parse_layout("tensor=2, pipeline=2,virtual_pipeline=2,data=3,sequence=false,distributed_optimizer=true")
    assert (parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, data) == (2, 2, 2, 3)
    assert (parallel.sequence, parallel.distributed_optimizer) == (False, True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("tensr=2", "tensr"),
        ("tensor=two", "'two'"),
        ("tensor=-1", "'-1'"),
        ("tensor=0", "tensor is 0"),
        ("data=0", "data is 0"),
        ("sequence=1", "true and false"),
        ("virtual_pipeline=2", "pipeline"),
        ("", "''"),
    ],
)
def test_wrong_layouts_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_layout(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- data ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_copy(corpus: Corpus, tmp_path: Path) -> str:
    """Prefix of a data set that a test may break."""
    for ending in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus.prefix}{ending}", tmp_path / f"copy{ending}")
    return str(tmp_path / "copy")


def problems(prefix: str, **changes: Any) -> list[str]:
    return check_data(DataQuestion(prefix, **changes)).problems


def test_a_whole_data_set_passes(corpus: Corpus) -> None:
    report = check_data(DataQuestion(str(corpus.prefix)))
    assert report.ok, report.problems
    assert report.notes == []
    seen = report.facts["sets"][0]
    tokens = np.fromfile(f"{corpus.prefix}.bin", dtype=np.uint16)
    assert (seen["documents"], seen["tokens"], seen["largest_id"]) == (400, len(tokens), tokens.max())
    assert seen["documents_ending_with_eos"] == 400
    assert seen["empty_documents"] == 0


def edit(path: str, offset: int, value: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset, 2 if offset < 0 else 0)
        file.write(value)


BREAKS = {
    "not a Megatron index": lambda prefix: edit(prefix + ".idx", 0, b"X"),
    "version 9": lambda prefix: edit(prefix + ".idx", 9, struct.pack("<Q", 9)),
    "dtype code 77": lambda prefix: edit(prefix + ".idx", 17, b"\x4d"),
    "bytes: 401 sequences": lambda prefix: edit(prefix + ".idx", 18, struct.pack("<Q", 401)),
    "pointers": lambda prefix: edit(prefix + ".idx", HEADER_BYTES + 4 * 400 + 8, struct.pack("<Q", 4)),
    "document edges": lambda prefix: edit(prefix + ".idx", -8, struct.pack("<Q", 399)),
    "negative lengths": lambda prefix: edit(prefix + ".idx", HEADER_BYTES, struct.pack("<i", -5)),
    "tokens of 2 bytes need": lambda prefix: os.truncate(prefix + ".bin", 1000),
    "holds the id 60000": lambda prefix: edit(prefix + ".bin", 0, struct.pack("<H", 60000)),
    "do not end with EOS": lambda prefix: edit(prefix + ".bin", -2, struct.pack("<H", 50)),
    "the sidecar counts 399 documents": lambda prefix: Path(prefix + ".json").write_text(
        Path(prefix + ".json").read_text().replace('"documents": 400', '"documents": 399')
    ),
    "is not a sidecar": lambda prefix: Path(prefix + ".json").write_text("{"),
    "another tokenizer": lambda prefix: Path(prefix + ".json").write_text(
        re.sub('"tokenizer_fingerprint": "....', '"tokenizer_fingerprint": "0000', Path(prefix + ".json").read_text())
    ),
}


@pytest.mark.parametrize("message", BREAKS)
def test_every_break_is_named(own_copy: str, message: str) -> None:
    BREAKS[message](own_copy)
    found = problems(own_copy)
    assert any(message in problem for problem in found), found
    assert all("\n" not in problem for problem in found)


def test_one_flipped_bit_in_the_middle_is_named(own_copy: str, corpus: Corpus) -> None:
    """The id stays in the vocabulary, so only the sum tells."""
    recorded = json.loads(Path(own_copy + ".json").read_text())["sha256"]
    files = {ending: Path(own_copy + ending) for ending in (".bin", ".idx")}
    assert recorded == {ending: hashlib.sha256(path.read_bytes()).hexdigest() for ending, path in files.items()}
    middle = os.path.getsize(own_copy + ".bin") // 4 * 2
    token = struct.unpack_from("<H", files[".bin"].read_bytes(), middle)[0]
    edit(own_copy + ".bin", middle, struct.pack("<H", token ^ 1))
    report = check_data(DataQuestion(own_copy, tokenizer=corpus.tokenizer))
    assert report.problems == [
        f"copy.bin has SHA-256 {report.facts['sets'][0]['bin_sha256'][:12]}, {recorded['.bin'][:12]} was written"
    ]


def test_sums_that_an_earlier_version_did_not_record_are_a_note(own_copy: str) -> None:
    tree = json.loads(Path(own_copy + ".json").read_text())
    Path(own_copy + ".json").write_text(json.dumps({name: value for name, value in tree.items() if name != "sha256"}))
    report = check_data(DataQuestion(own_copy))
    assert report.ok, report.problems
    assert [note.split(" in the")[0] for note in report.notes] == ["SHA-256 not recorded"]


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_what_cannot_be_read_is_one_line(own_copy: str, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """Tests may run as root, who may read everything."""
    from megatron_ext.data.dataset import dataset_fingerprint
    from megatron_ext.doctor.index import read_index

    really_open = builtins.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path) == own_copy + ending:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    reads = [lambda: dataset_fingerprint(own_copy), lambda: check_data(DataQuestion(own_copy))]
    for read in reads + ([lambda: read_index(Path(own_copy + ".idx"))] if ending == ".idx" else []):
        with pytest.raises(UserError, match=r"Permission denied") as caught:
            read()
        assert own_copy + ending in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_data_set_without_sidecar_is_checked_with_the_tokenizer_named(own_copy: str, corpus: Corpus) -> None:
    Path(own_copy + ".json").unlink()
    assert problems(own_copy) == []
    edit(own_copy + ".bin", 0, struct.pack("<H", 541))
    assert problems(own_copy) == []  # nobody knows how many ids there are
    assert "541" in problems(own_copy, tokenizer=corpus.tokenizer)[0]


# --- samples ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_config(corpus: Corpus, own_copy: str, tmp_path: Path) -> Path:
    """A run over two sets, with a mixture, a falling mask ratio and micro-batches of two."""
    tree = {
        "output_dir": str(tmp_path / "run"),
        "data": {
            "tokenizer": str(corpus.tokenizer),
            "train": [{"prefix": str(corpus.prefix), "weight": 2}, {"prefix": own_copy}],
            "split": [0.5, 0.5, 0.0],
            "sequence_length": 32,
        },
        "model": {"preset": "nano"},
        "phases": [
            {"objective": "clm", "steps": 2},
            {
                "objective": "mlm",
                "steps": 200,
                "masking": {"ratio": 0.6, "final_ratio": 0.2, "random_share": 0.3, "mask_share": 0.5},
            },
            {"objective": {"clm": 0.4, "mntp": 0.6}, "steps": 10},
        ],
        "training": {"micro_batch_size": 2, "global_batch_size": 8, "seed": 5},
    }
    tree["phases"][1]["masking"]["keep_share"] = 0.2
    (tmp_path / "plan.yaml").write_text(json.dumps(tree))
    return tmp_path / "plan.yaml"


def test_samples_are_those_that_training_gets(run_config: Path) -> None:
    """Against the training loader's own rows, in every phase and beyond the first epoch."""
    from megatron_ext.config_reading import load_config
    from megatron_ext.data.loader import BatchBuilder, TrainingLoader
    from megatron_ext.train.preflight import prepare

    config, _ = load_config(["--config", str(run_config)])
    config.validation.interval = 0
    setup = prepare(config, 1)
    builder = BatchBuilder(setup.training_data, config.data, setup.vocabulary, config.training.seed)
    loader = TrainingLoader(builder, setup.plan, config.training, rank=0, ranks=1)
    objectives, states, epochs = set(), set(), set()
    for index in (0, 15, 16, 901, 1615, 1616, 1619, 1690):
        sample = check_data(DataQuestion("", config=run_config, sample=index)).facts["sample"]
        place = index % 8
        batch = loader.load(index // 8).micro_batches[place // 2]
        rows = slice(32 * (place % 2), 32 * (place % 2) + 32)
        targets = {
            int(row) - rows.start: int(token)
            for row, token in zip(batch.target_positions, batch.target_ids, strict=True)
            if rows.start <= row < rows.stop
        }
        assert sample["objective"] == batch.objective.name
        assert [row["input_id"] for row in sample["tokens"]] == batch.input_ids[rows].tolist()
        assert [row["position"] for row in sample["tokens"]] == batch.position_ids[rows].tolist()
        assert {row["row"]: row["target_id"] for row in sample["tokens"] if row["target_id"] is not None} == targets
        assert [row["original_id"] for row in sample["tokens"]] == setup.training_data.sample(index).tokens.tolist()
        objectives.add(sample["objective"])
        states |= {row["state"] for row in sample["tokens"]}
        epochs.add(sample["epoch"])
    assert objectives == {"clm", "mlm", "mntp"}
    assert states == {"shown", "masked", "random", "kept"}
    assert max(epochs) > 0


def test_a_sample_can_be_shown_under_another_phase_or_objective(run_config: Path, corpus: Corpus) -> None:
    report = check_data(DataQuestion("", config=run_config, sample=5000, phase=1))
    assert report.facts["sample"]["mask_ratio"] == pytest.approx(0.2)
    assert "outside phase" in report.notes[-1]
    report = check_data(DataQuestion(str(corpus.prefix), config=run_config, sample=3, objective="mntp", ratio=0.9))
    assert (report.facts["sample"]["objective"], report.facts["sample"]["mask_ratio"]) == ("mntp", 0.9)
    assert len(report.facts["sets"]) == 1
    alone = check_data(DataQuestion(str(corpus.prefix), sample=3, objective="clm", sequence_length=16, seed=2)).facts["sample"]
    assert (alone["causal"], len(alone["tokens"]), alone["mask_ratio"]) == (True, 16, None)
    other = check_data(DataQuestion(str(corpus.prefix), sample=3, objective="clm", sequence_length=16, seed=3)).facts["sample"]
    assert alone["tokens"] != other["tokens"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sample": 10**9}, "the plan ends with sample 1695"),
        ({"sample": -1}, "--sample is -1"),
        ({"sample": 10**23}, "--sample is 1"),
        ({"prefix": None, "config": None, "sample": 10**23}, "it must lie between 0 and 9007199254740992"),
        ({"sample": 0, "sequence_length": 0}, "sequence_length is 0"),
        ({"sample": 0, "phase": 3}, "--phase is 3"),
        ({"sample": 0, "objective": "all"}, "--objective is all"),
        ({"sample": 0, "ratio": 1.5}, "1.5"),
        ({"prefix": "elsewhere"}, "none of the data sets"),
        ({"prefix": "elsewhere", "config": None}, "there is no file elsewhere.bin"),
        ({"config": None}, "names no data set"),
        ({"prefix": "elsewhere", "config": None, "phase": 1, "sample": 0}, "--phase is 1"),
    ],
)
def test_questions_without_an_answer_are_refused(run_config: Path, own_copy: str, changes: dict[str, Any], message: str) -> None:
    question = {"prefix": "", "config": run_config, **changes}
    question["prefix"] = own_copy if question["prefix"] is None else question["prefix"]
    with pytest.raises(UserError) as caught:
        check_data(DataQuestion(**question))
    assert message in str(caught.value)


def test_a_tokenizer_without_mask_token_shows_clm_alone(own_copy: str, tmp_path: Path) -> None:
    folder = word_tokenizer(tmp_path, [f"w{number}" for number in range(600)])
    Path(own_copy + ".json").unlink()
    question = {"tokenizer": folder, "sample": 0, "sequence_length": 8}
    assert check_data(DataQuestion(own_copy, objective="clm", **question)).facts["sample"]["objective"] == "clm"
    with pytest.raises(UserError, match="no mask token"):
        check_data(DataQuestion(own_copy, objective="mlm", **question))


def word_tokenizer(folder: Path, words: list[str], **special: str) -> Path:
    """A folder with a tokenizer that has just these words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = [*special.values(), *words]
    pipeline = Tokenizer(models.WordLevel({word: index for index, word in enumerate(entries)}, unk_token=entries[0]))
    pipeline.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=pipeline, **special).save_pretrained(folder / "words")
    return folder / "words"


def test_samples_of_any_script_print(tmp_path: Path) -> None:
    from megatron_ext.data.corpus import preprocess

    words = ["שלום", "مرحبا", "\u0301", "日本語", "e\u0301", "\u202e", "ไทย", "👩\u200d🔬", "\x1b[31m", "𐤀"]
    special = {"unk_token": "[UNK]", "eos_token": "[EOS]", "mask_token": "[MASK]"}
    tokenizer = word_tokenizer(tmp_path, words, **special)
    (tmp_path / "text.jsonl").write_text((json.dumps({"text": " ".join(words)}) + "\n") * 3)
    preprocess([tmp_path / "text.jsonl"], tmp_path / "data", tokenizer, workers=1, progress=False)
    done = doctor("--data", str(tmp_path / "data"), "--sample", "0", "--sequence-length", "22", "--objective", "mlm")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout  # neither colours, which are for terminals, nor the text's own escape
    assert all(word in done.stdout for word in ("שלום", "日本語"))
    sample = check_data(DataQuestion(str(tmp_path / "data"), sample=0, sequence_length=22)).facts["sample"]
    assert {row["original"] for row in sample["tokens"]} == {*words, "[EOS]"}


def test_printable_text_stays_on_its_line() -> None:
    assert printable("a\nb\x1b") == "a\\nb\\x1b"
    assert printable("\u0301") == "\u25cc\u0301"
    assert printable("שלום")[0] == "\u2068"
    assert [width(text) for text in ("abc", "日本", "e\u0301", "\u2068")] == [3, 4, 1, 0]


def test_figures_that_json_lacks_are_null_and_spelled_out() -> None:
    import torch

    nan, one = torch.tensor([float("nan"), 1.0]), torch.ones(2)
    found, expected = (
        {"loss": loss, "predicted": 5, "gradient_norm": norm, "gradients": {"weight": gradient}}
        for loss, norm, gradient in ((float("nan"), float("inf"), nan), (2.0, 1.0, one))
    )
    row = compare(found, expected, TOLERANCES["fp32"])
    report = Report("equivalence", {"results": [row]}, row["failures"])
    back = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert (back["ok"], back["results"][0]["loss"], back["results"][0]["gradient_norm_difference"]) == (False, None, None)
    assert [re.search(r"differs by (\w+)", problem)[1] for problem in back["problems"]] == ["nan", "inf", "nan"]


# --- the tool --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layout", "tensor=2"], "--equivalence"),
        (["--equivalence"], "--layout"),
        (["--data", "p", "--phase", "1"], "--sample"),
        (["--objective", "mlm"], "--objective"),
        (["--jsn"], "--jsn"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    done = doctor(*arguments)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*\n", done.stderr)
    assert message in done.stderr
    assert done.stdout == ""


def test_verdicts_and_colours() -> None:
    report = Report("data", {"sets": [], "sample": None}, problems=["a", "b"], notes=["c"])
    assert render(report, PLAIN) == ["note: c", "problem: a", "problem: b", "data: 2 problems"]
    assert "\x1b[31m" in render(report, Painter(coloured=True))[-1]
