"""The report of a study: its numbers against the runs, its figures where there is something to show, its page in a real browser."""

import base64
import csv
import dataclasses
import html
import io
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot

from megatron_ext.evaluation.selection import Score, family_scores, select
from megatron_ext.study.facts import Facts, facts_of
from megatron_ext.study.figures import Evidence, draw_all
from megatron_ext.study.report import make_report
from megatron_ext.study.report_page import Report
from megatron_ext.study.study_file import read_study

STUDY = Path(__file__).parents[2] / "examples/mlm_vs_clm/study.yaml"
TASKS = {"sst2": "sc", "mnli": "sc", "conll2003": "tc", "squad": "qa", "msmarco": "ir"}
PNG = b"\x89PNG\r\n\x1a\n"
KNOWN = {"size": "tiny", "family": "f", "ratio": None, "added_steps": 0, "flops": 1.0, "is_finished": True}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def facts() -> list[Facts]:
    """Of the paper's grid, with two evaluations on the way."""
    return facts_of(dataclasses.replace(read_study(str(STUDY)), evaluation_steps=[1000, 5000]))


@pytest.fixture(scope="module")
def rows(facts: list[Facts]) -> list[dict[str, Any]]:
    """Made-up scores of every model: what is tested is what becomes of them."""
    generator = np.random.default_rng(0)
    return [
        {
            "key": f"{number:04d}{task}{rate:g}{seed}",
            "model": known.name,
            "family": family,
            "task": task,
            "learning_rate": rate,
            "seed": seed,
            "validation": float(generator.random()),
            "test": float(generator.random()),
            "train_loss": 0.5,
            "steps": 10,
            "seconds": 3.0,
        }
        for number, known in enumerate(facts)
        for task, family in TASKS.items()
        for rate in (1e-5, 1e-4)
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def report(rows: list[dict[str, Any]], facts: list[Facts]) -> Report:
    return make_report("A study <of> tests", rows, facts, None)


def test_facts_are_the_papers(facts: list[Facts]) -> None:
    by_name = {known.name: known for known in facts}
    assert sum(known.is_finished for known in facts) == 38
    biphasic = by_name["610m-clm25%+mlm0.4-42000"]
    assert (biphasic.plan, biphasic.ratio, biphasic.causal_share, biphasic.objective) == ("clm > mlm0.4", 0.4, 0.25, "both")
    continued = [known for known in facts if known.added_steps]
    assert {known.added_steps for known in continued} == {2000, 12000, 22000}
    assert {known.plan for known in continued} == {"clm + mlm0.4", "mlm0.4 + mlm0.4"}
    early = [known for known in facts if not known.is_finished and known.size == "610m"]
    assert {known.steps for known in early} == {1000, 5000} and {"clm", "mlm0.4"} <= {known.plan for known in early}


def test_every_figure_of_the_paper_is_there(report: Report) -> None:
    names = {picture.name for picture in report.pictures}
    assert names == {"objectives", "mask_ratio", "data_efficiency", "learning_rate", "split", "continued", "cost"}
    assert all(picture.png.startswith(PNG) for picture in report.pictures)


def test_figures_without_evidence_are_left_out(rows: list[dict[str, Any]]) -> None:
    few = [row for row in rows if row["learning_rate"] == 1e-5 and row["model"] in {rows[0]["model"], rows[-1]["model"]}]
    assert {picture.name for picture in make_report("few", few, [], None).pictures} == {"objectives"}


def test_tables_say_what_was_selected(report: Report, rows: list[dict[str, Any]]) -> None:
    tables = {table.name: list(csv.DictReader(io.StringIO(table.as_csv()))) for table in report.tables}
    scores = family_scores(select(rows))
    assert len(tables["models"]) == len({row["model"] for row in rows})
    for line in tables["models"]:
        score = scores[line["model"], "sc"]
        assert line["SC, accuracy, %"] == f"{100 * score.mean:.2f} ± {100 * score.half_width:.2f}"
    assert [line["key"] for line in tables["runs"]] == [row["key"] for row in rows]


def test_every_number_leads_to_its_runs(report: Report, rows: list[dict[str, Any]]) -> None:
    by_key = {row["key"]: row for row in rows}
    tasks = next(table for table in report.tables if table.name == "tasks")
    for line in csv.DictReader(io.StringIO(tasks.as_csv())):
        tests = [by_key[key]["test"] for key in line["runs"].split()]
        assert float(line["test, %"].split(" ± ")[0]) == pytest.approx(100 * np.mean(tests), abs=0.006)


def test_the_page_needs_nothing_else(report: Report, tmp_path: Path) -> None:
    page = report.write(tmp_path).read_text()
    assert "A study &lt;of&gt; tests" in page and "<script" not in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    for picture in report.pictures:
        assert base64.b64encode(picture.png).decode() in page
        assert (tmp_path / f"{picture.name}.png").read_bytes() == picture.png
    assert {path.suffix for path in tmp_path.iterdir()} == {".html", ".md", ".csv", ".png"}


MEASURE = """<script>
const broken = [...document.images].filter(image => !image.complete || !image.naturalWidth).length;
const wide = [...document.querySelectorAll('body > *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length;
document.body.innerHTML = `<p>seen: ${innerWidth} ${document.documentElement.scrollWidth} ${broken} ${wide}</p>`;
</script>"""


def browser() -> str:
    """A headless browser, or the test is skipped."""
    found = os.environ.get("CHROME") or next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if not found:
        pytest.skip(f"there is no {' or '.join(BROWSERS)}")
    return found


@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_shows_it_on_a_phone_and_on_a_desk(report: Report, tmp_path: Path, width: int) -> None:
    """Nothing but tables, which scroll by themselves, is wider than the window, and every picture is drawn."""
    page = report.write(tmp_path)
    page.write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'browser'}"]
    command = [browser(), *options, f"--window-size={width},900", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    seen = re.search(r"seen: (\d+) (\d+) (\d+) (\d+)", html.unescape(done.stdout))
    assert seen, done.stderr[-500:]
    inner, scrolled, broken, wide = map(int, seen.groups())
    assert inner == width and scrolled <= inner and (broken, wide) == (0, 0)


def _lines_of(facts: list[Facts]) -> dict[str, dict[str, list[float]]]:
    """Figure -> line -> places, of scores that do not matter."""
    families = {(known.name, "sc"): Score.of({0: 0.5, 1: 0.6}, ["a", "b"]) for known in facts}
    found = {}
    for named in draw_all(Evidence({known.name: known for known in facts}, families, [])):
        containers = named.figure.axes[0].containers
        found[named.name] = {bar.get_label(): list(bar.lines[0].get_xdata()) for bar in containers}
        pyplot.close(named.figure)
    return found


def test_a_checkpoint_is_on_the_line_of_the_models_that_it_leads_to() -> None:
    clm, half, early = (
        Facts(**KNOWN | {"name": name, "plan": plan, "causal_share": share, "steps": steps, "ratio": 0.4})
        for name, plan, share, steps in (
            ("clm", "clm", 1.0, 100),
            ("half", "clm > mlm0.4", 0.5, 100),
            ("early", "clm > mlm0.4", 0.25, 200),
        )
    )
    trunk = Facts(
        **KNOWN
        | {"name": "trunk", "plan": "clm", "causal_share": 1.0, "steps": 20, "is_finished": False, "leads_to": ("clm", "half")}
    )
    after = {
        "name": "after",
        "plan": "clm > mlm0.4",
        "causal_share": 0.5,
        "steps": 90,
        "is_finished": False,
        "leads_to": ("early",),
    }
    lines = _lines_of([clm, half, early, trunk, Facts(**KNOWN | after)])["data_efficiency"]
    assert lines == {
        "tiny clm": [20, 100],
        "tiny clm > mlm0.4, 50% CLM, 100 steps": [20, 100],
        "tiny clm > mlm0.4, 25% CLM, 200 steps": [90, 200],
    }


def test_the_order_of_the_objectives_is_no_split() -> None:
    """MLM before CLM is not on the line of CLM before MLM, MNTP not on MLM's; what goes on with CLM is not on the line of MLM."""
    plans = {"clm": 1.0, "mlm0.4": 0.0, "clm > mlm0.4": 0.5, "mlm0.4 > clm": 0.4, "mntp0.4": 0.0, "mlm0.2": 0.0, "mlm0.1": 0.0}
    ratios = {plan: float(found[0]) for plan in plans if (found := re.findall(r"0\.\d", plan))}
    facts = [
        Facts(**KNOWN | {"name": plan, "plan": plan, "causal_share": share, "steps": 100, "ratio": ratios.get(plan)})
        for plan, share in plans.items()
    ]
    more = [
        Facts(**KNOWN | {"name": name, "plan": name, "causal_share": 1.0, "steps": 110, "added_steps": 10})
        for name in ("clm + mlm0.4", "clm + clm")
    ]
    lines = _lines_of(facts + more)
    assert lines["split"] == {"tiny, 100 steps, MLM 0.4": [0.0, 0.5, 1.0]}
    assert lines["mask_ratio"] == {"tiny, 100 steps": [0.1, 0.2, 0.4]}
    assert lines["continued"] == {f"tiny clm of 100 steps, then {name}": [0, 10] for name in ("clm", "mlm0.4")}
