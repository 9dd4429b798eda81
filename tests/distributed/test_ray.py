"""A grid on a real Ray of this machine, where it is installed (`pip install ray`): the rows are those of the local pool."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas
import pytest

from tests.distributed.test_grid import command, table, write_grid

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A head node with two cores on a port of its own; the environment of those who use it."""
    pytest.importorskip("ray")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    start = [*ray, "start", "--head", "--port=0", "--num-cpus=2", "--num-gpus=0", "--include-dashboard=false"]
    subprocess.run(start, check=True, env=environment, timeout=120, capture_output=True)
    try:
        yield environment
    finally:
        subprocess.run([*ray, "stop", "--force"], env=environment, timeout=120, capture_output=True)


def on_the_cluster(grid: Path, output_dir: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    local = command(grid, output_dir, "--mlflow-uri", "none")
    place = local.index("--workers")
    arguments = [*local[:place], *local[place + 2 :], "--cluster", "auto"]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)


def test_a_cluster_makes_the_same_table(small_encoder: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    """Also when a run fails, as one of a model whose weights are no weights does, and when it is called again."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in small_encoder.iterdir():
        (broken / file.name).write_bytes(b"no weights" if file.suffix == ".safetensors" else file.read_bytes())
    grid = write_grid(tmp_path, {"one": small_encoder, "broken": broken})
    done = on_the_cluster(grid, tmp_path / "ray", cluster)
    assert done.returncode == 1 and done.stderr.count("broken, rotten_tomatoes") == 4, done.stderr
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "ray/runs").iterdir()}
    assert len(written) == 4
    assert on_the_cluster(grid, tmp_path / "ray", cluster).returncode == 1
    assert {path: path.stat().st_mtime_ns for path in written} == written
    subprocess.run(command(grid, tmp_path / "local", "--mlflow-uri", "none"), capture_output=True, timeout=300)
    timeless = [name for name in table(tmp_path / "local").columns if name != "seconds"]
    pandas.testing.assert_frame_equal(table(tmp_path / "ray")[timeless], table(tmp_path / "local")[timeless])
