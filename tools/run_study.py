"""Train a grid of models as a tree: every stretch that several of them begin with is trained once.

python tools/run_study.py plan examples/mlm_vs_clm/study.yaml
python tools/run_study.py plan examples/mlm_vs_clm/study.yaml --gpus 192 --gpu h100
python tools/run_study.py run STUDY.yaml --output-dir build/study --jobs 2
python tools/run_study.py status STUDY.yaml --output-dir build/study

The same `run` goes on after a stop or a failure; what is trained is never trained again. GPU-hours are the planner's predictions,
not measurements.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_ext.errors import CommandLine, UserError, run_command
from megatron_ext.locked_folder import only_one


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandLine)
    plan = commands.add_parser("plan", help="the tree of segments, and what it takes, shared and model by model")
    plan.add_argument("--gpus", type=int, metavar="N", help="predict GPU-hours on so many (default: none are predicted)")
    plan.add_argument("--gpu", metavar="G", help="of these: a100, h100 (default), h200 or b200")
    run = commands.add_parser("run", help="train what is not trained yet, and export the models")
    run.add_argument("--jobs", type=int, metavar="N", help="segments at once (default: 1); they share the cores, or the GPUs")
    run.add_argument("--ranks", type=int, metavar="N", help="processes of each segment (default: 1)")
    run.add_argument("--slurm", action="store_true", help="submit a job for each segment instead, which waits for its parent's")
    run.add_argument(
        "--sbatch-option", action="append", default=[], metavar="OPTION", help="of each of them, e.g. --sbatch-option=--nodes=4"
    )
    status = commands.add_parser("status", help="the tree, with what is trained")
    export = commands.add_parser("export", help="Hugging Face folders of the models that are trained (run does so as it goes)")
    for command in (plan, run, status, export):
        command.add_argument("study", help="YAML file")
    for command in (run, status, export):
        command.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="segments, checkpoints and models")
    return parser


def main() -> int:
    """Do what the command line says."""
    arguments = build_parser().parse_args()
    for name in ("gpus", "jobs", "ranks"):
        if getattr(arguments, name, None) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}: it must be at least 1")
    return COMMANDS[arguments.command](arguments)


def _plan(arguments: argparse.Namespace) -> int:
    from megatron_ext.plan.hardware import find_gpu
    from megatron_ext.study.accounting import Accountant, planner_seconds
    from megatron_ext.study.models import models_of
    from megatron_ext.study.overview import render
    from megatron_ext.study.segments import build_tree
    from megatron_ext.study.study_file import read_study

    if arguments.gpu and not arguments.gpus:
        raise UserError(f"--gpu {arguments.gpu} needs --gpus, the number of them")
    study = read_study(arguments.study)
    models = models_of(study)
    accountant = Accountant(study)
    if arguments.gpus:
        accountant = Accountant(study, arguments.gpus, planner_seconds(study, arguments.gpus, find_gpu(arguments.gpu or "h100")))
    print("\n".join(render(models, build_tree(models), accountant)))
    return 0


def _runs(arguments: argparse.Namespace) -> list[Any]:
    from megatron_ext.study.models import models_of
    from megatron_ext.study.segment_run import segment_runs
    from megatron_ext.study.segments import all_paths, build_tree
    from megatron_ext.study.study_file import read_study

    study = read_study(arguments.study)
    return segment_runs(study, all_paths(build_tree(models_of(study))), arguments.output_dir.resolve())


def _run(arguments: argparse.Namespace) -> int:
    from megatron_ext.study.exports import export
    from megatron_ext.study.local_run import LocalRun, report_failures
    from megatron_ext.study.slurm_run import submit

    if arguments.slurm and (arguments.jobs or arguments.ranks):
        raise UserError("--jobs and --ranks are of this machine: with --slurm say it with --sbatch-option")
    if arguments.sbatch_option and not arguments.slurm:
        raise UserError("--sbatch-option needs --slurm")
    output_dir, runs = arguments.output_dir.resolve(), _runs(arguments)
    with only_one(output_dir, "study"):
        if arguments.slurm:
            submit(runs, arguments.sbatch_option, arguments.study, output_dir)
            return 0
        local = LocalRun(runs, arguments.jobs or 1, arguments.ranks or 1, lambda run: export(run, output_dir))
        return report_failures(local.execute())


def _status(arguments: argparse.Namespace) -> int:
    from megatron_ext.study.status import render_status

    print("\n".join(render_status(_runs(arguments))))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from megatron_ext.study.exports import export
    from megatron_ext.study.local_run import report_failures

    failed = {}
    for run in _runs(arguments):
        try:
            if run.is_done:
                export(run, arguments.output_dir)
        except UserError as error:
            failed[run.name] = str(error)
    return report_failures(failed)


COMMANDS = {"plan": _plan, "run": _run, "status": _status, "export": _export}


if __name__ == "__main__":
    sys.exit(run_command(main))
