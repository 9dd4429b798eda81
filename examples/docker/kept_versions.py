"""Writes down which versions an image brings, for pip to hold, and checks afterwards that they are still there."""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

KEPT = re.compile(r"torch(vision|audio|ao)?|(pytorch-)?triton|transformer-engine.*|apex|flash-attn|nvidia-.*")
"""Distributions that were compiled against the image's torch, and torch itself."""


def installed() -> dict[str, str]:
    """Name -> version of the kept distributions that are installed."""
    found = {re.sub("[-_.]+", "-", one.metadata["Name"]).lower(): one.version for one in distributions()}
    return {name: version for name, version in sorted(found.items()) if KEPT.fullmatch(name)}


def main() -> None:
    """`write FILE` makes a file of constraints; `check FILE NAME ...` compares, and wants these distributions to be there."""
    command, path, *wanted = sys.argv[1:]
    if command == "write":
        Path(path).write_text("".join(f"{name}=={version}\n" for name, version in installed().items()))
        return
    before = dict(line.split("==") for line in Path(path).read_text().split())
    now = installed()
    changed = [f"{name} was {version} and is {now.get(name)}" for name, version in before.items() if now.get(name) != version]
    missing = [f"{name} is not installed" for name in wanted if name not in now]
    if changed or missing:
        sys.exit(f"error: {'; '.join(changed + missing)}")


if __name__ == "__main__":
    main()
