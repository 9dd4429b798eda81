"""Reads a run's configuration from YAML files and the command line, and from what a checkpoint stores.

Values go `defaults < --config FILE.yaml < --section.field value`; unknown keys and wrong types are refused by name. This module
imports neither torch nor megatron, so `--help` stays quick.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_ext.config import RunConfig, require
from megatron_ext.config_tree import Place, Tree, build, nearest, show, spell, type_hints
from megatron_ext.config_yaml import read_file, read_word
from megatron_ext.errors import CommandLine, UserError
from megatron_ext.secrets import is_redacted


def build_parser() -> CommandLine:
    """The command line of `pretrain_encoder.py`: `--config FILE.yaml` and `--section.field value` for every field."""
    parser = CommandLine(
        prog="pretrain_encoder.py",
        usage="%(prog)s --config FILE.yaml [--section.field VALUE ...] [--print-config]",
        description="Pretrain one encoder through a plan of CLM / MLM / MNTP phases.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file with the tree below; the other arguments override it.",
    )
    parser.add_argument("--print-config", action="store_true", help="Show the resolved configuration and stop.")
    for place, _, text in _fields(RunConfig, ()):
        parser.add_argument(f"--{spell(place)}", metavar="VALUE", default=argparse.SUPPRESS, help=text.replace("%", "%%"))
    return parser


def _fields(kind: type, place: Place) -> Iterator[tuple[Place, Any, str]]:
    """(place, type, help) of each field that is not itself a section."""
    texts = _field_docstrings(kind)
    for f in dataclasses.fields(kind):
        hint = type_hints(kind)[f.name]
        if dataclasses.is_dataclass(hint):
            yield from _fields(hint, (*place, f.name))
            continue
        spelled = (
            hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace(f"{RunConfig.__module__}.", "")
        )
        default = "required" if f.default is f.default_factory is dataclasses.MISSING else f"default: {_default(f)}"
        yield (*place, f.name), hint, f"{texts.get(f.name, '')} ({spelled}; {default})"


def _default(f: dataclasses.Field) -> str:
    value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    return str(value) if isinstance(value, list) else show(value)


@functools.cache  # finding the source takes longer than all the rest
def _field_docstrings(kind: type) -> dict[str, str]:
    """Field name -> the string that stands under the field in the source."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    return {
        above.target.id: text.value.value
        for above, text in zip(body, body[1:], strict=False)
        if isinstance(above, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def load_config(arguments: Sequence[str]) -> tuple[RunConfig, bool]:
    """Read a configuration from command-line arguments.

    Args:
        arguments: the words after the program's name.

    Returns:
        The configuration, and whether `--print-config` was given.

    Raises:
        UserError: for a missing file, an unknown key, a wrong type or an impossible value, naming it.
    """
    parser = build_parser()
    given, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}{nearest(unknown[0].partition('=')[0], parser.options())} (see --help)")
    tree = Tree()
    for path in given.config:
        part = read_file(path, f"--config {path}")
        for key, value in part.values.items():
            tree.put((key,), value, part.origins)
    for place, kind, _ in _fields(RunConfig, ()):
        name = spell(place)
        if name in given:
            tree.put(place, *read_word(getattr(given, name), kind, f"--{name}", place))
    config = build(RunConfig, tree)
    require(  # not in TrackingConfig: a checkpoint stores the redacted address and is read back
        not is_redacted(config.tracking.uri or ""),
        f"tracking.uri is {config.tracking.uri}: its user name and password were taken out when it was stored or shown; give the "
        "address alone, and these in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    )
    return config, given.print_config


def from_dict(tree: dict[str, Any]) -> RunConfig:
    """Rebuild the configuration that a checkpoint stores (the inverse of `RunConfig.as_dict`).

    Raises:
        UserError: the tree holds a key or value that this version does not know.
    """
    if not isinstance(tree, dict):
        raise UserError(f"the configuration is {show(tree)}: it must be a mapping")
    tree = _of_this_version(tree)
    return build(RunConfig, Tree(tree))


def _of_this_version(tree: dict[str, Any]) -> dict[str, Any]:
    """Earlier versions stored `precision.recipe` as `training.precision`."""
    training = tree.get("training")
    if not isinstance(training, dict) or "precision" not in training or "precision" in tree:
        return tree
    others = {name: value for name, value in training.items() if name != "precision"}
    return {**tree, "training": others, "precision": {"recipe": training["precision"]}}
