"""Lines survive a disk that is full, one that fills up in the middle of a line, and a process that died writing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.train.line_file import LineFile, read_metrics
from megatron_ext.train.tracking import JsonlTracker

ROOT = Path(__file__).parents[2]


def test_lines_are_in_the_file_at_once(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "new/lines")
    for word in ("one", "two"):
        file.append(word)
        assert file.path.read_text().endswith(f"{word}\n")
    file.close()
    assert file.path.read_text() == "one\ntwo\n"


def test_a_full_disk_costs_one_warning_and_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lines"
    path.symlink_to("/dev/full")
    file = LineFile(path)
    for number in range(5):
        file.append(str(number))
    assert file.waiting == 5
    path.unlink()  # space again
    file.append("5")
    file.close()
    assert path.read_text().split() == list("012345")
    assert capsys.readouterr().err.count("warning: ") == 1


def test_memory_is_bounded_and_what_is_lost_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lines"
    path.symlink_to("/dev/full")
    file = LineFile(path, lines_kept=3)
    for number in range(5):
        file.append(str(number))
    assert (file.waiting, file.dropped) == (3, 2)
    file.close()
    assert "lacks 5 lines" in capsys.readouterr().err


def test_a_disk_that_fills_up_within_a_line(tmp_path: Path) -> None:
    """The kernel takes a part of a line and then no more; the part is cut off, and the line comes whole when there is space."""
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from megatron_ext.train.line_file import LineFile\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (25, resource.RLIM_INFINITY))\n"
        "file = LineFile(Path(sys.argv[1]))\n"
        "for number in range(4): file.append(str(number) * 9)\n"
        "assert file.path.read_text().split() == ['0' * 9, '1' * 9], file.path.read_text()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "file.close()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "lines")]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("warning: ") == 1
    assert (tmp_path / "lines").read_text().split() == [str(number) * 9 for number in range(4)]


@pytest.mark.parametrize("torn", ["x" * 9, "x" * 10_000])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "lines"
    for before in ("", "one\n"):
        path.write_text(before + torn)
        file = LineFile(path)
        file.append("two")
        file.close()
        assert path.read_text() == before + "two\n"


def write_attempt(output_dir: Path, first_step: int, steps: range, loss: float) -> None:
    tracker = JsonlTracker(output_dir, first_step)
    for step in steps:
        tracker.log(step, {"loss": loss}, "0-clm")
        if step % 10 == 0:
            tracker.log(step, {"validation_mlm_loss": loss}, "0-clm")
    tracker.finish("KILLED")


def test_metrics_tell_one_story_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    write_attempt(tmp_path, 0, range(1, 18), 1.0)
    write_attempt(tmp_path, 10, range(12, 24, 2), 2.0)  # with another log interval
    write_attempt(tmp_path, 22, range(23, 25), 3.0)
    lines = read_metrics(tmp_path)
    found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert found == [
        *((step, 1.0) for step in range(1, 11)),
        *((step, 2.0) for step in range(12, 24, 2)),
        (23, 3.0),
        (24, 3.0),
    ]
    assert [line["step"] for line in lines if "validation_mlm_loss" in line] == [10, 20]
    assert all(set(line) <= {"step", "phase", "time", "loss", "validation_mlm_loss"} for line in lines)


def test_a_line_that_comes_late_takes_nothing_away(tmp_path: Path) -> None:
    """The time of a save in the background is written after later steps."""
    first = JsonlTracker(tmp_path, 0)
    for step in range(1, 9):
        first.log(step, {"loss": 1.0}, "0-clm")
    first.log(4, {"checkpoint/seconds": 0.5}, "0-clm")
    first.finish("KILLED")
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 4, 5, 6, 7, 8]
    write_attempt(tmp_path, 4, range(5, 7), 2.0)
    assert [(line["step"], line.get("loss")) for line in read_metrics(tmp_path)] == [
        *((step, 1.0) for step in range(1, 5)),
        (4, None),
        (5, 2.0),
        (6, 2.0),
    ]


def test_metrics_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read_metrics(tmp_path)
    line = json.dumps({"step": 1, "loss": float("nan")})
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"step": 2')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{{broken\n{line}\n")
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_metrics(tmp_path)
