"""The training run: set up, loop, and what happens between steps."""

import math
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_ext.checkpoint_files import read_run_file
from megatron_ext.config import RunConfig
from megatron_ext.data.loader import BatchBuilder, TrainingLoader
from megatron_ext.errors import UserError
from megatron_ext.model.encoder import EncoderModel
from megatron_ext.objective import OBJECTIVES
from megatron_ext.runtime.cpu import patch_megatron
from megatron_ext.runtime.topology import process_groups, rank_from_environment, world_size_from_environment
from megatron_ext.train.build import build_model, wrap_model
from megatron_ext.train.checkpoint import load_checkpoint, remove_old_checkpoints, save_checkpoint
from megatron_ext.train.metrics import Counters, SpeedMeter, peak_flops, step_flops
from megatron_ext.train.optimizer import build_optimizer, learning_rate, reset_optimizer_state, set_learning_rate
from megatron_ext.train.preflight import RunSetup, prepare
from megatron_ext.train.resume import (
    check_agreement,
    check_continues,
    checkpoint_folder,
    comparison_ratio,
    find_checkpoint,
    is_same_run,
)
from megatron_ext.train.step import Sums, run_schedule
from megatron_ext.train.tracking import Status, Trackers, build_trackers
from megatron_ext.train.validation import validate


def train(config: RunConfig) -> None:
    """Run the configured plan, or what is left of it.

    Raises:
        UserError: the configuration does not fit the data, the machine or the checkpoint.
    """
    setup = prepare(config, world_size_from_environment())
    checkpoint = find_checkpoint(config)
    record = read_run_file(checkpoint) if checkpoint else None
    if record is not None:
        check_continues(setup, record)
        if not is_same_run(config, checkpoint):
            record = branch_of(record, checkpoint)
    use_all_cores()
    patch_megatron()
    with process_groups(setup.layout, setup.backend):
        check_agreement(checkpoint)
        trackers = build_trackers(config, setup.plan.total_steps, record, rank_from_environment() == 0)
        status: Status = "FAILED"
        try:
            signal.signal(signal.SIGTERM, _stop_on_signal)
            trainer = Trainer.build(setup, trackers)
            if checkpoint and record:
                trainer.restore(checkpoint, record)
            status = trainer.run()
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            trackers.finish(status)


