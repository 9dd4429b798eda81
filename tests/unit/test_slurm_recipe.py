"""examples/slurm/pretrain.sbatch, the file itself, with stand-ins for what Slurm and the containers bring."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/slurm/pretrain.sbatch"
SCONTROL = """#!/bin/sh
case "$*" in
"show hostnames node[1-2]") printf 'node1\\nnode2\\n' ;;
requeue*) echo "$@" > {folder}/requeued ;;
*) exit 1 ;;
esac
"""
WAITING_SRUN = """#!/bin/sh
trap 'sleep 0.3; exit {signalled}' USR1
touch {folder}/started
for turn in $(seq {turns}); do sleep 0.05; done
exit {code}
"""
SRUN = """#!{python}
import json, os, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")][: {options}]
json.dump(options, open("{folder}/srun.json", "w"))
command = sys.argv[1 + len(options) :]
for node in range(2):
    environment = {{**os.environ, "SLURM_NODEID": str(node), "SLURM_GPUS_ON_NODE": "8"}}
    subprocess.run(command, env=environment, check=True)
"""
RECORDER = """#!{python}
import json, os, sys
with open("{folder}/{name}.jsonl", "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
if "{name}" == "apptainer":
    command = sys.argv[1:]
    os.execvp("bash", command[command.index("bash") :])
"""
NAMES = ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_DEBUG", "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def environment(folder: Path, **stand_ins: str) -> dict[str, str]:
    """A job's environment, in which these programs come first; `venv/bin` holds a recorder in the place of torchrun."""
    (folder / "venv/bin").mkdir(parents=True)
    recorder = RECORDER.format(python=sys.executable, folder=folder, name="torchrun")
    places = {"scontrol": SCONTROL.format(folder=folder), "venv/bin/torchrun": recorder, **stand_ins}
    for name, text in places.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "64"}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    return {**kept, **job, "PATH": path, "VENV": str(folder / "venv")}


@pytest.mark.parametrize(
    "is_signalled, code, expected, is_requeued",
    [(True, 1, 1, True), (True, 0, 0, False), (False, 1, 1, False), (False, 0, 0, False)],
    ids=["signalled", "signalled when it was done", "failed", "done"],
)
def test_only_a_job_that_was_signalled_is_put_in_the_queue_again(
    is_signalled: bool, code: int, expected: int, is_requeued: bool, tmp_path: Path
) -> None:
    srun = WAITING_SRUN.format(folder=tmp_path, signalled=code, code=code, turns=400 if is_signalled else 2)
    command = ["bash", str(SCRIPT), "--config", "plan.yaml"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path, srun=srun)) as script:
        if is_signalled:
            end = time.monotonic() + 60
            while not (tmp_path / "started").exists() and time.monotonic() < end:
                time.sleep(0.01)
            script.send_signal(signal.SIGUSR1)
        assert script.wait(60) == expected
    requeued = tmp_path / "requeued"
    assert requeued.exists() == is_requeued
    assert not is_requeued or requeued.read_text() == "requeue 17\n"


def run(folder: Path, *arguments: str, options: int = 5, **variables: str) -> tuple[list[str], list[tuple[list[str], dict]]]:
    """Run the script; what srun got, and what torchrun got on each node."""
    recorder = RECORDER.format(python=sys.executable, folder=folder, name="apptainer")
    srun = SRUN.format(python=sys.executable, folder=folder, options=options)
    job = {**environment(folder, srun=srun, apptainer=recorder), **variables}
    if "CONTAINER_IMAGE" in variables:  # torchrun is the container's
        job["PATH"] = f"{folder / 'venv/bin'}{os.pathsep}{job['PATH']}"
    subprocess.run(["bash", str(SCRIPT), *arguments], cwd=ROOT, env=job, check=True, timeout=120)
    calls = [json.loads(line) for line in (folder / "torchrun.jsonl").read_text().splitlines()]
    assert len(calls) == 2
    return json.loads((folder / "srun.json").read_text()), calls


def parsed(arguments: list[str]) -> Any:
    """As torchrun itself reads them."""
    from torch.distributed.run import get_args_parser

    return get_args_parser().parse_args(arguments)


