"""The tools' command lines: a mistake is one line with exit code 2, and --help loads nothing heavy."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))
HEAVY = ("torch", "megatron", "transformers", "matplotlib", "numpy")


def run(*command: str, folder: Path) -> subprocess.CompletedProcess:
    """Run Python in a folder of the test's own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=folder, timeout=60)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_answers_at_once(tool: str, tmp_path: Path) -> None:
    look = f"import sys, atexit; atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr))"
    start = f"import runpy; sys.argv = ['tool', '--help']; runpy.run_path({str(ROOT / 'tools' / tool)!r}, run_name='__main__')"
    done = run("-c", f"{look}\n{start}", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("tool", TOOLS)
def test_an_unknown_option_is_one_line(tool: str, tmp_path: Path) -> None:
    done = run(str(ROOT / "tools" / tool), "--no-such-option", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*\n", done.stderr)


@pytest.mark.parametrize(
    "command, message",
    [
        ("convert_checkpoint.py", "command"),
        ("convert_checkpoint.py export", "checkpoint, out_dir"),
        ("convert_checkpoint.py export a b --dtype int", "'int'"),
        ("fetch_demo_data.py --corpus nothing", "'nothing'"),
        ("fetch_demo_data.py --output-dir file/below", "file/below"),
        ("plot_run.py run picture.foo", "picture.foo"),
        ("plot_run.py run picture", ".png"),
        ("plot_run.py run file/picture.png", "file/picture.png cannot be written"),
        ("plot_run.py new picture.png", "no training loss"),
        ("replay_metrics.py", "OUTPUT_DIR"),
    ],
)
def test_mistakes_are_one_line(command: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, count in (("run", 2), ("new", 0)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "phase": "0-clm", "loss": 2.0}) + "\n" for step in range(count)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    tool, *arguments = command.split()
    done = run(str(ROOT / "tools" / tool), *arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*\n", done.stderr)
    assert message in done.stderr
