"""The files of examples/docker, as far as that can be looked at without a container engine."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "examples/docker"
FILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.pypi"]
KEPT_VERSIONS = DOCKER / "kept_versions.py"


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, what follows it), with comments left out and lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    found = [line.split(maxsplit=1) for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]
    return [(name, rest) for name, rest in found]


def extras() -> set[str]:
    """Those that setup.py names."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "extras_require":
            return {key.value for key in node.value.keys}
    raise AssertionError("setup.py names no extras")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_dockerfile_copies_what_exists_and_installs_known_extras(path: Path) -> None:
    steps = instructions(path)
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV"}
    assert {name for name, _ in steps} <= known
    stages = {rest.split(" AS ")[1] for name, rest in steps if name == "FROM" and " AS " in rest}
    for name, rest in steps:
        words = rest.split()
        if name == "COPY" and words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
        elif name == "COPY":
            assert [source for source in words[:-1] if not (ROOT / source).exists()] == [], rest
    asked = {extra for _, rest in steps for group in re.findall(r"'\.\[(.*?)\]'", rest) for extra in group.split(",")}
    assert asked and asked <= extras()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_an_image_is_made_from_is_pinned(path: Path) -> None:
    steps = instructions(path)
    pinned = dict(rest.split("=", 1) for name, rest in steps if name == "ARG" and "=" in rest)
    for name, rest in steps:
        if name == "FROM":
            base = pinned[rest.split()[0].strip("${}")]
            assert re.fullmatch(r"[\w./]+:\d[\w.-]*", base), base
    for version in re.findall(r"transformer-engine[^ \"']*==([^\"' ]+)", path.read_text()):
        assert re.fullmatch(r"\d+\.\d+(\.\d+)?", pinned[version.strip("${}")])


def kept_versions(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(KEPT_VERSIONS), *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_versions_are_written_down_held_and_missed(tmp_path: Path) -> None:
    from importlib.metadata import version

    kept = tmp_path / "kept.txt"
    assert kept_versions("write", kept).returncode == 0
    lines = kept.read_text().splitlines()
    assert f"torch=={version('torch')}" in lines
    assert not [line for line in lines if line.startswith(("numpy", "transformers", "megatron"))]
    assert kept_versions("check", kept, "torch").returncode == 0
    kept.write_text("torch==1.0\n")
    done = kept_versions("check", kept, "torch", "a-package-that-nobody-has")
    assert done.returncode == 1
    assert f"torch was 1.0 and is {version('torch')}; a-package-that-nobody-has is not installed" in done.stderr
