"""Look a machine, a layout, a checkpoint or a data set over, and say what is wrong with it.

python tools/doctor.py
python tools/doctor.py --equivalence --layout tensor=2,pipeline=2
python tools/doctor.py --checkpoint RUN/checkpoints/step_00001000
python tools/doctor.py --data PREFIX --tokenizer TOKENIZER --sample 17 --objective mlm

Exit code 0: all good; 1: something is wrong; 2: the command line, or what it names, is.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.errors import CommandLine, UserError, run_command

if TYPE_CHECKING:
    from megatron_ext.doctor.report import Report


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    checks = parser.add_mutually_exclusive_group()
    checks.add_argument("--equivalence", action="store_true", help="compare a small model at a layout with one float32 rank")
    checks.add_argument("--checkpoint", type=Path, metavar="DIR", help="a step_* folder, or a run's folder: all its checkpoints")
    checks.add_argument(
        "--data", nargs="?", const="", metavar="PREFIX", help="a data set without its endings; no PREFIX: those of --config"
    )

    group = parser.add_argument_group("with --equivalence")
    group.add_argument("--layout", help="e.g. tensor=2,pipeline=2,virtual_pipeline=2,data=2,sequence=false")
    group.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the layout's ranks (default: fp32)")
    group.add_argument("--packing", choices=("packed", "unpacked"), default="packed", help="default: packed")
    group.add_argument("--steps", type=int, default=1, help="optimizer steps, each compared (default: 1)")

    group = parser.add_argument_group("with --data")
    group.add_argument("--tokenizer", type=Path, help="default: the one that the data set or --config names")
    group.add_argument("--config", type=Path, help="a run's YAML: its blend, seed and phases decide what --sample shows")
    group.add_argument("--sample", type=int, metavar="I", help="show the run's sample I as the model sees it")
    group.add_argument("--phase", type=int, metavar="K", help="under phase K of --config (default: the one that consumes it)")
    group.add_argument("--ratio", type=float, help="mask ratio (default: the phase's, or 0.4)")
    group.add_argument("--sequence-length", type=int, help="tokens in the sample (default: 2048; with --config the run's)")
    group.add_argument("--seed", type=int, help="of order and masks (default: 0; with --config the run's)")

    group = parser.add_argument_group("with --equivalence and --data")
    group.add_argument("--objective", choices=("clm", "mlm", "mntp", "all"), help="default: all; for a sample the phase's, or mlm")
    return parser


def main() -> int:
    """Run the check that the command line asks for. Returns 1 if something is wrong."""
    parser = build_parser()
    arguments = parser.parse_args()
    _refuse_strays(parser, arguments)
    with _only_the_report_on_stdout():
        report = _check(arguments)
    if arguments.json:
        print(json.dumps(report.as_dict(), indent=1, allow_nan=False))
    else:
        from megatron_ext.doctor.text import Painter, render

        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a script still gets its tokens
        print("\n".join(render(report, Painter())))
    return 0 if report.ok else 1


def _refuse_strays(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """An option of another check would do nothing: say so instead."""
    for group, check in (("layout precision packing steps", "equivalence"), ("tokenizer config sample", "data")):
        for name in group.split():
            if getattr(arguments, name) != parser.get_default(name) and getattr(arguments, check) in (None, False):
                raise UserError(f"--{name} was given without --{check}: it belongs to that")
    for name in ("phase", "ratio", "sequence_length", "seed"):
        if getattr(arguments, name) is not None and arguments.sample is None:
            raise UserError(f"--{name.replace('_', '-')} was given without --sample: it says how the sample is shown")
    if arguments.objective is not None and not arguments.equivalence and arguments.sample is None:
        raise UserError("--objective was given without --equivalence or --sample: it belongs to these")


@contextlib.contextmanager
def _only_the_report_on_stdout() -> Iterator[None]:
    """What libraries and child processes print meanwhile goes to stderr."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def _check(arguments: argparse.Namespace) -> "Report":
    if arguments.equivalence:
        from megatron_ext.doctor.equivalence import OBJECTIVES, check_equivalence

        if arguments.layout is None:
            raise UserError("--equivalence needs --layout, e.g. --layout tensor=2,pipeline=2")
        if arguments.steps < 1:
            raise UserError(f"--steps is {arguments.steps}: it must be greater than 0")
        objectives = OBJECTIVES if arguments.objective in (None, "all") else (arguments.objective,)
        return check_equivalence(arguments.layout, arguments.precision, arguments.packing == "packed", objectives, arguments.steps)
    if arguments.checkpoint is not None:
        from megatron_ext.doctor.checkpoint import check_checkpoints

        return check_checkpoints(arguments.checkpoint)
    if arguments.data is not None:
        from megatron_ext.doctor.data import DataQuestion, check_data

        names = ("tokenizer", "config", "sample", "phase", "objective", "ratio", "sequence_length", "seed")
        return check_data(DataQuestion(arguments.data, **{name: getattr(arguments, name) for name in names}))
    from megatron_ext.doctor.machine import check_machine

    return check_machine()


if __name__ == "__main__":
    # The guard matters: --equivalence starts processes that import this file.
    run_command(main)
