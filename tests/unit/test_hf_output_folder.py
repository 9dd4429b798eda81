"""The destination of a conversion: complete, or as it was; what the file system refuses is said in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.hf.output_folder import check_destination, published_when_complete
from tests.unit.hf_models import RECIPES, write_model


def publish(out_dir: Path) -> None:
    check_destination(out_dir)
    with published_when_complete(out_dir) as folder:
        (folder / "file").write_text("content")


@pytest.mark.parametrize("make_target", [True, False])
def test_a_link_is_followed(make_target: bool, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("elsewhere")
    if make_target:
        (tmp_path / "elsewhere").mkdir()
    publish(tmp_path / "link")
    assert (tmp_path / "elsewhere/file").read_text() == "content" and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link"]


def test_the_working_directory_if_it_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    publish(Path("."))
    assert (tmp_path / "here/file").read_text() == "content"


@pytest.mark.parametrize("name", ["a_file/below", "x" * 300, "/proc/below", "/proc", "/"])
def test_a_place_where_nothing_can_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("")
    with pytest.raises(UserError, match=r"cannot be (written|looked at)|is not an empty folder"):
        publish(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_a_mounted_file_system_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "volume")
    with pytest.raises(UserError, match="name a folder in it"):
        publish(tmp_path / "volume")


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(tmp_path: Path) -> None:
    """In containers process numbers repeat."""
    (tmp_path / f".out.{os.getpid()}.tmp").mkdir()
    publish(tmp_path / "out")
    assert (tmp_path / "out/file").read_text() == "content"


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from megatron_ext.errors import run_command
from megatron_ext.hf.import_model import import_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
run_command(lambda: import_model(Path(sys.argv[1]), Path(sys.argv[2])) and 0)
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "model", RECIPES["llama 3.x"])
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "model"), str(tmp_path / "checkpoint")]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "checkpoint cannot be written (OSError: [Errno 27] File too large" in lines[0] and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
