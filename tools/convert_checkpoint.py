"""Turn a Hugging Face model into a checkpoint to train from, or a training checkpoint into a Hugging Face model; both verified.

A checkpoint that Megatron-LM wrote of megatron-core's GPTModel can be imported, too.

python tools/convert_checkpoint.py import MODEL_FOLDER CHECKPOINT --add-mask-token
python tools/convert_checkpoint.py import MEGATRON_FOLDER CHECKPOINT --tokenizer tokenizer.model
python tools/convert_checkpoint.py export RUN/checkpoints/step_00001000 MODEL_FOLDER
python tools/convert_checkpoint.py export RUN/checkpoints REPOSITORY --hub
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ext.errors import CommandLine, UserError, run_command, warn
from megatron_ext.hf.families import FAMILIES
from megatron_ext.hf.summed_files import begin_summing
from megatron_ext.hf.verification_error import VerificationError
from megatron_ext.runtime.quick_start import without_garbage_collection


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
    export.add_argument(
        "checkpoint", type=Path, help="a complete checkpoint, .../checkpoints/step_00001000; with --hub the folder of all of them"
    )
    export.add_argument(
        "out_dir", type=Path, help="destination; must not exist, or be empty; with --hub it may hold earlier revisions"
    )
    export.add_argument(
        "--hub",
        action="store_true",
        help="export every checkpoint of the run as a revision of one repository: folders step-1000, step-2000, ..., main (the "
        "last), and a README.md that says how to upload them; finished revisions are not converted again",
    )
    export.add_argument(
        "--family",
        choices=("auto", *FAMILIES),
        default="auto",
        help="model class; auto: one of the model's shape and the attention of its last step (default: auto)",
    )
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the exported weights (default: as trained)")
    export.add_argument(
        "--register",
        action=argparse.BooleanOptionalAction,
        help="log configuration, model card, sums and figures, not the weights, to the MLflow run that trained the checkpoint; a "
        "failure is a warning (default: on if the checkpoint lies in its run's folder; --register: wherever it lies)",
    )
    export.add_argument("--max-shard-size", default="5GB", help="limit of one weight file (default: 5GB)")
    export.add_argument("--report", type=Path, help="write the figures of the verification to this JSON file")
    for command in (bring, export):
        command.add_argument(
            "--verify",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="compare logits, direction of attention and the norm of every weight's rows, and the exported token ids, with the "
            "training code (default: on)",
        )
    return parser


def main() -> int:
    """Convert as the command line says. Returns 1 if the verification failed."""
    arguments = build_parser().parse_args()
    try:
        return _COMMANDS[arguments.command](arguments)
    except VerificationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _reference_logits(arguments: argparse.Namespace) -> Any:
    """The training code's forward pass, if there is to be a verification."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not arguments.verify:
        return None
    from megatron_ext.train.checkpoint_logits import checkpoint_logits

    return checkpoint_logits


def _import(arguments: argparse.Namespace) -> int:
    files = begin_summing(arguments.model_folder)
    with without_garbage_collection():  # imported here so that --help answers at once
        from megatron_ext.hf.import_model import import_model
        from megatron_ext.hf.stock_checkpoint import StockVerification

        reference_logits = _reference_logits(arguments)
    report = import_model(
        arguments.model_folder,
        arguments.checkpoint,
        files=files,
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
    from megatron_ext.hf.verify_weights import NORM_LIMIT

    weights, tokenizer = checked.weight_report, checked.tokenizer_report
    print(
        f"verified as {checked.weights}: largest difference of a logit {checked.max_abs_diff:.2e} (limit {LIMIT:.0e}) over "
        f"{checked.tokens} tokens; of a row's norm {weights.max_norm_change:.1e} (limit {NORM_LIMIT:.0e}) over {weights.tensors} "
        f"tensors, {weights.parameters:,} parameters"
    )
    if tokenizer is None:
        return
    known = [f"the same pieces in another order at {tokenizer.reordered} place(s), of equal score"] if tokenizer.reordered else []
    known += [f"{tokenizer.renormalized} hard case(s) normalized otherwise"] if tokenizer.renormalized else []
    but = f", but for known differences: {'; '.join(known)}" if known else ""
    print(f"token ids equal on {tokenizer.texts} texts and {tokenizer.cases} hard cases{but}")


def _export(arguments: argparse.Namespace) -> int:
    _write_report(arguments.report, {})  # it is found out now if it cannot be written
    with without_garbage_collection():
        import torch

        from megatron_ext.hf.export import export_checkpoint

        reference_logits = _reference_logits(arguments)
    if arguments.hub:
        return _export_run(arguments, reference_logits)

    report = export_checkpoint(
        arguments.checkpoint,
        arguments.out_dir,
        family=arguments.family,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        max_shard_size=arguments.max_shard_size,
        reference_logits=reference_logits,
    )
    _print_export(report)
    if report.verifications:
        _write_report(arguments.report, asdict(report.verifications[-1]))
    if arguments.register is not False:
        _register(report, arguments.checkpoint, arguments.out_dir.absolute().name, bool(arguments.register))
    return 0


def _export_run(arguments: argparse.Namespace, reference_logits: Any) -> int:
    from megatron_ext.hf.hub_layout import Options, Revision, export_run

    figures: dict[str, Any] = {}

    def tell(revision: Revision) -> None:
        if revision.report is None:
            print(f"{revision.folder}: there already")
            return
        _print_export(revision.report)
        if revision.report.verifications:
            figures[revision.name] = asdict(revision.report.verifications[-1])
        if arguments.register is not False:
            name = f"{arguments.out_dir.absolute().name}.{revision.name}"
            _register(revision.report, revision.checkpoint, name, bool(arguments.register))

    options = Options(arguments.family, arguments.dtype, arguments.max_shard_size)
    done = export_run(arguments.checkpoint, arguments.out_dir, options, reference_logits=reference_logits, on_revision=tell)
    _write_report(arguments.report, figures)
    print(f"{arguments.out_dir}: {len(done)} revision(s), main is {done[-1].name}; README.md says how to upload them")
    return 0


def _print_export(report: Any) -> None:
    print(f"{report.folder}: {report.architecture}, {report.parameters:,} parameters, {len(report.weight_files)} weight file(s)")
    for checked in report.verifications:
        _print_verification(checked)
    if report.rounding is not None:
        print(f"rounding moves a logit by {report.rounding[0]:.2g} at most, {report.rounding[1]:.2g} on average")
    if not report.verifications:
        print("not verified")


def _write_report(path: Path | None, figures: dict[str, Any]) -> None:
    if not path:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--report {path} cannot be written ({error.strerror or error})") from None


def _register(report: Any, checkpoint: Path, name: str, any_server: bool) -> None:
    """Log the export to the run that trained it, if there is one; a store that is away costs a warning."""
    from megatron_ext.hf.registration import RegistrationError, is_tracked, register_export
    from megatron_ext.train.mlflow_delivery import tracking_uri

    if not is_tracked(checkpoint):
        return
    try:
        place = register_export(report, checkpoint, name, tracking_uri, any_server=any_server)
        print(f"registered in MLflow: {place}")
    except RegistrationError as error:
        warn(f"the export is complete, but was not registered in MLflow ({error})")


_COMMANDS = {"import": _import, "export": _export}


if __name__ == "__main__":
    run_command(main)
