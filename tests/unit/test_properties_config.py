"""Properties of the configuration loader: what is valid survives every round trip, what is not is one line, whatever it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config import RunConfig
from megatron_ext.config_reading import from_dict, load_config
from megatron_ext.errors import UserError
from megatron_ext.objective import PhasePlan
from megatron_ext.train.show import config_as_yaml
from tests.unit.properties import TEXTS, changed, examples

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
COUNTS = st.integers(1, 10**12)
RATIOS = st.floats(1e-6, 1 - 1e-6)
WEIGHTS = st.floats(1e-12, 1e12)


def optional(**keys: st.SearchStrategy) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries({}, optional=keys)


def shares(first: float, second: float) -> list[float]:
    return [first, (1 - first) * second, (1 - first) * (1 - second)]


SHARES = st.builds(shares, st.floats(0.01, 1), st.floats(0, 1))
MASKING = st.builds(
    lambda masking, parts: masking | dict(zip(("mask_share", "random_share", "keep_share"), parts, strict=True)),
    optional(
        ratio=RATIOS,
        final_ratio=st.none() | RATIOS,
        count=st.sampled_from(["bernoulli", "exact"]),
        unit=st.sampled_from(["token", "word", "span"]),
        mean_span_length=st.floats(1, 100),
    ),
    SHARES,
)
OBJECTIVES = st.sampled_from(["clm", "mlm", "mntp"])
PHASES = st.builds(
    lambda length, phase, objective: {**length, **phase, "objective": objective},
    st.one_of(st.builds(lambda n: {"steps": n}, COUNTS), st.builds(lambda n: {"tokens": n, "steps": None}, COUNTS)),
    optional(
        masking=MASKING, optimizer_state=st.sampled_from(["keep", "reset"]), learning_rate=st.sampled_from(["continue", "rewarm"])
    ),
    OBJECTIVES | st.dictionaries(OBJECTIVES, WEIGHTS, min_size=1),
)
SOURCES = st.lists(st.fixed_dictionaries({"prefix": NAMES}, optional={"weight": WEIGHTS}), min_size=1, max_size=3)
TREES = st.fixed_dictionaries(
    {
        "output_dir": NAMES,
        "data": st.fixed_dictionaries(
            {"tokenizer": NAMES, "train": SOURCES}, optional={"split": SHARES, "sequence_length": COUNTS}
        ),
        "phases": st.lists(PHASES, min_size=1, max_size=4),
    },
    optional={
        "model": optional(
            preset=NAMES, hidden_size=st.none() | COUNTS, rotary_base=WEIGHTS, tie_embeddings=st.none() | st.booleans()
        ),
        "optimizer": optional(
            learning_rate=st.floats(1e-300, 1e300), epsilon=WEIGHTS, schedule=st.sampled_from(["wsd", "constant"])
        ),
        "training": optional(seed=st.integers(0, 2**63 - 1), stop_at_step=st.none() | COUNTS),
        "tracking": optional(run_name=st.none() | TEXTS.filter(lambda text: "\0" not in text), mlflow=st.booleans()),
        "resume": NAMES,
    },
)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**400, 10**401)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1e-3", "null", "no", "\ud800", "\0", "1e999", "[clm]", ".nan"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=4,
)
WORDS = st.sampled_from(
    ["output_dir", "data", "tokenizer", "train", "prefix", "weight", "phases", "objective", "clm", "steps", "masking", "ratio"]
    + [":", "-", "[", "]", "{", "}", ",", "&a", "*a", "<<", "!", "'", "|", ">", "?", "#", "\t", "~", "null", "1e-3", ".inf", "0x1F"]
    + ["1:30", "2024-01-01", "no", "yes", "---", "...", "%YAML", "@", "`", '"', "\\", "\x85", "\u2028", "\ufeff", "\x1b", "é", "\n"]
)


def outcome(call) -> RunConfig | None:
    """The configuration, or None where it was refused in one short line that steers no terminal. Anything else fails."""
    try:
        config = call()
    except UserError as error:
        message = str(error)
        assert message and message.isprintable() and len(message) <= 2100, message
        return None
    assert isinstance(config, RunConfig)
    return config


def load(folder: Path, content: bytes) -> RunConfig:
    (folder / "run.yaml").write_bytes(content)
    return load_config(["--config", str(folder / "run.yaml")])[0]


@examples(60)
@given(TREES)
def test_a_valid_configuration_survives_every_round_trip(tmp_path: Path, tree: dict[str, Any]) -> None:
    config = from_dict(tree)
    stored = config.as_dict()
    assert from_dict(stored) == config
    assert from_dict(stored).as_dict() == stored
    assert from_dict(json.loads(json.dumps(stored))) == config
    assert load(tmp_path, config_as_yaml(config).encode()) == config
    for phase, given_phase in zip(config.phases, tree["phases"], strict=True):
        assert phase.objective == given_phase["objective"]
        assert (phase.steps, phase.tokens) == (given_phase.get("steps"), given_phase.get("tokens"))
    assert config.training.seed == tree.get("training", {}).get("seed", 0)


@examples(300)
@given(st.data(), ANYTHING, st.sampled_from(["replace", "delete", "add"]))
def test_one_changed_value_loads_or_is_named(data: st.DataObject, value: Any, change: str) -> None:
    tree = changed(FULL, data, value, change)
    config = outcome(lambda: from_dict(tree))
    if config is not None:
        assert PhasePlan.from_config(config).total_steps > 0
        assert from_dict(config.as_dict()) == config


FULL = from_dict(
    {
        "output_dir": "run",
        "data": {"tokenizer": "t", "train": [{"prefix": "a"}, {"prefix": "b", "weight": 2.0}], "validation": [{"prefix": "c"}]},
        "phases": [{"objective": "clm", "steps": 3}, {"objective": {"clm": 0.25, "mlm": 0.75}, "tokens": 5000}],
    }
).as_dict()


@examples(100)
@given(st.one_of(TEXTS, st.lists(WORDS, max_size=30).map(" ".join), st.lists(WORDS, max_size=30).map("\n".join)))
def test_any_text_as_a_file_is_a_configuration_or_one_line(tmp_path: Path, text: str) -> None:
    outcome(lambda: load(tmp_path, text.encode()))


@examples(30)
@given(st.binary(max_size=60), st.integers(0, 400))
def test_any_bytes_in_a_file_are_a_configuration_or_one_line(tmp_path: Path, junk: bytes, place: int) -> None:
    valid = yaml.safe_dump(FULL).encode()
    outcome(lambda: load(tmp_path, valid[:place] + junk + valid[place:]))


@examples(60)
@given(
    st.sampled_from(["training.seed", "data.train", "phases", "tracking.run_name", "optimizer.beta1"]), TEXTS | ANYTHING.map(str)
)
def test_any_word_of_the_command_line_loads_or_is_named(tmp_path: Path, name: str, word: str) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(FULL))
    config = outcome(lambda: load_config(["--config", str(tmp_path / "run.yaml"), f"--{name}={word}"])[0])
    if name == "tracking.run_name" and config is not None:
        assert config.tracking.run_name == (None if word == "null" else word), "text is taken as it is"


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
ONE_LINE = {
    "a key twice": ("training: {seed: 1}\ndata: {}\ntraining: {seed: 2}\n", ["line 3", "training is there twice", "line 1"]),
    "an inner key twice": ("phases:\n- objective: clm\n  steps: 1\n  steps: 2\n", ["line 4", "phases[0].steps is there twice"]),
    "billion laughs": (LAUGHS, ["100,000 values"]),
    "laughs by merging": (LAUGHS.replace("[", "{<<: [").replace("]", "]}").replace("{<<: [x, x]}", "{x: 1}"), ["100,000 values"]),
    "an alias of itself": ("a: &a [*a]\n", ["32 deep"]),
    "deep lists": ("[" * 100_000, ["32 deep"]),
    "deep mappings": ("{a: " * 100_000, ["32 deep"]),
    "tabs": ("data:\n\ttokenizer: x\n", ["line 2", "\\t"]),
    "two documents": ("resume: a\n---\nresume: b\n", ["line 2", "second document"]),
    "a tag": ("a: !!python/object/apply:os.system [x]\n", ["line 1", "tag"]),
    "a list": ("- a\n", ["a list of 1", "mapping"]),
    "nothing": ("# only a comment\n", ["empty"]),
    "a boolean for text": ("tracking: {run_name: no}\n", ["tracking.run_name is false", "quotes"]),
    "a number for text": ("resume: 5\n", ["resume is 5", "quotes"]),
    "no date": ("resume: 2024-99-99\n", ["line 1", "2024-99-99"]),
    "a huge number": (f"training: {{seed: {'9' * 5000}}}\n", ["line 1"]),
    "no number": ("optimizer: {beta1: .nan}\n", ["optimizer.beta1 is nan", "finite"]),
    "an infinite one": ("phases: [{objective: {mlm: .inf}, steps: 1}]\n", ["phases[0].objective.mlm is inf"]),
    "a misspelt key": (
        "phases:\n- {objective: clm, steps: 1}\n- {objectiv: clm}\n",
        ["line 3", "phases[1].objectiv", "did you mean objective?"],
    ),
    "a wrong phase": ("phases:\n- {objective: clm, steps: 1}\n- {objective: bert, steps: 1}\n", ["line 3: phases[1]: ", "bert"]),
    "escapes": ('resume: {"\\e[31m": 1}\n', ["resume is a mapping"]),
    "half a surrogate pair": ('resume: "\\ud800"\n', ["resume", "UTF-8"]),
}


@pytest.mark.parametrize("name", ONE_LINE)
def test_mistakes_in_yaml_are_named_with_their_line(name: str, tmp_path: Path) -> None:
    text, words = ONE_LINE[name]
    (tmp_path / "base.yaml").write_text(json.dumps(FULL))
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(["--config", str(tmp_path / "base.yaml"), "--config", str(tmp_path / "run.yaml")])
    message = str(caught.value)
    assert message.isprintable() and len(message) < 300, message
    assert f"--config {tmp_path}/run.yaml" in message
    assert [word for word in words if word not in message] == [], message


def test_aliases_and_merges_mean_what_yaml_says(tmp_path: Path) -> None:
    text = """
output_dir: run
data: {tokenizer: t, train: [{prefix: a}]}
phases:
  - &first {objective: mlm, steps: 10, masking: &masking {ratio: 1e-1, unit: word}}
  - {<<: *first, steps: 7, masking: {<<: *masking, ratio: 0.3}}
"""
    first, second = load(tmp_path, text.encode()).phases
    assert (first.steps, first.masking.ratio, first.masking.unit) == (10, 0.1, "word")
    assert (second.steps, second.masking.ratio, second.masking.unit, second.objective) == (7, 0.3, "word", "mlm")
