"""Hands a study's tree to Slurm: a job for each segment that waits for its parent's, and one that exports what is evaluated."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from megatron_ext.errors import UserError, say
from megatron_ext.study.segment_run import SegmentRun, write_whole

ROOT = Path(__file__).parents[2]
KIT = ROOT / "examples/slurm/pretrain.sbatch"
JOBS_FILE = "slurm_jobs.json"
SECONDS = 60


def submit(runs: list[SegmentRun], options: list[str], study: str, output_dir: Path) -> dict[str, str]:
    """Submit what is neither trained nor submitted yet, parents first.

    Args:
        runs: every segment, parents before children.
        options: of `sbatch`, such as `--nodes=4`, for every job.
        study: the study's file.
        output_dir: its folder, which also keeps the numbers of the jobs.

    Returns:
        Name of the segment -> number of its job. A segment whose parent fails is never started, and its job is cancelled.

    Raises:
        UserError: Slurm is not there, or refuses a job; what was submitted before it is noted.
    """
    note = output_dir / JOBS_FILE
    known = json.loads(note.read_text()) if note.exists() else {}
    queued = _queued() if known else set()
    jobs = {name: number for name, number in known.items() if number in queued}
    for run in runs:
        if run.is_done or run.name in jobs:
            continue
        run.write_config()
        parent = jobs.get(run.parent_name or "")
        waits = [f"--dependency=afterok:{parent}", "--kill-on-invalid-dep=yes"] if parent else []
        name = [f"--job-name={run.name}", f"--output={run.folder}/%x-%j.log", f"--chdir={ROOT}"]
        # `resume` is on the command line as well: the kit would put `auto` there.
        command = [str(KIT), "--config", str(run.config_file), "--resume", run.config.resume]
        jobs[run.name] = _slurm("sbatch", "--parsable", *name, *waits, *options, *command).split(";")[0]
        write_whole(note, json.dumps(jobs))
        say(f"job {jobs[run.name]}: {run.name}" + (f" after {parent}" if parent else ""))
    after = [f"--dependency=afterany:{':'.join(jobs.values())}"] if jobs else []
    export = shlex.join(
        [sys.executable, "tools/run_study.py", "export", str(Path(study).resolve()), "--output-dir", str(output_dir)]
    )
    number = _slurm("sbatch", "--parsable", *options, "--job-name=export", f"--chdir={ROOT}", *after, f"--wrap={export}")
    say(f"job {number.split(';')[0]}: export")
    return jobs


def _queued() -> set[str]:
    """Numbers of this user's jobs that wait or run."""
    return set(_slurm("squeue", "--me", "--noheader", "--format=%A").split())


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        raise UserError(f"--slurm: there is no {command[0]} here; run it on a node that submits jobs, or without --slurm") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"--slurm: {command[0]} has not answered within {SECONDS} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise UserError(f"--slurm: {command[0]} ended with code {done.returncode} and said: {said[0]}")
    return done.stdout.strip()
