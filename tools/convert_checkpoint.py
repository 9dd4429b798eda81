"""Turn a training checkpoint into a native Hugging Face model folder, verified against the training code.

python tools/convert_checkpoint.py export RUN/checkpoints/step_00001000 MODEL_FOLDER
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_ext.errors import CommandLine, UserError, run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(description="Convert checkpoints between training and Hugging Face.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="checkpoint -> Hugging Face folder")
    export.add_argument("checkpoint", type=Path, help="a complete checkpoint, .../checkpoints/step_00001000")
    export.add_argument("out_dir", type=Path, help="destination; must not exist, or be empty")
    export.add_argument(
        "--family",
        choices=("auto", "eurobert", "llama"),
        default="auto",
        help="model class; auto: eurobert if the last step was bidirectional, llama if it was causal (default: auto)",
    )
    export.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the exported weights (default: as trained)")
    export.add_argument("--max-shard-size", default="5GB", help="limit of one weight file (default: 5GB)")
    export.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reload the folder and compare ids, logits and direction of attention with the training code (default: on)",
    )
    export.add_argument("--report", type=Path, help="write the figures of the verification to this JSON file")
    return parser


def main() -> int:
    """Export as the command line says. Returns 1 if the verification failed."""
    arguments = build_parser().parse_args()

    # Imported here so that --help answers at once.
    import torch
    from transformers.utils import logging

    from megatron_ext.hf.export import export_checkpoint
    from megatron_ext.hf.verify import LIMIT, VerificationError

    logging.disable_progress_bar()
    reference_logits = None
    if arguments.verify:
        from megatron_ext.train.checkpoint_logits import checkpoint_logits as reference_logits
    try:
        report = export_checkpoint(
            arguments.checkpoint,
            arguments.out_dir,
            family=arguments.family,
            dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
            max_shard_size=arguments.max_shard_size,
            reference_logits=reference_logits,
        )
    except VerificationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{report.folder}: {report.architecture}, {report.parameters:,} parameters, {len(report.weight_files)} weight file(s)")
    for checked in report.verifications:
        print(
            f"verified as {checked.weights}: largest difference of a logit {checked.max_abs_diff:.2e} (limit {LIMIT:.0e}) "
            f"over {checked.tokens} tokens, token ids equal on {checked.texts} texts"
        )
    if arguments.report and report.verifications:
        try:
            arguments.report.parent.mkdir(parents=True, exist_ok=True)
            arguments.report.write_text(json.dumps(asdict(report.verifications[-1]), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--report {arguments.report} cannot be written ({error.strerror or error})") from None
    if report.rounding is not None:
        print(f"rounding moves a logit by {report.rounding[0]:.2g} at most, {report.rounding[1]:.2g} on average")
    if not report.verifications:
        print("not verified")
    return 0


if __name__ == "__main__":
    run_command(main)
