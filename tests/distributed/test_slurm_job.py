"""examples/slurm/pretrain.sbatch trains on two pretended nodes of this machine, is signalled, and goes on as the next job."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import Corpus
from tests.distributed.faults import LAUNCHER_NAMES, published, small_tree
from tests.distributed.ranks import Rank

ROOT = Path(__file__).resolve().parents[2]
SCONTROL = """#!/bin/sh
case "$1" in
show) printf 'localhost\\nlocalhost\\n' ;;
requeue) echo "$@" > {folder}/requeued ;;
esac
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
    nodes+=($!)
done
trap 'kill -USR1 "${nodes[@]}"' USR1
for node in "${nodes[@]}"; do
    while wait $node; code=$?; [ $code -gt 128 ] && kill -0 $node 2>/dev/null; do :; done
    [ $code -ne 0 ] && worst=$code
done
exit ${worst:-0}
"""


@pytest.mark.slow
def test_a_job_that_is_signalled_goes_on_as_the_next(corpus: Corpus, tmp_path: Path) -> None:
    for name, text in {"scontrol": SCONTROL.replace("{folder}", str(tmp_path)), "srun": SRUN}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    tree = small_tree(corpus, tmp_path / "run", steps=100_000, interval=0)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(tree))
    first = job(tmp_path, "first")
    try:
        first.wait_until(lambda: "step 2/" in first.text, "step 2")
        first.process.send_signal(signal.SIGUSR1)
        assert first.wait() == 1, first.text[-3000:]
    finally:
        first.process.kill()
    assert "which was saved: --resume auto continues it" in first.text
    assert (tmp_path / "requeued").read_text().startswith("requeue ")
    (saved,) = published(tmp_path / "run")
    end = int(saved.name[5:]) + 5
    second = job(tmp_path, "second", "--training.stop_at_step", str(end))
    try:
        assert second.wait() == 0, second.text[-3000:]
    finally:
        second.process.kill()
    assert [path.name for path in published(tmp_path / "run")][-1] == f"step_{end:08d}"
    assert f"step {end - 5}/" not in second.text  # it went on, and did not begin anew


def job(folder: Path, name: str, *arguments: str) -> Rank:
    """Start the script as Slurm would; the number of the job makes its port."""
    slurm = {"SLURM_JOB_ID": str(os.getpid() % 10000), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHER_NAMES}
    own = {"VENV": sys.prefix, "RANKS_PER_NODE": "1", "OMP_NUM_THREADS": "1", "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    log = folder / f"{name}.log"
    command = ["bash", "examples/slurm/pretrain.sbatch", "--config", str(folder / "plan.yaml"), *arguments]
    with open(log, "w") as file:
        return Rank(subprocess.Popen(command, cwd=ROOT, env={**kept, **slurm, **own}, stdout=file, stderr=file), log)