def test_what_each_node_is_told(tmp_path: Path) -> None:
    options, calls = run(tmp_path, "--config", "my plan.yaml", "--parallel.tensor", "2", SLURM_RESTART_COUNT="3")
    assert options == ["--ntasks-per-node=1", "--cpus-per-task=64", "--cpu-bind=none", "--kill-on-bad-exit=1", "--label"]
    for node, (arguments, variables) in enumerate(calls):
        told = parsed(arguments)
        assert (told.nnodes, told.nproc_per_node, told.max_restarts) == ("2", "8", 3)
        assert (told.rdzv_backend, told.rdzv_endpoint, told.rdzv_id) == ("c10d", "node1:20017", "17-3")
        assert told.rdzv_conf.startswith(f"is_host={int(node == 0)},join_timeout=")
        assert "SIGUSR1" in told.signals_to_handle and told.shutdown_timeout == 600
        assert told.training_script == "pretrain_encoder.py"
        assert told.training_script_args == ["--config", "my plan.yaml", "--parallel.tensor", "2", "--resume", "auto"]
        assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        assert [variables.get(name) for name in NAMES] == ["1", "WARN", None, None, None]


def test_what_can_be_told_otherwise(tmp_path: Path) -> None:
    others = {"RANKS_PER_NODE": "2", "MAX_RESTARTS": "0", "NETWORK_INTERFACE": "ib0", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4"}
    _, calls = run(tmp_path, "--resume", "a/checkpoint", **others)
    arguments, variables = calls[1]
    told = parsed(arguments)
    assert (told.nproc_per_node, told.max_restarts) == ("2", 0)
    assert told.training_script_args == ["--resume", "a/checkpoint"]
    assert [variables.get(name) for name in NAMES] == ["1", "INFO", "4", "ib0", "ib0"]


def test_containers(tmp_path: Path) -> None:
    pyxis, apptainer = tmp_path / "pyxis", tmp_path / "apptainer"
    pyxis.mkdir()
    apptainer.mkdir()
    image = {"CONTAINER_IMAGE": "registry.example#team/image:1", "CONTAINER_MOUNTS": "/data:/data"}
    options, _ = run(pyxis, "--config", "plan.yaml", options=8, **image)
    assert options[5:] == [
        "--container-image=registry.example#team/image:1",
        f"--container-workdir={ROOT}",
        f"--container-mounts={ROOT}:{ROOT},/data:/data",
    ]
    run(apptainer, "--config", "plan.yaml", CONTAINER_IMAGE="image.sif", CONTAINER_MOUNTS="/data:/data")
    arguments, _ = json.loads((apptainer / "apptainer.jsonl").read_text().splitlines()[0])
    assert arguments[: arguments.index("bash")] == [
        "exec",
        "--nv",
        "--bind",
        f"{ROOT},/data:/data",
        "--pwd",
        str(ROOT),
        "image.sif",
    ]


@pytest.mark.parametrize("is_elsewhere", [True, False])
def test_a_job_that_cannot_start_says_why(is_elsewhere: bool, tmp_path: Path) -> None:
    folder = tmp_path if is_elsewhere else ROOT
    job = {**environment(tmp_path), "VENV": "/nowhere"}
    done = subprocess.run(["bash", str(SCRIPT)], cwd=folder, env=job, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert ("pretrain_encoder.py" if is_elsewhere else "/nowhere/bin/torchrun") in line


def test_its_options_are_known_and_its_text_is_what_the_documents_quote() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    text = SCRIPT.read_text()
    directives = re.findall(r"^#SBATCH (.*)$", text, flags=re.MULTILINE)
    assert "--requeue --open-mode=append --signal=B:USR1@900" in directives
    (quoted,) = re.findall(r"```sh\n(#SBATCH.*?)```", (ROOT / "docs/reliability.md").read_text(), flags=re.DOTALL)
    assert quoted.splitlines() and [line for line in quoted.splitlines() if line not in text.splitlines()] == []
    variables = set(re.findall(r"^([A-Z_]+)=\$\{\1:-", text, flags=re.MULTILINE))
    page = (ROOT / "examples/slurm/README.md").read_text()
    assert len(variables) == 5 and [name for name in variables if f"`{name}`" not in page] == []
