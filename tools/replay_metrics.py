"""Deliver to MLflow what a training run could not.

python tools/replay_metrics.py OUTPUT_DIR
"""

import argparse
import sys
from pathlib import Path

from megatron_ext.errors import CommandLine, run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        description="Deliver to MLflow what a training run could not: the records left in its mlflow_spool.jsonl.",
        epilog="Exit code: 0 when all is delivered; 1 when the server is not well or refuses records; 2 for a wrong argument.",
    )
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="the run's output_dir; the run must have ended")
    parser.add_argument(
        "--uri", help="another tracking server than the run's; it gets the whole run (default: the one that the run was given)"
    )
    return parser


def main() -> int:
    """Deliver, show the progress and the counts."""
    arguments = build_parser().parse_args()
    from megatron_ext.train.replay import replay  # imported here so that --help answers at once

    result = replay(arguments.output_dir, arguments.uri)
    counts = f"{result.delivered} record(s) delivered, {result.refused} item(s) refused, {result.left} record(s) left"
    if result.error is not None:
        print(f"error: MLflow at {result.server} failed ({result.error}): {counts}", file=sys.stderr)
        return 1
    print(f"MLflow at {result.server}: {counts}")
    return 1 if result.refused else 0


if __name__ == "__main__":
    run_command(main)
