"""Runs the tools as a user does, and says how they ended and how much memory they took."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 120
# Linux counts the memory of the process that starts another one in its peak: a small one must stand in between.
LAUNCHER = """
import os, resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
sys.stderr.write(f"\\n{code} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}")
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str
    peak_bytes: int
    """Largest resident memory."""


def run_tool(script: str, *arguments: object, folder: Path | None = None) -> Ended:
    """Run a script of the repository in a process of its own; one that hangs fails the test."""
    command = [sys.executable, "-S", "-c", LAUNCHER, sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=True)
    err, _, measured = done.stderr.decode("utf-8").rpartition("\n")
    code, kibibytes = map(int, measured.split())
    return Ended(code, done.stdout.decode("utf-8"), err, kibibytes * 1024)


def refusal(ended: Ended, *words: object) -> str:
    """The one line that a refused command printed; it must hold all words, and nothing that steers a terminal."""
    assert (ended.code, ended.out) == (2, ""), (ended.code, ended.out[-1000:], ended.err[-3000:])
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ") and line.isprintable() and len(line) < 2100, line
    assert [word for word in words if str(word) not in line] == [], line
    return line
