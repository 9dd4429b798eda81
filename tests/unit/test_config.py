"""Wrong configurations: one clear line that names the key, before anything is written or any process group exists."""

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ext.config import (
    DataConfig,
    DataSource,
    MaskingConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_ext.config_reading import from_dict, load_config
from megatron_ext.errors import UserError
from megatron_ext.runtime.topology import check_layout

ROOT = Path(__file__).parents[2]
TREE: dict[str, Any] = {
    "output_dir": "run",
    "data": {"tokenizer": "tokenizer.model", "train": [{"prefix": "set"}], "sequence_length": 64},
    "phases": [
        {"objective": "clm", "steps": 30},
        {"objective": {"clm": 0.25, "mlm": 0.75}, "tokens": 5000, "masking": {"ratio": 0.2, "final_ratio": 0.3}},
    ],
    "model": {"preset": "nano"},
}
Edit = Callable[[dict[str, Any]], Any]


def edited(edit: Edit, tree: dict[str, Any] = TREE) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    edit(tree)
    return tree


def put(path: str, value: Any) -> Edit:
    """An edit that sets one value; numbers in the path are places in a list."""

    def edit(tree: Any) -> None:
        *parts, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parts:
            tree = tree[part] if isinstance(tree, list) else tree.setdefault(part, {})
        tree[last] = value

    return edit


def written(folder: Path, tree: dict[str, Any]) -> list[str]:
    """Arguments that read this tree from a file."""
    (folder / "run.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return ["--config", str(folder / "run.yaml")]


WRONG_KEYS = {
    "unknown section": (put("trainning.seed", 1), ["trainning"]),
    "unknown key": (put("data.sequence_lenght", 8), ["data", "sequence_lenght"]),
    "unknown key of a data set": (put("data.train.0.wieght", 2.0), ["data.train", "wieght"]),
    "unknown key of a phase": (put("phases.0.objectiv", "clm"), ["phases", "objectiv"]),
    "unknown key of the masking": (put("phases.1.masking.rate", 0.4), ["phases", "masking", "rate"]),
    "wrong type": (put("data.sequence_length", "long"), ["data.sequence_length", "long"]),
    "fraction for a whole number": (put("training.micro_batch_size", 1.5), ["training.micro_batch_size", "1.5"]),
    "wrong type in a phase": (put("phases.0.steps", "many"), ["phases", "steps", "many"]),
    "unknown choice": (put("optimizer.schedule", "linear"), ["optimizer.schedule", "linear", "cosine"]),
    "no phases": (put("phases", []), ["phases"]),
    "missing phases": (lambda tree: tree.pop("phases"), ["phases"]),
    "missing tokenizer": (lambda tree: tree["data"].pop("tokenizer"), ["data.tokenizer"]),
    "phase of no steps": (put("phases.0.steps", 0), ["phase", "steps", "0"]),
    "phase of negative length": (put("phases.1.tokens", -5), ["phase", "tokens", "-5"]),
    "steps and tokens": (put("phases.0.tokens", 10), ["phase", "steps", "tokens", "exactly one"]),
    "neither steps nor tokens": (lambda tree: tree["phases"][0].pop("steps"), ["phase", "steps", "tokens", "exactly one"]),
    "unknown objective": (put("phases.0.objective", "bert"), ["objective", "bert", "clm, mlm, mntp"]),
    "unknown objective in a mixture": (put("phases.1.objective", {"clm": 1.0, "bert": 1.0}), ["objective", "bert"]),
    "mixture with a negative weight": (put("phases.1.objective", {"clm": -1.0, "mlm": 1.0}), ["objective clm", "-1"]),
    "empty mixture": (put("phases.1.objective", {}), ["objective", "empty"]),
    "mask ratio above 1": (put("phases.1.masking.ratio", 1.5), ["masking.ratio", "1.5"]),
    "mask ratio of 0": (put("phases.1.masking.ratio", 0.0), ["masking.ratio", "0"]),
    "final ratio above 1": (put("phases.1.masking.final_ratio", 2), ["masking.final_ratio", "2"]),
    "shares that do not add up": (put("phases.1.masking.random_share", 0.1), ["random_share", "1.1"]),
    "span shorter than a token": (put("phases.1.masking.mean_span_length", 0.5), ["mean_span_length", "0.5"]),
    "no training data": (put("data.train", []), ["data.train"]),
    "weight of 0": (put("data.train.0.weight", 0), ["set", "weight"]),
    "two split shares": (put("data.split", [0.9, 0.1]), ["data.split"]),
    "split beyond 1": (put("data.split", [0.9, 0.1, 0.1]), ["data.split"]),
    "no share for training": (put("data.split", [0.0, 0.5, 0.5]), ["data.split"]),
    "batch sizes": (put("training.micro_batch_size", 3), ["training.global_batch_size 8", "training.micro_batch_size 3"]),
    "negative seed": (put("training.seed", -1), ["training.seed", "-1"]),
    "seed beyond 63 bits": (put("training.seed", 2**63), ["training.seed"]),
    "interleaving without a pipeline": (put("parallel.virtual_pipeline", 2), ["parallel.virtual_pipeline", "parallel.pipeline"]),
    "parallel size of 0": (put("parallel.tensor", 0), ["parallel.tensor", "0"]),
    "negative width": (put("model.hidden_size", -64), ["model.hidden_size", "-64"]),
    "decay of a cosine": (put("optimizer", {"schedule": "cosine", "decay_steps": 5}), ["optimizer.decay_steps", "cosine"]),
    "minimum above the peak": (put("optimizer.min_learning_rate", 1.0), ["optimizer.min_learning_rate", "optimizer.learning_rate"]),
    "learning rate that is no number": (put("optimizer.learning_rate", float("nan")), ["optimizer.learning_rate", "nan"]),
    "infinite learning rate": (put("optimizer.learning_rate", float("inf")), ["optimizer.learning_rate", "inf"]),
    "beta that never forgets": (put("optimizer.beta1", 1.0), ["optimizer.beta1", "1.0"]),
    "validation ratio": (put("validation.mask_ratio", 1.0), ["validation.mask_ratio", "1.0"]),
    "negative interval": (put("checkpoint.interval", -1), ["checkpoint.interval", "-1"]),
}


def refused(call: Callable[[], object], words: list[str]) -> None:
    """The call raises a `UserError` of one line that holds all words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message.strip()
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_wrong_value_is_named(tmp_path: Path, name: str) -> None:
    edit, words = WRONG_KEYS[name]
    refused(lambda: load_config(written(tmp_path, edited(edit))), words)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--training.seed", "many"], ["training.seed", "many"]),
        (["--training.sede", "1"], ["--training.sede"]),
        (["--phases", "clm"], ["phases"]),
        (["stray"], ["stray"]),
    ],
)
def test_wrong_argument_is_named(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    refused(lambda: load_config([*written(tmp_path, TREE), *arguments]), words)


def test_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    for arguments in (["--config", f"{tmp_path}/no.yaml"], [f"--config={tmp_path}/no.yaml"]):
        refused(lambda arguments=arguments: load_config(arguments), [f"{tmp_path}/no.yaml"])
    refused(lambda: load_config(["--config", str(tmp_path)]), [str(tmp_path)])
    refused(lambda: load_config(["--config"]), ["--config"])
    refused(lambda: load_config([]), ["output_dir", "data.tokenizer", "data.train", "phases"])
    for text in ("data: [1,", "- 1", "hello", ""):
        (tmp_path / "run.yaml").write_text(text)
        refused(lambda: load_config(["--config", str(tmp_path / "run.yaml")]), ["config"])


def test_values_come_from_defaults_file_and_command_line(tmp_path: Path) -> None:
    tree = edited(put("optimizer", {"learning_rate": 0.5, "warmup_steps": 7}))
    text = yaml.safe_dump(tree).replace("0.5", "5e-1")  # YAML 1.1 reads this as a string
    (tmp_path / "run.yaml").write_text(text)
    config, only_print = load_config(["--config", str(tmp_path / "run.yaml"), "--training.seed", "9", "--optimizer.warmup_steps=3"])
    assert not only_print
    assert config == RunConfig(
        output_dir="run",
        data=DataConfig(tokenizer="tokenizer.model", train=[DataSource(prefix="set")], sequence_length=64),
        phases=[
            PhaseConfig(objective="clm", steps=30),
            PhaseConfig(objective={"clm": 0.25, "mlm": 0.75}, tokens=5000, masking=MaskingConfig(ratio=0.2, final_ratio=0.3)),
        ],
        model=type(config.model)(preset="nano"),
        optimizer=type(config.optimizer)(learning_rate=0.5, warmup_steps=3),
        training=TrainingConfig(seed=9),
    )
    assert isinstance(config.phases[1].masking, MaskingConfig)
    assert isinstance(config.optimizer.learning_rate, float)


def full_config(tmp_path: Path) -> RunConfig:
    edits = [
        put("data.train", [{"prefix": "a", "weight": 2}, {"prefix": "b", "weight": 0.125}]),
        put("phases.1.objective", {"mntp": 1, "clm": 0.25, "mlm": 2.5}),
        put("phases.1.learning_rate", "rewarm"),
        put("model.rotary_base", 250_000),
        put("training.stop_at_step", 5),
        put("tracking.run_name", "äöü: [x] #1"),
    ]
    tree = TREE
    for edit in edits:
        tree = edited(edit, tree)
    return load_config(written(tmp_path, tree))[0]


def test_stored_configuration_is_read_back(tmp_path: Path) -> None:
    config = full_config(tmp_path)
    again = from_dict(json.loads(json.dumps(config.as_dict())))
    assert again == config
    assert list(again.phases[1].objective) == ["mntp", "clm", "mlm"]
    assert load_config(written(tmp_path, config.as_dict()))[0] == config
    other = from_dict(edited(put("phases.0.steps", 31), config.as_dict()))
    assert other != config


def test_precision_of_earlier_versions_is_read() -> None:
    stored = {**TREE, "training": {"seed": 7, "precision": "bf16"}}
    config = from_dict(stored)
    assert (config.precision.recipe, config.training.seed) == ("bf16", 7)
    assert stored["training"] == {"seed": 7, "precision": "bf16"}


def test_reading_a_stored_configuration_leaves_it_alone(tmp_path: Path) -> None:
    tree = full_config(tmp_path).as_dict()
    kept = copy.deepcopy(tree)
    from_dict(tree)
    assert tree == kept


def test_stored_configuration_of_another_version_is_refused(tmp_path: Path) -> None:
    tree = full_config(tmp_path).as_dict()
    refused(lambda: from_dict(edited(put("training.of_the_future", 1), tree)), ["training", "of_the_future"])
    refused(lambda: from_dict(edited(put("training.seed", "x"), tree)), ["training.seed"])
    refused(lambda: from_dict(edited(put("phases.0.steps", 0), tree)), ["phase", "steps"])


# --- what needs the data, the tokenizer and the number of ranks -------------------------------------------------------------


def make_tokenizer(folder: Path, words: list[str], mask: bool = True) -> str:
    """A Hugging Face tokenizer folder with one piece per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["[UNK]", "[EOS]", *(["[MASK]"] if mask else []), *words]
    pipeline = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "eos_token": "[EOS]"} | ({"mask_token": "[MASK]"} if mask else {})
    PreTrainedTokenizerFast(tokenizer_object=pipeline, **special).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers `tokenizer`, `other`, `maskless`; the data sets `set` and, of the maskless tokenizer, `maskless-set`."""
    from megatron_ext.data.corpus import preprocess

    folder = tmp_path_factory.mktemp("files")
    words = [f"word{number}" for number in range(90)]
    text = "".join(json.dumps({"text": " ".join(words[n % 7 : n % 7 + 60])}) + "\n" for n in range(200))
    (folder / "text.jsonl").write_text(text)
    make_tokenizer(folder / "other", words[::-1])
    for name, mask, prefix in (("tokenizer", True, "set"), ("maskless", False, "maskless-set")):
        make_tokenizer(folder / name, words, mask)
        preprocess([folder / "text.jsonl"], folder / prefix, folder / name, workers=1, progress=False)
    return folder


def run_tree(files: Path) -> dict[str, Any]:
    data = {"tokenizer": str(files / "tokenizer"), "train": [{"prefix": str(files / "set")}], "sequence_length": 64}
    return edited(put("data", data))


SIZES_THAT_DO_NOT_FIT: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "ranks": (3, {"parallel.tensor": 2}, ["3 ranks", "parallel.tensor 2", "parallel.pipeline 1"]),
    "ranks of a pipeline": (6, {"parallel.tensor": 2, "parallel.pipeline": 2}, ["6 ranks", "parallel.pipeline 2", "4"]),
    "heads": (3, {"parallel.tensor": 3}, ["parallel.tensor is 3", "model.num_attention_heads 4"]),
    "groups": (4, {"parallel.tensor": 4}, ["parallel.tensor is 4", "model.num_query_groups 2"]),
    "feed-forward width": (
        2,
        {"parallel.tensor": 2, "model.ffn_hidden_size": 161},
        ["parallel.tensor is 2", "model.ffn_hidden_size 161"],
    ),
    "tokens": (2, {"parallel.tensor": 2, "data.sequence_length": 63}, ["parallel.tensor is 2", "tokens", "63"]),
    "ranks of a context": (6, {"parallel.context": 4}, ["6 ranks", "parallel.context 4"]),
    "tokens of a context": (4, {"parallel.context": 4, "data.sequence_length": 62}, ["parallel.context is 4", "tokens", "62"]),
    "tokens of a context's tensor ranks": (
        4,
        {"parallel.context": 2, "parallel.tensor": 2, "data.sequence_length": 62},
        ["parallel.context is 2", "parallel.tensor 2", "62"],
    ),
    "layers": (3, {"parallel.pipeline": 3}, ["model.num_layers 4", "parallel.pipeline 3"]),
    "chunks": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 4}, ["model.num_layers 4", "parallel.virtual_pipeline 4"]),
    "batch": (3, {}, ["training.global_batch_size 8", "training.micro_batch_size 1", "3 data-parallel ranks"]),
    "interleaved batch": (
        2,
        {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "training.global_batch_size": 7},
        ["parallel.pipeline 2", "training.global_batch_size 7"],
    ),
}


@pytest.mark.parametrize("name", SIZES_THAT_DO_NOT_FIT)
def test_sizes_that_do_not_fit_are_named(files: Path, name: str) -> None:
    from megatron_ext.train.preflight import prepare

    ranks, edits, words = SIZES_THAT_DO_NOT_FIT[name]
    tree = run_tree(files)
    for path, value in edits.items():
        tree = edited(put(path, value), tree)
    refused(lambda: prepare(from_dict(tree), ranks), words)


def test_layout() -> None:
    training = TrainingConfig(micro_batch_size=2, global_batch_size=48)
    parallel = ParallelConfig(tensor=2, pipeline=3, virtual_pipeline=2)
    layout = check_layout(parallel, training, 12, {"heads": 4}, 24)
    assert (layout.tensor, layout.pipeline, layout.virtual_pipeline, layout.data) == (2, 3, 2, 4)
    assert layout.tensor * layout.pipeline * layout.data == layout.world_size == 24
    assert layout.micro_batches(training) == 6
    assert layout.sequence_parallel
    assert not check_layout(ParallelConfig(), training, 12, {}, 1).sequence_parallel, "there is nothing to split on one rank"
    assert not check_layout(ParallelConfig(tensor=2, sequence=False), training, 12, {}, 2).sequence_parallel
    context = check_layout(ParallelConfig(tensor=2, context=3), training, 12, {}, 24, tokens=12)
    assert (context.tensor, context.context, context.data, context.micro_batches(training)) == (2, 3, 4, 6)
    assert str(context) == "TP2+SP x PP1 x CP3 x DP4"
    refused(lambda: check_layout(parallel, training, 12, {"heads": 3}, 24), ["parallel.tensor is 2", "heads 3"])
    refused(lambda: check_layout(parallel, training, 10, {}, 24), ["model.num_layers 10", "6 stages"])
    refused(lambda: check_layout(parallel, training, 12, {}, 20), ["20 ranks", "6"])


@pytest.mark.parametrize("name", ["overlap_gradient_reduce", "overlap_tensor_communication"])
def test_overlap_is_refused_where_nothing_can_do_it(files: Path, name: str) -> None:
    from megatron_ext.train.preflight import prepare

    tree = edited(put("parallel", {"tensor": 2, name: True}), run_tree(files))
    refused(lambda: prepare(from_dict(tree), 2), [f"parallel.{name} is true", "GPU"])


def without_sidecar(files: Path, name: str) -> str:
    """A copy of the data set as stock Megatron would have written it."""
    for ending in (".bin", ".idx"):
        (files / f"{name}{ending}").write_bytes((files / f"set{ending}").read_bytes())
    return str(files / name)


def test_run_that_fits_is_prepared(files: Path) -> None:
    import torch

    from megatron_ext.train.preflight import prepare

    setup = prepare(from_dict(run_tree(files)), 2)
    assert (setup.layout.data, setup.vocab_size, setup.padded_vocab_size) == (2, 93, 128)
    assert setup.plan.total_steps == 30 + 10  # 5,000 tokens at 8 x 64 a step
    assert setup.vocabulary.mask_id == 2
    assert sorted(setup.vocabulary.is_special.nonzero()[0].tolist()) == [0, 1, 2]
    assert [record["tokenizer_known"] for record in setup.data_record] == [True]
    assert setup.validation_data is not None
    assert not torch.distributed.is_initialized()
    stock = edited(put("data.train.0.prefix", without_sidecar(files, "stock")), run_tree(files))
    assert [record["tokenizer_known"] for record in prepare(from_dict(stock), 1).data_record] == [False]


def test_maskless_tokenizer_serves_causal_phases_only(files: Path) -> None:
    from megatron_ext.train.preflight import prepare

    tree = edited(put("data.tokenizer", str(files / "maskless")), run_tree(files))
    tree = edited(put("data.train.0.prefix", str(files / "maskless-set")), tree)
    refused(lambda: prepare(from_dict(tree), 1), ["data.tokenizer", "maskless", "no mask token"])
    causal = edited(put("validation.interval", 0), edited(put("phases", [{"objective": "clm", "steps": 3}]), tree))
    assert prepare(from_dict(causal), 1).vocab_size == 92


NO_FIT: dict[str, tuple[Edit, list[str]]] = {
    "samples longer than the model's positions": (
        put("data.sequence_length", 256),
        ["data.sequence_length 256", "model.max_position_embeddings 128"],
    ),
    "warmup and decay": (
        put("optimizer", {"warmup_steps": 30, "decay_steps": 11}),
        ["optimizer.warmup_steps 30", "decay_steps 11", "40 steps"],
    ),
    "warmup after a rewarm": (
        lambda tree: (put("optimizer.warmup_steps", 11)(tree), put("phases.1.learning_rate", "rewarm")(tree)),
        ["optimizer.warmup_steps 11", "10 steps", "step 30"],
    ),
    "stop after the plan": (put("training.stop_at_step", 41), ["training.stop_at_step", "41", "40"]),
    "unknown preset": (put("model.preset", "7b"), ["model.preset", "7b", "210m"]),
    "validation samples": (put("validation.samples", 63), ["validation.samples", "63", "multiple of 2"]),
    "validation split too small": (put("data.split", [0.999, 0.001, 0.0]), ["validation split", "0 tokens"]),
    "no Transformer Engine": (put("training.backend", "transformer_engine"), ["training.backend", "transformer_engine"]),
}


@pytest.mark.parametrize("name", NO_FIT)
def test_combination_that_does_not_fit_is_named(files: Path, name: str) -> None:
    import torch

    from megatron_ext.train.preflight import prepare

    edit, words = NO_FIT[name]
    if name == "no Transformer Engine" and torch.cuda.is_available():
        pytest.skip("this machine may well have Transformer Engine")
    refused(lambda: prepare(from_dict(edited(edit, run_tree(files))), 2), words)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_missing_data_file_is_named(files: Path, ending: str) -> None:
    from megatron_ext.train.preflight import prepare

    prefix = without_sidecar(files, f"no-{ending[1:]}")
    Path(prefix + ending).unlink()
    for key in ("data.train", "data.validation"):
        tree = edited(put(key, [{"prefix": prefix}]), run_tree(files))
        refused(lambda tree=tree: prepare(from_dict(tree), 1), [f"{prefix}{ending}"])


def test_missing_or_wrong_tokenizer_is_named(files: Path) -> None:
    from megatron_ext.train.preflight import prepare

    def with_tokenizer(name: str) -> RunConfig:
        return from_dict(edited(put("data.tokenizer", str(files / name)), run_tree(files)))

    refused(lambda: prepare(with_tokenizer("nowhere"), 1), [f"tokenizer {files}/nowhere"])
    refused(lambda: prepare(with_tokenizer("text.jsonl"), 1), [f"{files}/text.jsonl"])
    refused(lambda: prepare(with_tokenizer("other"), 1), [f"data set {files}/set", "another tokenizer", f"{files}/other"])


# --- the entry point --------------------------------------------------------------------------------------------------------


def start(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "pretrain_encoder.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "name", ["unknown key", "wrong type in a phase", "mask ratio above 1", "no such file", "no such tokenizer"]
)
def test_entry_point_prints_one_line_and_writes_nothing(tmp_path: Path, name: str) -> None:
    if name == "no such file":
        arguments, words = ["--config", "no.yaml"], ["no.yaml"]
    elif name == "no such tokenizer":
        arguments, words = written(tmp_path, TREE), ["tokenizer.model"]
    else:
        edit, words = WRONG_KEYS[name]
        arguments = written(tmp_path, edited(edit))
    before = sorted(tmp_path.rglob("*"))
    ended = start(arguments, tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written"


def test_help_is_quick(tmp_path: Path) -> None:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        ended = start(["--help"], tmp_path)
        times.append(time.perf_counter() - begin)
        assert ended.returncode == 0
        assert ended.stderr == ""
    assert min(times) < 2.0  # well under 1 s on a quiet machine
    for word in ("--config", "--print-config", "--optimizer.learning_rate", "--phases"):
        assert word in ended.stdout


def test_printed_configuration_loads_again(tmp_path: Path) -> None:
    config = full_config(tmp_path)
    arguments = ["--config", str(tmp_path / "run.yaml"), "--training.seed", "12", "--print-config"]
    before = sorted(tmp_path.rglob("*"))
    ended = start(arguments, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    assert yaml.safe_load(ended.stdout)["optimizer"]["beta2"] == 0.95, "defaults are shown too"
    (tmp_path / "printed.yaml").write_text(ended.stdout)
    again, _ = load_config(["--config", str(tmp_path / "printed.yaml")])
    assert again.training.seed == 12
    again.training.seed = 0
    assert again == config
