"""From the global sample cursor to this rank's micro-batches, with the objective applied, prefetched by a thread.

Step n consumes the samples [n B, (n + 1) B) of the run, B being the global batch size. Micro-batch m of data-parallel rank r
of d holds the samples n B + (m d + r) b ... + b - 1. Every rank of a model replica reads the same micro-batches.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ext.config import DataConfig, MaskingConfig, TrainingConfig
from megatron_ext.data.batch import MicroBatch, collate
from megatron_ext.data.dataset import Sample, SampleSource
from megatron_ext.errors import UserError
from megatron_ext.objective import MASK_STREAM, Objective, PhasePlan, Vocabulary, make_example, random_generator

STEPS_AHEAD = 2


@dataclass(frozen=True)
class StepData:
    """The micro-batches that one data-parallel rank runs in one optimizer step."""

    step: int
    micro_batches: list[MicroBatch]
    samples: list[range]
    """Global indices of the samples in each micro-batch."""


class BatchBuilder:
    """Builds micro-batches from samples: the same ones for the same sample indices, whoever asks."""

    def __init__(self, source: SampleSource, data: DataConfig, vocabulary: Vocabulary, seed: int, stream: int = MASK_STREAM):
        """
        Args:
            source: where samples come from.
            data: packing.
            vocabulary: for masking.
            seed: the run's seed.
            stream: random stream of the masks.
        """
        self._source, self._data, self._vocabulary = source, data, vocabulary
        self._seed, self._stream = seed, stream

    def build(self, first_sample: int, count: int, objective: Objective, masking: MaskingConfig, ratio: float) -> MicroBatch:
        """The micro-batch of samples first_sample ... first_sample + count - 1.

        Raises:
            UserError: a sample holds an id that the tokenizer does not have.
        """
        samples = [self._source.sample(first_sample + k) for k in range(count)]
        for sample in samples:
            check_ids(sample, len(self._vocabulary.is_special))
        examples = [
            make_example(
                sample.tokens,
                sample.segment_lengths,
                objective,
                masking,
                ratio,
                self._vocabulary,
                random_generator(self._seed, self._stream, first_sample + k),
            )
            for k, sample in enumerate(samples)
        ]
        return collate(
            examples,
            [sample.segment_lengths for sample in samples],
            objective,
            documents_attend_across=self._data.documents_attend_across,
            restart_positions=self._data.restart_positions,
        )


def check_ids(sample: Sample, vocab_size: int) -> None:
    """A data set that was not made here may belong to another tokenizer: its ids must not train silently.

    Raises:
        UserError: the sample holds an id that the tokenizer does not have.
    """
    for token in (int(sample.tokens.min()), int(sample.tokens.max())):
        if not 0 <= token < vocab_size:
            raise UserError(
                f"the data holds the token id {token}, but data.tokenizer has {vocab_size} ids: it was made with another tokenizer"
            )


class TrainingLoader:
    """Micro-batches of training steps for one data-parallel rank."""

    def __init__(self, builder: BatchBuilder, plan: PhasePlan, training: TrainingConfig, rank: int, ranks: int):
        """
        Args:
            builder: builds the micro-batches.
            plan: gives each step its phase.
            training: batch sizes and seed.
            rank: this process's data-parallel rank.
            ranks: the data-parallel size.
        """
        self._builder, self._plan, self._training = builder, plan, training
        self._rank, self._ranks = rank, ranks

    def load(self, step: int) -> StepData:
        """The micro-batches of one step. Depends on nothing but the arguments and the configuration."""
        phase, size = self._plan.phase_at(step), self._training.micro_batch_size
        per_rank = self._training.global_batch_size // (size * self._ranks)
        batches, samples = [], []
        for number in range(per_rank):
            first = step * self._training.global_batch_size + (number * self._ranks + self._rank) * size
            objective = phase.objective(self._training.seed, first // size)
            batches.append(self._builder.build(first, size, objective, phase.masking, phase.mask_ratio(step)))
            samples.append(range(first, first + size))
        return StepData(step, batches, samples)

    def prefetch(self, first_step: int, end_step: int) -> Iterator[StepData]:
        """Steps [first_step, end_step) in order, built by a thread that stays a few steps ahead.

        The thread ends with the iterator; an error in it is raised here.
        """
        ready: queue.Queue[StepData | Exception] = queue.Queue(maxsize=STEPS_AHEAD)
        stopped = threading.Event()

        def work() -> None:
            try:
                for step in range(first_step, end_step):
                    if not _put(ready, self.load(step), stopped):
                        return
            except Exception as error:  # handed to the consumer, whatever it is
                _put(ready, error, stopped)

        thread = threading.Thread(target=work, name="data-loader", daemon=True)
        thread.start()
        try:
            for _ in range(first_step, end_step):
                item = ready.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()


def _put(ready: queue.Queue, item: object, stopped: threading.Event) -> bool:
    """Wait for room; False if nobody wants the item any more."""
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
