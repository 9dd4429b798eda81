"""Plan a run before it is started.

python tools/plan.py dry-run --config FILE.yaml --world-size 1024 [--section.field VALUE ...]

Exit code 0: done; 2: the command line, or the run that it describes, is refused.
"""

import argparse
import json

from megatron_ext.config_reading import load_config
from megatron_ext.errors import CommandLine, UserError, run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandLine)
    _add_dry_run(commands)
    return parser


def _add_dry_run(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "dry-run",
        allow_abbrev=False,
        help="build single ranks of a large run in one process, and count what they hold, send and write",
        description="Build single ranks of a large run in one process, without their memory, and count what they hold, send and "
        "write. What the run itself would refuse about its sizes is refused here in the same words. Needs no data and no GPU. "
        "All other arguments are those of pretrain_encoder.py, e.g. --parallel.tensor 8.",
    )
    command.add_argument("--config", action="append", default=[], metavar="FILE", help="the run's YAML")
    command.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks of the run")
    command.add_argument(
        "--rank", default="all-distinct", metavar="R", help="a rank, or all-distinct: the first of each pipeline stage (default)"
    )
    command.add_argument(
        "--vocab-size", type=int, metavar="N", help="default: that of data.tokenizer, whose files must be here then"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


def main() -> None:
    """Run a command."""
    arguments, overrides = build_parser().parse_known_args()
    {"dry-run": dry_run}[arguments.command](arguments, overrides)


def dry_run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Build the ranks that are asked for and show them."""
    if arguments.world_size < 1:
        raise UserError(f"--world-size is {arguments.world_size}: it must be greater than 0")
    if arguments.rank != "all-distinct" and not arguments.rank.isdecimal():
        raise UserError(f"--rank is '{arguments.rank}': it must be a number, or all-distinct")
    files = [word for path in arguments.config for word in ("--config", path)]
    config, _ = load_config([*files, *overrides])
    ranks = None if arguments.rank == "all-distinct" else [int(arguments.rank)]
    # Imported here so that --help answers at once; and apex is looked at before megatron-core imports what is called so.
    from megatron_ext.runtime.capabilities import check_apex

    check_apex()
    from megatron_ext.plan import dry_run as planned
    from megatron_ext.plan.dry_run_text import as_dict, render

    result = planned.dry_run(config, arguments.world_size, ranks, arguments.vocab_size)
    if arguments.json:
        print(json.dumps(as_dict(result), indent=1))
    else:
        print("\n".join(render(result)))


if __name__ == "__main__":
    run_command(main)
