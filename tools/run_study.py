"""Train a grid of models as a tree: every stretch that several of them begin with is trained once.

python tools/run_study.py plan examples/mlm_vs_clm/study.yaml
python tools/run_study.py plan examples/mlm_vs_clm/study.yaml --gpus 192 --gpu h100

GPU-hours are the planner's predictions, not measurements. `plan` is what there is so far: nothing is trained here yet.
"""

import argparse
import sys

from megatron_ext.errors import CommandLine, UserError, run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandLine)
    plan = commands.add_parser("plan", help="the tree of segments, and what it takes, shared and model by model")
    plan.add_argument("study", help="YAML file")
    plan.add_argument("--gpus", type=int, metavar="N", help="predict GPU-hours on so many (default: none are predicted)")
    plan.add_argument("--gpu", default="h100", metavar="G", help="a100, h100 (default), h200 or b200")
    return parser


def main() -> int:
    """Do what the command line says."""
    arguments = build_parser().parse_args()
    if arguments.gpus is not None and arguments.gpus < 1:
        raise UserError(f"--gpus is {arguments.gpus}: it must be at least 1")
    from megatron_ext.plan.hardware import find_gpu
    from megatron_ext.study.accounting import Accountant, planner_seconds
    from megatron_ext.study.models import models_of
    from megatron_ext.study.overview import render
    from megatron_ext.study.segments import build_tree
    from megatron_ext.study.study_file import read_study

    study = read_study(arguments.study)
    models = models_of(study)
    accountant = Accountant(study)
    if arguments.gpus:
        accountant = Accountant(study, arguments.gpus, planner_seconds(study, arguments.gpus, find_gpu(arguments.gpu)))
    print("\n".join(render(models, build_tree(models), accountant)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
