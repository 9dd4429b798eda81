"""One process at a time uses an output folder, and a process that ends, however it ends, lets go of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.train.folder_lock import FolderLock
from tests.unit.processes import ROOT, refusal, run_tool

HOLDER = """
import os, sys, time
from pathlib import Path
from megatron_ext.train.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
child = os.fork()  # as megatron forks its writers
if child == 0:
    time.sleep(600)
print(child, flush=True)
sys.stdin.readline()
lock.release()
os.kill(child, 9)
"""


def held(folder: Path) -> tuple[subprocess.Popen, int]:
    """A process that holds the folder until it gets a line, and a child that it forked then."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    pipe = subprocess.PIPE
    holder = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=pipe, stdout=pipe, text=True)
    return holder, int(holder.stdout.readline())


def test_a_killed_holder_lets_go_though_its_child_lives(tmp_path: Path) -> None:
    folder = tmp_path / "new/run"
    holder, child = held(folder)
    with pytest.raises(UserError, match=f"{folder} is in use by process {holder.pid} on "):
        FolderLock(folder)
    (folder / "mlflow_spool.jsonl").write_text("")
    refusal(run_tool("tools/replay_metrics.py", folder), "is in use by process", holder.pid)
    holder.kill()
    holder.wait(60)
    lock = FolderLock(folder)
    os.kill(child, signal.SIGKILL)
    lock.release()
    assert [path.name for path in folder.iterdir()] == ["mlflow_spool.jsonl"]


def test_one_who_waits_gets_it_in_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder, _ = held(folder)
    holder.stdin.write("\n")
    holder.stdin.flush()
    lock = FolderLock(folder, seconds=60)
    assert holder.wait(60) == 0
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        raise_in_another_process(folder)
    lock.release()
    assert not folder.exists()


def raise_in_another_process(folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from megatron_ext.train.folder_lock import FolderLock; FolderLock(Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, str(folder)], env=environment, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise UserError(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("folder", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        FolderLock(tmp_path / folder)
