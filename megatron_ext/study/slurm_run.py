"""Hands a study's tree to Slurm: a job for each segment that waits for its parent's, and one that exports what is evaluated."""

import shlex
import subprocess
import sys
from pathlib import Path

from megatron_ext.errors import UserError, say
from megatron_ext.study.segment_run import SegmentRun

KIT = Path("examples/slurm/pretrain.sbatch")


def submit(runs: list[SegmentRun], options: list[str], export_command: list[str]) -> dict[str, str]:
    """Submit what is not trained yet, parents first.

    Args:
        runs: every segment, parents before children.
        options: of `sbatch`, such as `--nodes=4`.
        export_command: what exports the finished models; its job waits for all.

    Returns:
        Name of the segment -> number of its job. A segment whose parent fails is never started, and its job is cancelled.

    Raises:
        UserError: sbatch is not there, or refuses a job.
    """
    jobs: dict[str, str] = {}
    for run in runs:
        if run.is_done:
            continue
        run.write_config()
        parent = jobs.get(run.parent_name or "")
        waits = [f"--dependency=afterok:{parent}", "--kill-on-invalid-dep=yes"] if parent else []
        name = [f"--job-name={run.name}", f"--output={run.folder}/%x-%j.log"]
        # `resume` is on the command line as well: the kit would put `auto` there.
        command = [str(KIT), "--config", str(run.config_file), "--resume", run.config.resume]
        jobs[run.name] = _sbatch([*name, *waits, *options, *command])
        say(f"job {jobs[run.name]}: {run.name}" + (f" after {parent}" if parent else ""))
    after = [f"--dependency=afterany:{':'.join(jobs.values())}"] if jobs else []
    number = _sbatch(["--job-name=export", "--nodes=1", *after, f"--wrap={shlex.join(export_command)}"])
    say(f"job {number}: export")
    return jobs


def _sbatch(arguments: list[str]) -> str:
    try:
        done = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise UserError("--slurm: there is no sbatch here; run it on a node that submits jobs, or without --slurm") from None
    if done.returncode:
        raise UserError(f"--slurm: sbatch ended with code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.strip().split(";")[0]


def export_command(study: str, output_dir: Path) -> list[str]:
    """What the last job does."""
    return [sys.executable, "tools/run_study.py", "export", study, "--output-dir", str(output_dir)]
