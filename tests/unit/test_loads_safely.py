"""Nowhere in the code can something from outside be loaded so that it runs: read off the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNPICKLING = ROOT / "megatron_ext/unpickling.py"
FROM_OWN_PROCESSES = {
    ROOT / "megatron_ext/runtime/launch.py": ["import pickle", "pickle.loads(result.recv_bytes())"],
    ROOT / "megatron_ext/runtime/writer.py": ["import pickle", "pickle.loads(self._queue.get_nowait())"],
}
"""What unpickles bytes that came over a pipe which nobody else has."""
"""Pickles what its own processes send through a pipe, by value; nothing from a file."""
SOURCES = [
    ROOT / "pretrain_encoder.py",
    *(path for folder in ("megatron_ext", "tools", "examples") for path in sorted((ROOT / folder).rglob("*.py"))),
]
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NEVER = {
    "pickle.load",
    "pickle.loads",
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "tempfile.mktemp",
    "torch.jit.load",
    "torch.hub.load",
}
LOADERS = {"torch.load", *NEVER} - {"eval", "exec", "compile"}


def full_names(tree: ast.AST) -> dict[str, str]:
    """What the imported names of a file stand for: `np` -> numpy, `loads` -> pickle.loads."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`np.load` as numpy.load; empty for what is no plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = dotted(node.value, names)
        return f"{before}.{node.attr}" if before else f"?.{node.attr}"
    return ""


def keyword(call: ast.Call, name: str) -> object:
    """Value of a keyword that is written out; None otherwise."""
    return next((word.value.value for word in call.keywords if word.arg == name and isinstance(word.value, ast.Constant)), None)


def unsafe_call(call: ast.Call, name: str) -> bool:
    method = name.rpartition(".")[2]
    words = {word.arg for word in call.keywords}
    return (
        name in NEVER
        or (name == "torch.load" and keyword(call, "weights_only") is not True)
        or (name == "numpy.load" and "allow_pickle" in words and keyword(call, "allow_pickle") is not False)
        or (name.startswith("yaml.") and "load" in method and not method.startswith("safe_load"))
        or (method == "from_pretrained" and keyword(call, "trust_remote_code") is not False)
        or ("trust_remote_code" in words and keyword(call, "trust_remote_code") is not False)
        or ("shell" in words and keyword(call, "shell") is not False)
        or (method in ("extractall", "extract", "unpack_archive") and keyword(call, "filter") != "data")
    )


def unsafe_loads(path: Path, source: str) -> Iterator[str]:
    """The lines of a file that could run what they load."""
    tree = ast.parse(source)
    names = full_names(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        place = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and unsafe_call(node, dotted(node.func, names)):
            yield f"{place} {ast.unparse(node)}"
        elif path != UNPICKLING and isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if {module.split(".")[0] for module in modules} & PICKLERS:
                yield f"{place} {ast.unparse(node)}"
        elif path != UNPICKLING and id(node) not in called and dotted(node, names) in LOADERS:  # handed on, called elsewhere
            yield f"{place} {ast.unparse(node)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_loaded_so_that_it_runs(path: Path) -> None:
    found = [line.partition(" ")[2] for line in unsafe_loads(path, path.read_text(encoding="utf-8"))]
    assert found == FROM_OWN_PROCESSES.get(path, [])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as p",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=trusted)",
        "from torch import load\nload(path)",
        "import torch\nread = torch.load",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nyaml.unsafe_load(text)",
        "from yaml import full_load\nfull_load(text)",
        "AutoModel.from_pretrained(folder)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "AutoModel.from_pretrained(folder, trust_remote_code=flag)",
        "pipeline('fill-mask', model=folder, trust_remote_code=True)",
        "eval(text)",
        "exec(text)",
        "import os\nos.system(command)",
        "import subprocess\nsubprocess.run(command, shell=True)",
        "with tarfile.open(path) as archive:\n    archive.extractall(folder)",
        "archive.extractall(folder, filter='fully_trusted')",
        "zipfile.ZipFile(path).extract(name)",
        "import shutil\nshutil.unpack_archive(path)",
    ],
)
def test_unsafe_loads_are_found(source: str) -> None:
    """The check itself can fail."""
    assert len(list(unsafe_loads(ROOT / "tools/some_tool.py", source))) == 1


def test_safe_loads_are_let_through() -> None:
    source = """
import torch, yaml, subprocess
import numpy as np
torch.load(path, weights_only=True)
np.load(path)
yaml.safe_load(text)
AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
archive.extractall(folder, filter="data")
subprocess.run(["ls"], shell=False)
model.eval()
"""
    assert list(unsafe_loads(ROOT / "tools/some_tool.py", source)) == []


def test_the_unpickler_never_calls_plain_pickle() -> None:
    source = "import pickle\nclass Reader(pickle.Unpickler): ...\npickle.load(file)\npickle.loads(content)"
    assert len(list(unsafe_loads(UNPICKLING, source))) == 2