def branch_of(record: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """What a run that starts from another run's checkpoint takes over: all but that run's identity, which becomes its parent."""
    parent = {"checkpoint": str(checkpoint), "step": record["step"], "mlflow_run_id": record["mlflow_run_id"]}
    return {**record, "mlflow_run_id": None, "run_key": None, "parent": parent}


def use_all_cores() -> None:
    """Share the cores among this machine's ranks.

    torchrun sets one thread a rank unless OMP_NUM_THREADS is given; another value than 1 is left as it is.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _stop_on_signal(number: int, frame: object) -> None:
    sys.exit(128 + number)


@dataclass
class Trainer:
    """The live objects of a run."""

    setup: RunSetup
    trackers: Trackers
    chunks: list[torch.nn.Module]
    """Model chunks wrapped for data parallelism."""
    bare_chunks: list[EncoderModel]
    """The same without their wrappers."""
    optimizer: Any
    loader: TrainingLoader
    speed: SpeedMeter
    data_rank: int
    counters: Counters = field(default_factory=Counters)
    step: int = 0
    """Completed steps."""
    parent: dict[str, Any] | None = None
    """The checkpoint of another run that this one branched from."""

    @classmethod
    def build(cls, setup: RunSetup, trackers: Trackers) -> "Trainer":
        """Build model, optimizer and loader; the process groups must exist."""
        config = setup.config
        bare = build_model(setup.encoder, setup.vocab_size, setup.layout, setup.backend, setup.dtype, config.training.seed)
        chunks = wrap_model(bare, setup.layout.distributed_optimizer)
        rank = parallel_state.get_data_parallel_rank()
        builder = BatchBuilder(setup.training_data, config.data, setup.vocabulary, config.training.seed)
        return cls(
            setup=setup,
            trackers=trackers,
            chunks=chunks,
            bare_chunks=bare,
            optimizer=build_optimizer(config.optimizer, chunks, setup.dtype, setup.layout.distributed_optimizer),
            loader=TrainingLoader(builder, setup.plan, config.training, rank, setup.layout.data),
            speed=SpeedMeter(_total_peak(setup)),
            data_rank=rank,
        )

    def restore(self, checkpoint: Any, record: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        load_checkpoint(checkpoint, self.bare_chunks, self.optimizer)
        self.step = record["step"]
        self.parent = record["parent"]
        self.counters = Counters(**{name: record[name] for name in Counters().as_dict()})

    def run(self) -> Status:
        """Run the steps that are left."""
        plan, config = self.setup.plan, self.setup.config
        last = config.training.stop_at_step or plan.total_steps
        self.speed.start()
        if self.step == last and rank_from_environment() == 0:
            print(f"step {self.step} of {last}: nothing is left to do", file=sys.stderr)
        window = Sums(self.setup.backend.device)
        window_steps = 0
        for data in self.loader.prefetch(self.step, last):
            phase = plan.phase_at(data.step)
            if phase.resets_optimizer and data.step == phase.start_step:
                reset_optimizer_state(self.optimizer)
            rate = learning_rate(config.optimizer, plan, data.step)
            set_learning_rate(self.optimizer, config.optimizer, rate)
            sums, gradient_norm = self.train_step(data.micro_batches)
            window.merge(sums)
            window_steps += 1
            self.step = data.step + 1
            is_edge = self.step in (phase.end_step, last)
            if is_edge or _is_due(self.step, config.training.log_interval) or self._saves():
                self._read(window, window_steps, {"learning_rate": rate, "gradient_norm": gradient_norm})
                window, window_steps = Sums(self.setup.backend.device), 0
            if is_edge or _is_due(self.step, config.validation.interval):
                self._validate()
            if is_edge or self._saves():
                self._save()
        return "FINISHED" if self.step == plan.total_steps else "SCHEDULED"

    def train_step(self, batches: list[Any]) -> tuple[Sums, float]:
        """Forward, backward and update over this rank's micro-batches.

        Returns:
            This rank's sums, and the global gradient norm before clipping.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = run_schedule(self.chunks, batches, self._tokens_per_batch, self.setup.backend.device, forward_only=False)
        _, gradient_norm, _ = self.optimizer.step()
        if not math.isfinite(gradient_norm):
            # The norm is global, so every rank stops here, and the last checkpoint is from before the bad update.
            raise UserError(
                f"the gradient norm of step {self.step + 1} is {gradient_norm}: training stopped before anything was saved; "
                "a lower optimizer.learning_rate or a longer warmup usually helps"
            )
        return sums, float(gradient_norm)

    @property
    def _tokens_per_batch(self) -> int:
        return self.setup.config.training.micro_batch_size * self.setup.config.data.sequence_length

    def _saves(self) -> bool:
        return _is_due(self.step, self.setup.config.checkpoint.interval)

    def _read(self, window: Sums, steps: int, metrics: dict[str, float]) -> None:
        """Sum the window up over the ranks, count it and log it."""
        sums = window.reduce()
        flops = step_flops(self.setup.encoder, self.setup.vocab_size, sums)
        self.counters.add(sums, steps * self.setup.config.training.global_batch_size, flops)
        phase = self.setup.plan.phase_at(self.step - 1)
        predicted = sum(sums.predicted.values())
        metrics = {
            "loss": sum(sums.losses.values()) / max(1, predicted),
            **{f"loss/{name}": loss for name, loss in sums.mean_losses().items()},
            **metrics,
            **self.speed.read(sums, flops, steps),
            **{f"total/{name}": value for name, value in self.counters.as_dict().items()},
            "phase_index": phase.index,
        }
        self.trackers.log(self.step, metrics, phase.name)

    def _validate(self) -> None:
        if self.setup.validation_data is None:
            return
        phase = self.setup.plan.phase_at(self.step - 1)
        with self.speed.pause():
            losses = validate(self.setup, self.chunks, phase, self.step - 1, self.data_rank)
        self.trackers.log(self.step, losses, phase.name)

    def _save(self) -> None:
        folder = checkpoint_folder(self.setup.config)
        with self.speed.pause():
            save_checkpoint(folder, self.setup, self._record(), self.bare_chunks, self.optimizer)
            if rank_from_environment() == 0:
                edges = {phase.end_step for phase in self.setup.plan.phases}
                remove_old_checkpoints(folder, self.setup.config.checkpoint.keep_last, edges)

    def _record(self) -> dict[str, Any]:
        """What `run.json` says of the progress."""
        plan = self.setup.plan
        phase = plan.phase_at(self.step - 1)
        return {
            "step": self.step,
            "phase": phase.name,
            "causal": all(OBJECTIVES[name].causal for name in phase.weights),
            **self.counters.as_dict(),
            "phases": [
                {
                    "name": p.name,
                    "start_step": p.start_step,
                    "end_step": p.end_step,
                    "objectives": p.weights,
                    "masking": vars(p.masking),
                }
                for p in plan.phases
            ],
            "comparison_mask_ratio": comparison_ratio(self.setup),
            "parent": self.parent,
            **self.trackers.identity(),
        }


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _total_peak(setup: RunSetup) -> float:
    """FLOP/s of all ranks together, measured at the same time on a CPU, since they share its cores."""
    torch.distributed.barrier()
    rate = torch.tensor(peak_flops(setup.backend.device), dtype=torch.float64, device=setup.backend.device)
    torch.distributed.all_reduce(rate)
    return float(rate)
