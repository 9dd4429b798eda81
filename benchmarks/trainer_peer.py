"""transformers' own `Trainer` as a contender: its loop makes a step when asked, and waits otherwise."""

import queue
import tempfile
import threading
from contextlib import ExitStack
from typing import Any

STEPS = 1_000
"""More than a benchmark asks for."""


def trainer_step(model: Any, tokens: Any, labels: Any, learning_rate: float, clip: float, stack: ExitStack) -> Any:
    """Start `Trainer.train` in a thread; returns what lets it make a step and gives the loss before it.

    Args:
        model: a model of transformers.
        tokens: [b, s] int64, the same batch for every step.
        labels: [b, s] int64.
        learning_rate: of AdamW, fused, constant.
        clip: of the gradients' norm.
        stack: ends the thread and removes its folder.
    """
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    wanted: queue.Queue[bool] = queue.Queue()
    made: queue.Queue[float | BaseException] = queue.Queue()
    reached: queue.Queue[bool] = queue.Queue()
    losses: list[Any] = []

    class Turns(TrainerCallback):
        """Holds the loop before each step."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **other: Any) -> None:
            reached.put(True)
            if not wanted.get():
                raise KeyboardInterrupt

        def on_step_end(self, args: Any, state: Any, control: Any, **other: Any) -> None:
            made.put(losses.pop().item())

    class Noting(Trainer):
        """Keeps the loss, which `Trainer` only adds up."""

        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            loss = super().compute_loss(*arguments, **options)
            losses.append(loss.detach())
            return loss

        def _get_train_sampler(self, *arguments: Any, **options: Any) -> Any:
            return SequentialSampler(rows)

    arguments = TrainingArguments(
        output_dir=stack.enter_context(tempfile.TemporaryDirectory()),
        per_device_train_batch_size=len(tokens),
        max_steps=STEPS,
        optim="adamw_torch_fused",
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=clip,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)] * STEPS
    trainer = Noting(model=model, args=arguments, train_dataset=rows, callbacks=[Turns()])

    def run() -> None:
        try:
            trainer.train()
        except BaseException as error:  # handed to whoever waits for a step
            made.put(error)

    threading.Thread(target=run, daemon=True).start()
    stack.callback(wanted.put, False)
    reached.get()

    def step() -> float:
        wanted.put(True)
        found = made.get()
        if isinstance(found, BaseException):
            raise found
        reached.get()  # it has fetched its next batch, which belongs to a step as much as the rest
        return found

    return step
