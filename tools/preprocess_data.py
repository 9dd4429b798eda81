"""Tokenize text files into a Megatron indexed dataset: PREFIX.bin, PREFIX.idx and PREFIX.json.

Run again after an interruption, it continues with the input files that are not done.
"""

from pathlib import Path

from megatron_ext.errors import CommandLine, printable, run_command


def main() -> None:
    """Parse the command line and preprocess."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=".jsonl, .txt (also .gz, .zst), .parquet; folder; glob")
    parser.add_argument("--output-prefix", type=Path, required=True, help="path of the data set without its endings")
    parser.add_argument("--tokenizer", type=Path, required=True, help="SentencePiece .model file or Hugging Face folder")
    parser.add_argument("--json-field", default="text", help="field or column that holds the text")
    parser.add_argument(
        "--text-documents", choices=("file", "paragraph", "line"), default="file", help="one document of a .txt file"
    )
    parser.add_argument("--no-append-eos", action="store_true", help="do not end documents with the EOS token")
    parser.add_argument("--max-line-bytes", type=int, default=64 * 2**20, help="reject longer lines")
    parser.add_argument("--workers", type=int, help="processes (default: one per processor, at most one per input)")
    parser.add_argument("--rejects", type=Path, help="list of rejected records (default: PREFIX.rejects.jsonl)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    arguments = parser.parse_args()

    from megatron_ext.data.corpus import preprocess
    from megatron_ext.data.readers import expand_inputs

    counts = preprocess(
        expand_inputs(arguments.inputs),
        arguments.output_prefix,
        arguments.tokenizer,
        json_field=arguments.json_field,
        text_documents=arguments.text_documents,
        max_line_bytes=arguments.max_line_bytes,
        append_eos=not arguments.no_append_eos,
        workers=arguments.workers,
        progress=not arguments.no_progress,
        rejects_path=arguments.rejects,
    )
    mean = counts.tokens / counts.documents
    prefix = printable(str(arguments.output_prefix))
    print(f"{prefix}: {counts.documents:,} documents, {counts.tokens:,} tokens, {mean:.1f} tokens a document")
    for cause, number in counts.rejected.items():
        print(f"rejected: {number:,} {cause}")


if __name__ == "__main__":
    run_command(main)
