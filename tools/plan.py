"""Plan a run before it is started.

python tools/plan.py dry-run --config FILE.yaml --world-size 1024 [--section.field VALUE ...]
python tools/plan.py recommend --config FILE.yaml --gpus 64 --gpu h100 [--section.field VALUE ...]
python tools/plan.py validate
python tools/plan.py curves --output docs/images/cost_vs_gpus.png

Speed is predicted here, nothing is measured: `validate` shows how far predictions are from published runs.

Exit code 0: done; 2: the command line, or the run that it describes, is refused.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.config_reading import load_config
from megatron_ext.errors import CommandLine, UserError, run_command

LLAMA3_VOCABULARY = 128_256


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandLine)
    _add_dry_run(commands)
    _add_recommend(commands)
    _add_validate(commands)
    _add_curves(commands)
    return parser


def _add_dry_run(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "dry-run",
        allow_abbrev=False,
        help="build single ranks of a large run in one process, and count what they hold, send and write",
        description="Build single ranks of a large run in one process, without their memory, and count what they hold, send and "
        "write. What the run itself would refuse about its sizes is refused here in the same words. Needs no data and no GPU. "
        "All other arguments are those of pretrain_encoder.py, e.g. --parallel.tensor 8.",
    )
    _add_config(parser)
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks of the run")
    parser.add_argument(
        "--rank", default="all-distinct", metavar="R", help="a rank, or all-distinct: the first of each pipeline stage (default)"
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="default: that of data.tokenizer, whose files must be here then"
    )
    parser.add_argument("--gpu", default="h100", metavar="G", help="what the run will have: a100, h100 (default), h200 or b200")
    _add_json(parser)
    parser.set_defaults(run=run_dry_run)


def _add_recommend(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "recommend",
        allow_abbrev=False,
        help="the best layouts for a run on so many GPUs, and why not the others",
        description="Search tensor, pipeline, context and data parallelism, micro-batch, recomputation and BF16 against FP8 for a "
        "run whose model, plan and global batch stay. Needs no data and no GPU. All other arguments are those of "
        "pretrain_encoder.py, e.g. --model.preset 1b.",
    )
    _add_config(parser)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="how many GPUs")
    _add_gpu(parser, "that of data.tokenizer if its files are here, else ")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many to show (default: 5)")
    parser.add_argument(
        "--document-length",
        type=float,
        metavar="L",
        help="mean length of the document that a token belongs to, sum(l^2) / sum(l); default: the whole sample, which is dearest",
    )
    _add_json(parser)
    parser.set_defaults(run=run_recommend)


def _add_validate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "validate", allow_abbrev=False, help="predicted against published training speeds", description="Row by row, with errors."
    )
    parser.add_argument("--calibrate", action="store_true", help="fit the constants anew (needs SciPy), and use what is found")
    _add_json(parser)
    parser.set_defaults(run=run_validate)


def _add_curves(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "curves", allow_abbrev=False, help="draw cost against GPUs", description="Cost of the study's models on 1 to 4,096 GPUs."
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="PNG, PDF or SVG to write")
    _add_gpu(parser)
    parser.set_defaults(run=run_curves)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="the run's YAML")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


def _add_gpu(parser: argparse.ArgumentParser, vocabulary: str = "") -> None:
    parser.add_argument("--gpu", default="h100", metavar="G", help="a100, h100 (default, the only one calibrated), h200 or b200")
    parser.add_argument("--vocab-size", type=int, metavar="N", help=f"default: {vocabulary}Llama 3's {LLAMA3_VOCABULARY:,}")


def main() -> int:
    """Run the command."""
    arguments, overrides = build_parser().parse_known_args()
    return arguments.run(arguments, overrides)


def run_dry_run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Build the ranks that are asked for and show them."""
    if arguments.world_size < 1:
        raise UserError(f"--world-size is {arguments.world_size}: it must be greater than 0")
    if arguments.rank != "all-distinct" and not arguments.rank.isdecimal():
        raise UserError(f"--rank is '{arguments.rank}': it must be a number, or all-distinct")
    from megatron_ext.plan.hardware import find_gpu

    gpu = find_gpu(arguments.gpu)
    config = _load(arguments, overrides)
    ranks = None if arguments.rank == "all-distinct" else [int(arguments.rank)]
    # Imported here so that --help answers at once; and apex is looked at before megatron-core imports what is called so.
    from megatron_ext.runtime.capabilities import check_apex

    check_apex()
    from megatron_ext.plan.dry_run import dry_run
    from megatron_ext.plan.dry_run_text import as_dict, render

    result = dry_run(config, arguments.world_size, ranks, arguments.vocab_size, gpu)
    _show(as_dict(result) if arguments.json else render(result))
    return 0


