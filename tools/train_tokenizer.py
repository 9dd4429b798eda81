"""Train a SentencePiece tokenizer with a mask token on text files: writes PREFIX.model and PREFIX.vocab."""

from pathlib import Path

from megatron_ext.errors import CommandLine, printable, run_command


def main() -> None:
    """Parse the command line and train."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=".jsonl, .txt (also .gz, .zst), .parquet; folder; glob")
    parser.add_argument("--output-prefix", type=Path, required=True, help="path of the tokenizer without its ending")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, with 256 bytes and 5 special tokens")
    parser.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram")
    parser.add_argument("--json-field", default="text", help="field or column that holds the text")
    parser.add_argument("--sample-sentences", type=int, default=2_000_000, help="train on at most so many lines")
    parser.add_argument("--seed", type=int, default=1, help="seed of that sample")
    parser.add_argument("--rejects", type=Path, help="list of rejected records (default: PREFIX.rejects.jsonl)")
    arguments = parser.parse_args()

    from megatron_ext.data.readers import ReaderSettings, expand_inputs
    from megatron_ext.data.tokenizer_training import train_tokenizer

    trained = train_tokenizer(
        expand_inputs(arguments.inputs),
        arguments.output_prefix,
        vocab_size=arguments.vocab_size,
        model_type=arguments.model_type,
        reader=ReaderSettings(json_field=arguments.json_field, text_documents="paragraph"),
        sample_sentences=arguments.sample_sentences,
        seed=arguments.seed,
        rejects_path=arguments.rejects,
    )
    prefix = printable(str(arguments.output_prefix))
    print(f"{prefix}.model: {arguments.vocab_size} pieces from {trained.lines:,} lines")
    for cause, number in trained.rejected.items():
        print(f"rejected: {number:,} {cause}")


if __name__ == "__main__":
    run_command(main)
