"""The Slurm script of docs/reliability.md, with stand-ins for srun and scontrol: when it puts the job in the queue again."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
(RECIPE,) = re.findall(r"```sh\n(#SBATCH.*?)```", (ROOT / "docs/reliability.md").read_text(), flags=re.DOTALL)
SRUN = """#!/bin/sh
trap 'sleep 0.3; exit {signalled}' USR1
touch {folder}/started
for turn in $(seq {turns}); do sleep 0.05; done
exit {code}
"""


@pytest.mark.parametrize(
    "is_signalled, code, expected, is_requeued",
    [(True, 1, 1, True), (True, 0, 0, False), (False, 1, 1, False), (False, 0, 0, False)],
    ids=["signalled", "signalled when it was done", "failed", "done"],
)
def test_only_a_job_that_was_signalled_is_put_in_the_queue_again(
    is_signalled: bool, code: int, expected: int, is_requeued: bool, tmp_path: Path
) -> None:
    (tmp_path / "srun").write_text(SRUN.format(folder=tmp_path, signalled=code, code=code, turns=400 if is_signalled else 2))
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    with subprocess.Popen(["bash", "-c", RECIPE], env=environment) as script:
        if is_signalled:
            end = time.monotonic() + 20
            while not (tmp_path / "started").exists() and time.monotonic() < end:
                time.sleep(0.01)
            script.send_signal(signal.SIGUSR1)
        assert script.wait(20) == expected
    requeued = tmp_path / "requeued"
    assert requeued.exists() == is_requeued
    assert not is_requeued or requeued.read_text() == "requeue 17\n"


def test_its_options_are_torchrun_s() -> None:
    from torch.distributed.run import get_args_parser

    options = re.findall(r" (--[a-z-]+)", RECIPE.split("torchrun", 1)[1].split("pretrain_encoder.py")[0])
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert options and set(options) <= known
