"""Starts real training runs, watches their files, kills their processes, and gives them a disk that is too small."""

import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml
from blake3 import blake3

from megatron_ext.checkpoint_files import find_damage
from megatron_ext.hf.checkpoint_reader import CheckpointReader
from tests.conftest import Corpus
from tests.distributed.test_training import config_tree

ROOT = Path(__file__).resolve().parents[2]
MARK = "MEGATRON_EXT_TEST_RUN"
SECONDS = 300.0
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def small_tree(corpus: Corpus, output_dir: Path, steps: int, interval: int, **changes: Any) -> dict[str, Any]:
    """A run whose steps take milliseconds; how the model looks does not matter to a fault."""
    tree = config_tree(corpus, output_dir, {})
    tree["data"] |= {"sequence_length": 32}
    tree["validation"] = {"interval": 0, "samples": 4}
    tree["model"] = {"preset": "nano", "num_layers": 1}
    tree["phases"] = [{"objective": "mlm", "steps": steps}]
    tree["training"] |= {"global_batch_size": 4}
    return tree | {"checkpoint": {"interval": interval}, **changes}


class Job:
    """A run of the real entry point in processes of its own, all of which can be found again whoever their parent is."""

    def __init__(
        self,
        tree: dict[str, Any],
        folder: Path,
        *launcher: str,
        prefix: tuple[str, ...] = (),
        variables: dict[str, str] | None = None,
    ):
        """Start it.

        Args:
            tree: the run's configuration.
            folder: for its log and configuration.
            launcher: arguments of torchrun; without any it is one process.
            prefix: what the command is run by, and becomes.
            variables: more of its environment.
        """
        self.output_dir = Path(tree["output_dir"])
        self._mark = uuid.uuid4().hex
        config = folder / f"{self._mark}.yaml"
        config.write_text(yaml.safe_dump(tree))
        self._log = folder / f"{self._mark}.log"
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES}
        # One thread for each process: several run at a time.
        environment |= {MARK: self._mark, "LOCAL_WORLD_SIZE": str(os.cpu_count()), "OMP_NUM_THREADS": "1", **(variables or {})}
        command = [*prefix, sys.executable, *(("-m", "torch.distributed.run", *launcher) if launcher else ())]
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                [*command, str(ROOT / "pretrain_encoder.py"), "--config", str(config)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill_all()

    @property
    def text(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    def processes(self) -> list[psutil.Process]:
        """Its living processes."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        """The processes of the entry point under torchrun, which is their parent."""
        return [process for process in self.processes() if process.ppid() == self.process.pid and "RANK" in process.environ()]

    def worker(self, rank: int) -> psutil.Process:
        """The one of a rank."""
        return next(process for process in self.workers() if process.environ()["RANK"] == str(rank))

    def is_running(self) -> bool:
        """The process that was started here has not ended."""
        return self.process.poll() is None

    def kill_workers(self) -> None:
        """SIGKILL to torchrun and its workers at once; what they have forked is to end by itself."""
        for process in [*self.workers(), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(SECONDS)

    def kill_all(self) -> None:
        """SIGKILL to every process at once."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(SECONDS)

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(SECONDS)

    def wait_until(self, condition: Callable[[], Any], what: str) -> Any:
        """Look until the condition holds while the run is alive; returns what it returned."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            is_alive = self.is_running()
            if found := condition():
                return found
            assert is_alive, f"the run ended before {what}:\n{self.text[-3000:]}"
            time.sleep(0.002)
        raise AssertionError(f"{what} did not happen in {SECONDS:.0f} s:\n{self.text[-3000:]}")

    def left_behind(self) -> list[psutil.Process]:
        """Those of its processes that do not end by themselves in a while."""
        psutil.wait_procs(self.processes(), timeout=60)
        return self.processes()

    def wait_until_gone(self) -> None:
        """All its processes must end by themselves."""
        left = self.left_behind()
        assert left == [], [(process.pid, process.cmdline()) for process in left]

    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines of `metrics.jsonl`."""
        path = self.output_dir / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def last_step(self) -> int:
        """The last step that it has logged."""
        return max((line["step"] for line in self.metrics() if "loss" in line), default=0)


def error_of(run: Job) -> str:
    """The one line of an error, of a run that ended with exit code 2 and no traceback."""
    assert run.wait() == 2, run.text[-3000:]
    assert "Traceback" not in run.text, run.text[-3000:]
    (line,) = [line for line in run.text.splitlines() if line.startswith("error: ")]
    return line


def warnings_of(run: Job) -> list[str]:
    """Its lines of warning."""
    return [line for line in run.text.splitlines() if line.startswith("warning: ")]


def finished(run: Job) -> Job:
    """The run, which must end well and without a word of error."""
    assert run.wait() == 0, run.text[-3000:]
    assert "Traceback" not in run.text, run.text[-3000:]
    return run


def published(output_dir: Path) -> list[Path]:
    """Its checkpoints, oldest first."""
    return sorted((output_dir / "checkpoints").glob("step_*"))


def leftovers(output_dir: Path) -> list[str]:
    """What is in the checkpoint folder besides checkpoints."""
    return [path.name for path in (output_dir / "checkpoints").iterdir() if not path.name.startswith("step_")]


def shard_sums(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of the files with weights and moments, taken here and not from the run's own records."""
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(checkpoint.glob("*.distcp"))}
    assert sums
    return sums


def assert_whole(checkpoint: Path) -> None:
    """Every byte is as recorded, nothing is unrecorded, and every tensor can be read."""
    assert find_damage(checkpoint) == {}
    recorded = json.loads((checkpoint / "run.json").read_text())["files"]
    names = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert names - {"run.json"} == set(recorded)
    for name, record in recorded.items():
        content = (checkpoint / name).read_bytes()
        assert (len(content), blake3(content).hexdigest()) == (record["bytes"], record["blake3"]), name
    reader = CheckpointReader(checkpoint)
    assert reader.tensors
    for name in reader.tensors:
        assert reader.read(name).isfinite().all(), name


class SmallDisk:
    """A place where what is written can be made to fail for want of room, and to succeed again."""

    def __init__(self, folder: Path, is_file_system: bool):
        self.folder, self.is_file_system = folder, is_file_system

    def fill(self, run: Job, room: int) -> None:
        """Leave `room` bytes: with a file, or by a limit on the size of what the run writes."""
        if not self.is_file_system:
            resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            return
        free = os.statvfs(self.folder)
        with open(self.folder / "ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - room))

    def make_room(self, run: Job) -> None:
        """Undo it."""
        if self.is_file_system:
            (self.folder / "ballast").unlink()
        else:
            resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def how_to_fill() -> str:
    """What this machine lets us do: `tmpfs`, `tmpfs in a namespace`, or `limit of file sizes`."""
    if os.geteuid() == 0 and _works(["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]):
        return "tmpfs"
    if _works(["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]):
        return "tmpfs in a namespace"
    return "limit of file sizes"


def _works(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@contextlib.contextmanager
def small_disk(how: str, folder: Path, size: int) -> Iterator[SmallDisk]:
    """A disk of `size` bytes, mounted at the folder if the machine allows it."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if how == "tmpfs":
        subprocess.run(mount, check=True, timeout=20)
        try:
            yield SmallDisk(folder, True)
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)
    elif how == "tmpfs in a namespace":
        command = ["unshare", "-rm", "sh", "-c", '"$@" && echo mounted && exec sleep 3600', "sh", *mount]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:  # the mount is gone when it ends
            try:
                assert holder.stdout and holder.stdout.readline() == "mounted\n"
                yield SmallDisk(Path(f"/proc/{holder.pid}/root{folder}"), True)
            finally:
                holder.send_signal(signal.SIGKILL)
    else:
        yield SmallDisk(folder, False)
