"""Fine-tune a Hugging Face encoder on one task and score it on validation and test: one run.

python tools/finetune.py --model MODEL_FOLDER --task sst2 --learning-rate 5e-5 --seed 0
python tools/finetune.py --model MODEL_FOLDER --task rotten_tomatoes --learning-rate 2e-4 --seed 0 --json

Bidirectional attention, whatever the model was trained with last; --attention causal lets it see only what came before.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_ext.errors import CommandLine, UserError, run_command
from megatron_ext.evaluation.tasks import FAMILIES, TASKS, find_task


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="config.json, safetensors and tokenizer.json")
    parser.add_argument("--task", required=True, choices=TASKS, metavar="TASK", help=_tasks())
    parser.add_argument("--learning-rate", required=True, type=float)
    parser.add_argument("--seed", type=int, default=0, help="of the head and of the order of the rows (default: 0)")
    parser.add_argument(
        "--data", help="own copy of the data: a file with a column split, or a folder of train, validation, test files"
    )
    parser.add_argument("--source-data", help="of a transfer: own copy of the data that it is trained on")
    parser.add_argument(
        "--packages", default="build/data", help="where tools/fetch_demo_data.py puts its sets (default: build/data)"
    )
    parser.add_argument("--attention", choices=("bidirectional", "causal"), default="bidirectional")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of products (default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--max-steps", type=int, default=1000, help="at most (default: 1000)")
    parser.add_argument("--max-passes", type=int, default=1, help="over the training rows, at most (default: 1)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, help="of a CPU (default: torch's)")
    parser.add_argument("--json", action="store_true", help="print plain values")
    return parser


def _tasks() -> str:
    lines = [f"{FAMILIES[family]}: {', '.join(t.name for t in TASKS.values() if t.family == family)}" for family in FAMILIES]
    return "; ".join(lines)


def main() -> int:
    """Do one run."""
    arguments = build_parser().parse_args()
    for name in ("learning_rate", "max_steps", "max_passes", "batch_size", "threads"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be greater than 0")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed is {arguments.seed}: it must lie between 0 and 2^32 - 1")
    if arguments.source_data and find_task(arguments.task).trained_on is None:
        raise UserError(f"--source-data is of a transfer: {arguments.task} is trained on its own data")
    if not Path(arguments.model).is_dir():
        raise UserError(f"--model {arguments.model}: there is no such folder")
    from megatron_ext.evaluation.finetune import FinetuneRun, finetune, use_threads
    from megatron_ext.evaluation.training import Settings

    if arguments.threads:
        use_threads(arguments.threads)
    settings = Settings(
        max_steps=arguments.max_steps,
        max_passes=arguments.max_passes,
        batch_size=arguments.batch_size,
        attention=arguments.attention,
        precision=arguments.precision,
        packages=arguments.packages,
    )
    run = FinetuneRun(
        model=arguments.model,
        task=arguments.task,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        data=arguments.data,
        source_data=arguments.source_data,
        settings=settings,
    )
    outcome = finetune(run)
    if arguments.json:
        print(json.dumps({**run.as_dict(), "metric": find_task(run.task).metric, **outcome.figures()}))
    else:
        print(f"{run.task}, {find_task(run.task).metric}: validation {outcome.validation:.4f}, test {outcome.test:.4f}")
        print(f"{outcome.steps} steps, training loss {outcome.train_loss:.4f} at the end, {outcome.seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
