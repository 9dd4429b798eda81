"""Every benchmark of speed, one after the other: what `make bench` runs. An hour or so on two cores, with nothing else running.

python -m benchmarks --output-dir build/bench
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from megatron_ext.errors import CommandLine, UserError, run_command

BENCHMARKS = {
    "training_step": "A training step beside its peers",
    "parallel": "Two ranks beside one",
    "sequences": "Long rows and packed documents",
    "data": "Data",
    "startup": "Start-up and checkpoints",
    "growth": "Growth",
}


def main() -> int:
    """Run them, and join their tables."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("build/bench"))
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    arguments = parser.parse_args()
    for name in arguments.only:
        folder = arguments.output_dir / name
        print(f"\n{BENCHMARKS[name]} (python -m benchmarks.{name})", flush=True)
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--output-dir", str(folder)])
        if done.returncode:
            raise UserError(f"benchmarks.{name} ended with code {done.returncode}")
        print(f"{time.monotonic() - started:.0f} s")
    tables = [
        f"## {BENCHMARKS[name]}\n\n    python -m benchmarks.{name}\n\n{(arguments.output_dir / name / 'summary.md').read_text()}"
        for name in BENCHMARKS
        if (arguments.output_dir / name / "summary.md").is_file()
    ]
    (arguments.output_dir / "summary.md").write_text("\n".join(tables))
    print(f"\n{arguments.output_dir / 'summary.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
