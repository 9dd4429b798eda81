"""The report of fine-tuning runs, of one or more grids: an HTML page that needs nothing else, and PNG, CSV and Markdown beside it.

python tools/report_study.py build/grid --output-dir build/report
python tools/report_study.py build/grid --study STUDY.yaml --output-dir build/report
"""

import argparse
import sys
from pathlib import Path

from megatron_ext.errors import CommandLine, UserError, one_line, run_command, say


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="+", type=Path, metavar="GRID", help="output folders of tools/run_grid.py")
    parser.add_argument(
        "--study", metavar="FILE", help="study file that trained the models: plans, budgets and costs for the curves"
    )
    parser.add_argument("--title", help="of the page (default: the study's name, or the folder's)")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    return parser


def main() -> int:
    """Read, draw, write."""
    arguments = build_parser().parse_args()
    from megatron_ext.study.facts import facts_of
    from megatron_ext.study.report import items_of, make_report, read_missing, read_results
    from megatron_ext.study.study_file import read_study

    rows = read_results(arguments.grids)
    missing = read_missing(arguments.grids, rows)
    study = read_study(arguments.study) if arguments.study else None
    title = arguments.title or (study.name if study else arguments.grids[0].name)
    report = make_report(title, rows, facts_of(study) if study else [], items_of(arguments.grids), missing)
    try:
        say(f"report: {report.write(arguments.output_dir)}")
    except OSError as error:
        raise UserError(f"--output-dir {arguments.output_dir}: {one_line(error)}") from None
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
