"""The package's imports go one way only, and everything public says what it is for."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_ext"
LONGEST_MODULE = 500

# What each part may import of the package besides itself; an entry stands for the module or folder and all below it.
CORE = {"secrets", "errors", "regular_file", "config", "config_reading", "checkpoint_files", "tree"}
ALLOWED = {
    "": set(),
    "secrets": set(),
    "tree": set(),
    "errors": {"secrets"},
    "regular_file": {"secrets", "errors"},
    "config_tree": {"secrets", "errors"},
    "config_yaml": {"secrets", "errors", "config_tree"},
    "config": {"secrets", "errors"},
    "config_reading": {"secrets", "errors", "config", "config_tree", "config_yaml"},
    "run_record": {"secrets", "errors"},
    "checkpoint_files": {"secrets", "errors", "regular_file", "run_record"},
    "unpickling": {"secrets", "errors", "regular_file", "checkpoint_files"},
    "objective": CORE,
    "runtime": CORE,
    "data": CORE | {"objective", "runtime"},
    "model": CORE | {"objective", "runtime", "data"},
    "train": CORE | {"unpickling", "objective", "runtime", "data", "model"},
    "hf": CORE | {"run_record", "unpickling", "objective", "data.tokenizer", "model.presets"},
    "plan": CORE | {"objective", "runtime", "data", "model", "train"},
    "locked_folder": {"secrets", "errors"},
    "evaluation": {"secrets", "errors", "config_tree", "config_yaml", "locked_folder"},
    "doctor": CORE | {"run_record", "unpickling", "objective", "runtime", "data", "model", "train", "hf", "plan", "evaluation"},
    "study": CORE
    | {"config_tree", "config_yaml", "unpickling", "objective", "runtime", "data", "model", "train", "hf", "plan", "evaluation"}
    | {"locked_folder"},
}
MAY_IMPORT_MEGATRON = {"runtime", "data", "model", "train", "plan", "doctor"}
NEVER = "megatron.training"

MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
ENTRY_POINTS = [ROOT / "pretrain_encoder.py", *sorted((ROOT / "tools").glob("*.py"))]


def module_name(path: Path) -> str:
    """Dotted name below the package: `data.loader`, `config`, `data` for its `__init__`, empty for the package's own."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.AST, path: Path) -> Iterator[str]:
    """Every module that is imported anywhere in a file; `from a import b` gives `a.b`, as b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = list(path.relative_to(ROOT).parts[: -node.level]) if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def is_below(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def wrong_imports(path: Path, source: str) -> list[str]:
    """The imports that a module of the package may not have."""
    own = module_name(path).split(".")[0]
    assert own in ALLOWED, f"{path.relative_to(ROOT)}: the part '{own}' has no place in the order; add it to ALLOWED"
    wrong = []
    for name in imported_names(ast.parse(source), path):
        if is_below(name, PACKAGE):
            inside = name.removeprefix(PACKAGE).removeprefix(".")
            if not any(is_below(inside, allowed) for allowed in {own} | ALLOWED[own] if allowed):
                wrong.append(name)
        elif (is_below(name, "megatron") and own not in MAY_IMPORT_MEGATRON) or is_below(name, NEVER):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: module_name(path) or PACKAGE)
def test_imports_go_one_way(path: Path) -> None:
    assert wrong_imports(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=lambda path: path.name)
def test_entry_points_never_import_megatron_training(path: Path) -> None:
    names = list(imported_names(ast.parse(path.read_text(encoding="utf-8")), path))
    assert names
    assert not [name for name in names if is_below(name, NEVER)]


@pytest.mark.parametrize(
    "module, line",
    [
        ("config.py", "from megatron_ext.objective import Phase"),
        ("config.py", "from megatron_ext import objective"),
        ("config.py", "from . import objective"),
        ("config.py", "import megatron.core"),
        ("secrets.py", "from megatron_ext.errors import UserError"),
        ("runtime/cpu.py", "from megatron_ext.objective import Phase"),
        ("runtime/cpu.py", "def f():\n    from megatron_ext.model import head"),
        ("data/loader.py", "import megatron_ext.model.head"),
        ("data/loader.py", "from ..train import step"),
        ("data/loader.py", "from megatron_ext.hf.export import x"),
        ("model/head.py", "from megatron_ext.train.step import x"),
        ("model/head.py", "from megatron.training import get_args"),
        ("model/head.py", "import importlib\nimportlib.import_module('megatron.training.global_vars')"),
        ("hf/export.py", "from megatron_ext.data.dataset import x"),
        ("hf/export.py", "from megatron_ext.model.head import x"),
        ("hf/export.py", "from megatron_ext.runtime.topology import x"),
        ("hf/export.py", "from megatron.core import parallel_state"),
        ("train/step.py", "from megatron_ext.hf.export import x"),
    ],
)
def test_backward_arrows_are_found(module: str, line: str) -> None:
    """The check itself can fail."""
    assert len(wrong_imports(ROOT / PACKAGE / module, line)) == 1


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Public classes and functions of a module, and the public methods of such classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node.name, node
            for member in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(member, kinds) and not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", member


@pytest.mark.parametrize("path", [*MODULES, *ENTRY_POINTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    assert [name for name, node in public_definitions(tree) if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", [*MODULES, *ENTRY_POINTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE
