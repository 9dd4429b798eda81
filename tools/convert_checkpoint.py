"""Turn a Hugging Face model into a checkpoint to train from, or a training checkpoint into a Hugging Face model; both verified.

A checkpoint that Megatron-LM wrote of megatron-core's GPTModel can be imported, too.

python tools/convert_checkpoint.py import MODEL_FOLDER CHECKPOINT --add-mask-token
python tools/convert_checkpoint.py import MEGATRON_FOLDER CHECKPOINT --tokenizer tokenizer.model
python tools/convert_checkpoint.py export RUN/checkpoints/step_00001000 MODEL_FOLDER
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ext.errors import CommandLine, UserError, run_command
from megatron_ext.hf.families import FAMILIES


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(description="Convert models between training and Hugging Face.")
    commands = parser.add_subparsers(dest="command", required=True)
    bring = commands.add_parser("import", help="Hugging Face folder, or checkpoint of Megatron-LM -> checkpoint")
    bring.add_argument(
        "model_folder",
        type=Path,
        help="folder with config.json, safetensors and a tokenizer, as a hub download leaves it; or a checkpoint of Megatron-LM "
        "in the format torch_dist: .../iter_0001000, or the folder above it for the latest",
    )
    bring.add_argument("checkpoint", type=Path, help="destination; must not exist, or be empty")
    bring.add_argument(
        "--add-mask-token", action="store_true", help="give the tokenizer a mask token if it has none: a reserved id, or a new one"
    )
    bring.add_argument("--tokenizer", type=Path, help="of a Megatron-LM checkpoint: a SentencePiece .model file or a folder")
    bring.add_argument(
        "--model-config",
        metavar="FILE.yaml",
        help="shape of a Megatron-LM checkpoint that lacks its arguments: a section `model` as in a training's configuration",
    )
    export = commands.add_parser("export", help="checkpoint -> Hugging Face folder")
    export.add_argument("checkpoint", type=Path, help="a complete checkpoint, .../checkpoints/step_00001000")
    export.add_argument("out_dir", type=Path, help="destination; must not exist, or be empty")
    export.add_argument(
        "--family",
        choices=("auto", *FAMILIES),
        default="auto",
        help="model class; auto: one of the model's shape and the attention of its last step (default: auto)",
    )
    export.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the exported weights (default: as trained)")
    export.add_argument("--max-shard-size", default="5GB", help="limit of one weight file (default: 5GB)")
    export.add_argument("--report", type=Path, help="write the figures of the verification to this JSON file")
    for command in (bring, export):
        command.add_argument(
            "--verify",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="compare logits and direction of attention, and the exported token ids, with the training code (default: on)",
        )
    return parser


def main() -> int:
    """Convert as the command line says. Returns 1 if the verification failed."""
    arguments = build_parser().parse_args()

    # Imported here so that --help answers at once.
    from transformers.utils import logging

    from megatron_ext.hf.verify import VerificationError

    logging.disable_progress_bar()
    reference_logits = None
    if arguments.verify:
        from megatron_ext.train.checkpoint_logits import checkpoint_logits as reference_logits
    try:
        return _COMMANDS[arguments.command](arguments, reference_logits)
    except VerificationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _import(arguments: argparse.Namespace, reference_logits: Any) -> int:
    from megatron_ext.hf.import_model import import_model
    from megatron_ext.hf.stock_checkpoint import StockVerification

    report = import_model(
        arguments.model_folder,
        arguments.checkpoint,
        with_mask_token=arguments.add_mask_token,
        tokenizer=arguments.tokenizer,
        model_fields=_model_fields(arguments.model_config),
        reference_logits=reference_logits,
    )
    print(f"{report.checkpoint}: {report.architecture}, {report.parameters:,} parameters, {report.vocab_size:,} rows")
    mask = report.mask_token
    if mask is None:
        print("no mask token: masked objectives need one (--add-mask-token)")
    else:
        held = f" (was {mask.replaced})" if mask.replaced else ""
        print(f"mask token: id {mask.id}, {mask.how}{held}")
    if report.verification is None:
        print("not verified")
    elif isinstance(report.verification, StockVerification):
        print(f"verified: {report.verification.tensors} tensors are the source's bit by bit, and the model runs causal")
    else:
        _print_verification(report.verification)
    return 0


def _model_fields(path: str | None) -> dict[str, Any] | None:
    """What the `model` section of a configuration sets; its other sections are left alone."""
    if path is None:
        return None
    from megatron_ext.config import ModelConfig
    from megatron_ext.config_tree import Tree, build
    from megatron_ext.config_yaml import read_file

    tree = read_file(path, f"--model-config {path}")
    section = tree.values.get("model")
    if not isinstance(section, dict):
        raise UserError(f"--model-config {path}: there is no section `model` in it")
    origins = {place[1:]: origin for place, origin in tree.origins.items() if place[:1] == ("model",)}
    model = build(ModelConfig, Tree(section, origins))
    return {name: getattr(model, name) for name in section}


def _print_verification(checked: Any) -> None:
    from megatron_ext.hf.verify import LIMIT

    texts = f", token ids equal on {checked.texts} texts" if checked.texts else ""
    print(
        f"verified as {checked.weights}: largest difference of a logit {checked.max_abs_diff:.2e} (limit {LIMIT:.0e}) "
        f"over {checked.tokens} tokens{texts}"
    )


def _export(arguments: argparse.Namespace, reference_logits: Any) -> int:
    import torch

    from megatron_ext.hf.export import export_checkpoint

    report = export_checkpoint(
        arguments.checkpoint,
        arguments.out_dir,
        family=arguments.family,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        max_shard_size=arguments.max_shard_size,
        reference_logits=reference_logits,
    )
    print(f"{report.folder}: {report.architecture}, {report.parameters:,} parameters, {len(report.weight_files)} weight file(s)")
    for checked in report.verifications:
        _print_verification(checked)
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


_COMMANDS = {"import": _import, "export": _export}


if __name__ == "__main__":
    run_command(main)
