"""Plan a run before it costs anything: predicted speed and memory of every layout, and the model's own errors.

python tools/plan.py recommend --config RUN.yaml --gpus 64 --gpu h100
python tools/plan.py validate
python tools/plan.py curves --output docs/images/cost_vs_gpus.png

Everything here is predicted, nothing measured. Exit code 2: the command line, or what it names, is wrong.
"""

import argparse
import json
from pathlib import Path

from megatron_ext.errors import CommandLine, UserError, run_command

LLAMA3_VOCABULARY = 128_256


def build_parser() -> CommandLine:
    """The command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandLine)
    _add_recommend(commands)
    _add_validate(commands)
    _add_curves(commands)
    return parser


def _add_recommend(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "recommend",
        help="the best layouts for a configuration on so many GPUs",
        description="The best layouts for a configuration. Further --section.field VALUE arguments override it.",
    )
    command.add_argument("--config", required=True, help="the run's YAML")
    command.add_argument("--gpus", type=int, required=True, help="how many GPUs")
    _add_common(command)
    command.add_argument("--top", type=int, default=5, help="how many to show (default: 5)")
    command.add_argument(
        "--document-length",
        type=float,
        help="mean length of the document that a token belongs to, sum(l^2) / sum(l); default: the whole sample, which is dearest",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _add_validate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("validate", help="the speed model against published runs", description="Predicted and published.")
    command.add_argument("--calibrate", action="store_true", help="fit the constants anew, and use what is found")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _add_curves(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "curves", help="draw cost against GPUs", description="Cost of the study's models on 1 to 4,096 GPUs."
    )
    command.add_argument("--output", type=Path, required=True, help="PNG, PDF or SVG to write")
    _add_common(command)


def _add_common(command: CommandLine) -> None:
    command.add_argument("--gpu", default="h100", help="a100, h100, h200 or b200 (default: h100, the only one that is calibrated)")
    command.add_argument(
        "--vocab-size", type=int, default=LLAMA3_VOCABULARY, help=f"ids of the tokenizer (default: Llama 3's {LLAMA3_VOCABULARY:,})"
    )


def main() -> None:
    """Run a command."""
    arguments, overrides = build_parser().parse_known_args()
    if overrides and arguments.command != "recommend":
        raise UserError(f"unknown argument {overrides[0]} (see --help)")
    for name in ("gpus", "top", "vocab_size", "document_length"):
        value = getattr(arguments, name, None)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be greater than 0")
    {"recommend": recommend, "validate": validate, "curves": curves}[arguments.command](arguments, overrides)


def recommend(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Search, and print the best few with the reasons against the others."""
    from megatron_ext.config_reading import load_config
    from megatron_ext.plan.hardware import find_gpu

    gpu = find_gpu(arguments.gpu)
    config, _ = load_config(["--config", arguments.config, *overrides])
    from megatron_ext.plan.recommend import as_dict, choose, reasons, render
    from megatron_ext.plan.search import search

    result = search(config, arguments.vocab_size, arguments.gpus, gpu, arguments.document_length)
    best = choose(result)[: arguments.top]
    if arguments.json:
        figures = {"gpu": gpu.name, "calibrated": gpu.calibrated, "gpus": arguments.gpus, "measured": False}
        print(
            json.dumps({**figures, "best": [as_dict(result, each) for each in best], "reasons": reasons(result, best[0])}, indent=1)
        )
    else:
        print("\n".join(render(result, best)))


def validate(arguments: argparse.Namespace, _: list[str]) -> None:
    """Print every published row beside its prediction."""
    from megatron_ext.plan import calibration

    constants = calibration.calibrate() if arguments.calibrate else calibration.CALIBRATED
    rows = calibration.validate(constants)
    print(
        json.dumps(calibration.as_dict(rows, constants), indent=1)
        if arguments.json
        else "\n".join(calibration.render(rows, constants))
    )


def curves(arguments: argparse.Namespace, _: list[str]) -> None:
    """Draw the picture and print the points."""
    from megatron_ext.plan.curves import PRESETS, cost_curve, draw
    from megatron_ext.plan.hardware import find_gpu

    gpu = find_gpu(arguments.gpu)
    points = {preset: cost_curve(preset, arguments.vocab_size, gpu) for preset in PRESETS}
    draw(points, gpu, arguments.output)
    for preset, curve in points.items():
        for point in curve:
            print(f"{preset:6}{point.gpus:>6} GPUs {point.gpu_hours:>10,.0f} GPU-hours {point.days:>9.3f} days  {point.layout}")


if __name__ == "__main__":
    run_command(main)
