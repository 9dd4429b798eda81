"""A study's models and their tree: against the paper's counts, and against prefixes compared step by step."""

from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.evaluation.grid_file import read_grid
from megatron_ext.evaluation.tasks import find_task
from megatron_ext.model.flops import training_flops
from megatron_ext.model.presets import PRESETS
from megatron_ext.study.accounting import Accountant
from megatron_ext.study.local_run import cores_of
from megatron_ext.study.models import Model, Part, models_of, step_cost
from megatron_ext.study.overview import render
from megatron_ext.study.segment_run import segment_runs
from megatron_ext.study.segments import Segment, all_paths, all_segments, build_tree
from megatron_ext.study.study_file import Study, read_study
from tests.unit.processes import refusal, run_tool

STUDY = Path(__file__).parents[2] / "examples/mlm_vs_clm/study.yaml"
GRID = 500
"""Every length in the study is a multiple of it."""

SMALL = """
name: small
global_batch_size: 4
sequence_length: 100
vocab_size: 1000
warmup_steps: 5
decay_steps: 10
families:
  - name: only
    sizes: [tiny]
    budgets: [{budget}]
    budget_unit: {unit}
    plans:
      - stretches: [{first}, {second}]
"""


def test_the_mini_study_is_one_that_can_be_run(tmp_path: Path) -> None:
    """12 models of 9,000 steps in 5,250, and a grid of tasks that are there."""
    mini = Path(__file__).parents[2] / "examples/mini_study"
    study = read_study(str(mini / "study.yaml"))
    models = models_of(study)
    runs = segment_runs(study, all_paths(build_tree(models)), tmp_path)
    assert len(models) == 12 and sum(model.steps for model in models) == 9_000
    assert sum(run.segment.part.steps for run in runs) == 5_250
    grid = read_grid(str(mini / "grid.yaml"))
    assert {find_task(task).family for task in grid.tasks} == {"sc", "tc", "ir"}


@pytest.fixture(scope="module")
def study() -> Study:
    return read_study(str(STUDY))


@pytest.fixture(scope="module")
def models(study: Study) -> list[Model]:
    return models_of(study)


def small(
    tmp_path: Path,
    budget: float = 100,
    unit: str = "steps",
    first: str = "{objective: clm, share: 0.25}",
    second: str = "{objective: mlm}",
) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(SMALL.format(budget=budget, unit=unit, first=first, second=second))
    return read_study(str(path))


