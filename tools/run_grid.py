"""Fine-tune every model on every task at every learning rate with every seed, and keep one row of each run.

python tools/run_grid.py GRID.yaml --output-dir build/grid --workers 2
python tools/run_grid.py GRID.yaml --output-dir /shared/grid --cluster auto

The same command goes on after a stop; what is done is not done again, what failed is tried again.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_ext.errors import CommandLine, UserError, run_command, say
from megatron_ext.locked_folder import only_one


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="YAML file: models, tasks, learning_rates, seeds")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="one file for each run, and results.parquet")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core, or GPU)")
    parser.add_argument("--cluster", metavar="ADDRESS", help="run on this Ray cluster instead; auto finds the one of this machine")
    parser.add_argument("--gpus-per-run", type=float, default=0.0, metavar="N", help="of the cluster's, for each run (default: 0)")
    parser.add_argument("--mlflow-uri", metavar="URI", help="tracking server (default: a file in DIR; none: no tracking)")
    return parser


def _default_workers() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) or len(os.sched_getaffinity(0))


def main() -> int:
    """Run the grid. Returns 1 if a run failed."""
    arguments = build_parser().parse_args()
    workers = _default_workers() if arguments.workers is None else arguments.workers
    if workers < 1:
        raise UserError(f"--workers is {workers}: it must be at least 1")
    if arguments.cluster and arguments.workers:
        raise UserError("--workers are of this machine: a cluster has its own")
    if arguments.gpus_per_run and not arguments.cluster:
        raise UserError("--gpus-per-run needs --cluster: the workers of this machine share its GPUs")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the workers end with this process
    from megatron_ext.evaluation.grid_file import grid_runs, read_grid
    from megatron_ext.evaluation.results import Results

    runs = grid_runs(read_grid(arguments.grid))
    with only_one(arguments.output_dir, "grid"):
        return _execute(arguments, runs, Results(arguments.output_dir), workers)


def _execute(arguments: argparse.Namespace, runs: list[Any], results: Any, workers: int) -> int:
    from megatron_ext.evaluation.grid import execute, mlflow_tracker, on_a_cluster, on_this_machine

    executor = on_a_cluster(arguments.cluster, arguments.gpus_per_run) if arguments.cluster else on_this_machine(workers)
    uri = arguments.mlflow_uri or f"sqlite:///{arguments.output_dir.resolve()}/mlflow.db"
    track = (lambda row: None) if uri == "none" else mlflow_tracker(uri, Path(arguments.grid).stem, arguments.output_dir)
    failed = execute(runs, results, executor, track)
    say(f"{len(runs) - failed} of {len(runs)} runs: {results.folder / 'results.parquet'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