def run_recommend(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Search, and show the best few with the reasons against the others."""
    from megatron_ext.plan.hardware import find_gpu

    _require_positive(arguments, "gpus", "top", "vocab_size", "document_length")
    gpu = find_gpu(arguments.gpu)
    config = _load(arguments, overrides)
    from megatron_ext.plan.recommend import as_dict, choose, render
    from megatron_ext.plan.search import search

    vocab_size, origin = _vocabulary(config, arguments.vocab_size)
    result = search(config, vocab_size, arguments.gpus, gpu, arguments.document_length)
    best = choose(result)[: arguments.top]
    if arguments.json:
        _show({"vocabulary": {"size": vocab_size, "from": origin}, **as_dict(result, best)})
    else:
        first, *others = render(result, best)
        _show([first, f"vocabulary: {vocab_size:,} ids, {origin}", *others])
    return 0


def _vocabulary(config: RunConfig, given: int | None) -> tuple[int, str]:
    """Ids that belong to tokens, and where the number comes from."""
    if given is not None:
        return given, "from --vocab-size"
    if not config.data.tokenizer or not Path(config.data.tokenizer).exists():
        return LLAMA3_VOCABULARY, "Llama 3's: data.tokenizer is not here"
    from megatron_ext.data.tokenizer import load_tokenizer

    return load_tokenizer(Path(config.data.tokenizer)).vocab_size, f"from data.tokenizer {config.data.tokenizer}"


def run_validate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Show every published run beside its prediction."""
    _refuse(overrides)
    from megatron_ext.plan.calibration import CALIBRATED, as_dict, calibrate, render, validate

    constants = calibrate() if arguments.calibrate else CALIBRATED
    rows = validate(constants)
    _show(as_dict(rows, constants) if arguments.json else render(rows, constants))
    return 0


def run_curves(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Draw the picture and print its points."""
    from megatron_ext.plan.hardware import find_gpu

    _refuse(overrides)
    _require_positive(arguments, "vocab_size")
    gpu = find_gpu(arguments.gpu)
    from megatron_ext.plan.curves import PRESETS, cost_curve, draw, render

    vocab_size = arguments.vocab_size or LLAMA3_VOCABULARY
    curves = {preset: cost_curve(preset, vocab_size, gpu) for preset in PRESETS}
    draw(curves, gpu, arguments.output)
    _show(render(curves))
    return 0


def _load(arguments: argparse.Namespace, overrides: list[str]) -> RunConfig:
    files = [word for path in arguments.config for word in ("--config", path)]
    return load_config([*files, *overrides])[0]


def _refuse(overrides: list[str]) -> None:
    if overrides:
        raise UserError(f"unknown argument {overrides[0]} (see --help)")


def _require_positive(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be greater than 0")


def _show(result: dict[str, Any] | list[str]) -> None:
    """Print a result as JSON, or lines of text."""
    if isinstance(result, dict):
        json.dump(result, sys.stdout, indent=1)
        print()
    else:
        print("\n".join(result))


if __name__ == "__main__":
    run_command(main)