def steps_of(model: Model) -> list[tuple]:
    """What each stretch of GRID steps of a model trained alone is; a decay is another thing at each of its own steps."""
    found: list[tuple] = []
    for part in model.parts:
        ratio = 0.0 if part.objective == "clm" else part.ratio
        for number in range(part.steps // GRID):
            found.append((part.objective, ratio, part.is_decay, part.rewarms, number if part.is_decay else None))
    return found


def test_the_grid_is_the_papers(models: list[Model]) -> None:
    by_family = {family: [model for model in models if model.family == family] for family in {m.family for m in models}}
    assert len(models) == 38 and len({model.name for model in models}) == 38
    assert len(by_family["base"]) == 15
    assert sum(len(found) for family, found in by_family.items() if family.startswith("pfs")) == 17
    assert len(by_family["cpt"]) == 6
    assert {model.steps for model in by_family["base"]} == {42_000}


def test_sharing_reproduces_the_papers_accounts(study: Study, models: list[Model]) -> None:
    """116K steps of PFS at 610M beyond Base, and 26K of CPT for each of its two starts (PAPER: 120K and 26K)."""
    roots, accountant = build_tree(models), Accountant(study)
    base = [model for model in models if model.family == "base"]
    pfs = [model for model in models if model.family == "pfs"]
    assert accountant.below(pfs, roots, base).steps == 116_000
    for start in ("clm", "mlm0.4"):
        cpt = [model for model in models if model.family == "cpt" and model.name.startswith(f"610m-{start}-42000+")]
        others = [model for model in models if model not in cpt]
        assert len(cpt) == 3 and accountant.below(cpt, roots, others).steps == 26_000
    assert study.tokens_per_step == 192 * 12 * 1024


def test_every_prefix_is_trained_once(study: Study, models: list[Model]) -> None:
    """Steps compared one by one, without a tree: as many different beginnings as the tree has steps."""
    beginnings = set()
    for model in models:
        path: tuple = (model.size,)
        for step in steps_of(model):
            path = (hash(path), step)
            beginnings.add(path)
    assert Accountant(study).segments(all_segments(build_tree(models))).steps == len(beginnings) * GRID


def test_every_model_is_a_path_from_a_root(models: list[Model]) -> None:
    found = {}

    def walk(segment: Segment, above: list[Part]) -> None:
        parts = [*above, segment.part]
        assert segment.start_step == sum(part.steps for part in above)
        for model in segment.models:
            assert model not in found
            found[model] = parts
        for child in segment.children:
            assert child.size == segment.size
            walk(child, parts)

    for root in build_tree(models):
        walk(root, [])
    assert found.keys() == set(models)
    for model, parts in found.items():
        joined = [step[:3] for step in steps_of(Model("", model.size, "", tuple(parts)))]
        assert joined == [step[:3] for step in steps_of(model)]


@pytest.mark.parametrize("unit", ["tokens", "predicted_tokens", "flops"])
def test_budgets_are_matched_by_other_units(tmp_path: Path, unit: str) -> None:
    expected = {"tokens": 400.0, "predicted_tokens": 0.25 * 396 + 0.75 * 160}
    encoder = PRESETS["tiny"]()
    causal = training_flops(encoder, 1000, tokens=400, attended=400 * 50, predicted=396)
    masked = training_flops(encoder, 1000, tokens=400, attended=400 * 100, predicted=160)
    expected["flops"] = 0.25 * causal + 0.75 * masked
    last = {"tokens": 400.0, "predicted_tokens": 160.0, "flops": masked}[unit]
    (model,) = models_of(small(tmp_path, budget=10 * last + 80 * expected[unit], unit=unit))
    assert [(part.objective, part.steps, part.is_decay) for part in model.parts] == [
        ("clm", 20, False),
        ("mlm", 60, False),
        ("mlm", 10, True),
    ]


def test_costs_of_a_step(study: Study) -> None:
    cost = step_cost(study, "210m", "mlm", 0.4)
    assert cost.tokens == 2_359_296 and cost.predicted_tokens == pytest.approx(0.4 * 2_359_296)
    assert cost.flops / cost.tokens == pytest.approx(1.142e9, rel=1e-3)  # the table of counted FLOPs at s 2048, f 0.4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"first": "{objective: clm, share: 0.7}", "second": "{objective: mlm, share: 0.7}"}, "shares sum to 1.4"),
        ({"first": "{objective: clm, share: 0.7}", "second": "{objective: mlm, share: 0.2}"}, "they must sum to 1"),
        ({"first": "{objective: clm}"}, "several stretches without a share"),
        ({"first": "{objective: nsp, share: 0.2}"}, "allowed are"),
        ({"second": "{objective: mlm, ratio: 1.5}"}, "between 0 and 1"),
        ({"unit": "epochs"}, "budget_unit"),
        ({"budget": -1}, "0 or less"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(tmp_path, **changes)


def test_a_budget_must_hold_the_decay(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="decay_steps"):
        models_of(small(tmp_path, budget=9))


def test_the_overview_draws_every_model_and_sums(study: Study, models: list[Model]) -> None:
    text = "\n".join(render(models, build_tree(models), Accountant(study)))
    assert all(model.name in text for model in models)
    assert "1,418,000" in text and "926,000" in text


def test_the_tool_predicts_gpu_hours() -> None:
    done = run_tool("tools/run_study.py", "plan", STUDY, "--gpus", "192")
    assert done.code == 0, done.err
    assert "38 models" in done.out and "GPU-hours" in done.out
    refusal(run_tool("tools/run_study.py", "plan", "nowhere.yaml"), "nowhere.yaml: there is no such file")


def test_jobs_share_no_core() -> None:
    """Nor is one left over; with more jobs than cores every job has one."""
    for jobs in range(1, 9):
        parts = [cores_of(slot, jobs, {2, 3, 5, 7, 11}) for slot in range(jobs)]
        assert set().union(*parts) == {2, 3, 5, 7, 11} and min(map(len, parts)) >= 1
        assert sum(map(len, parts)) == max(5, jobs)
