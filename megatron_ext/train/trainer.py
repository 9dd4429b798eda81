"""The training run: set up, loop, and what happens between steps."""

import functools
import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_ext.checkpoint_files import read_run_file, step_of
from megatron_ext.config import RunConfig
from megatron_ext.data.loader import BatchBuilder, StepData, TrainingLoader
from megatron_ext.errors import say
from megatron_ext.model.encoder import EncoderModel
from megatron_ext.model.fp8_emulation import end_step
from megatron_ext.runtime.allocator import keep_freed_memory
from megatron_ext.runtime.cpu import patch_megatron
from megatron_ext.runtime.precision import emulation_notice
from megatron_ext.runtime.topology import default_group, process_groups, rank_from_environment, world_size_from_environment
from megatron_ext.runtime.userbuffers import start_userbuffers
from megatron_ext.runtime.watchdog import Watchdog
from megatron_ext.train.agreement import Agreement
from megatron_ext.train.batch_log import BatchLog
from megatron_ext.train.build import build_model, whole_weights, wrap_model
from megatron_ext.train.changes import as_records, check_changes
from megatron_ext.train.checkpoint import load_checkpoint
from megatron_ext.train.environment import prepare_together
from megatron_ext.train.folder_lock import held_by_this_run
from megatron_ext.train.metrics import Counters, SpeedMeter, peak_flops, step_flops
from megatron_ext.train.optimizer import (
    build_optimizer,
    count_skipped,
    learning_rate,
    reset_optimizer_state,
    set_learning_rate,
    update,
)
from megatron_ext.train.preflight import RunSetup, prepare
from megatron_ext.train.progress import progress_record
from megatron_ext.train.resume import check_resume, checkpoint_folder, choose_checkpoint, is_same_run, require_sound
from megatron_ext.train.retention import is_due, note_branch
from megatron_ext.train.saves import Saves
from megatron_ext.train.saving import CheckpointSaver
from megatron_ext.train.skipped import SkippedSteps
from megatron_ext.train.start import INHERITED, Start, as_parent
from megatron_ext.train.step import run_schedule
from megatron_ext.train.stopping import EXIT_HANG, EXIT_STOPPED, StopRequest
from megatron_ext.train.tracking import Status, Trackers, build_trackers
from megatron_ext.train.validation import validate
from megatron_ext.train.window import Window

SECONDS_AFTER_WATCHDOG = 60
"""The process groups give up this much later than the watchdog, which knows the culprit."""


def train(config: RunConfig) -> int:
    """Run the configured plan, or what is left of it.

    Returns:
        The exit code: 0, or `EXIT_STOPPED` if a signal asked the run to stop and it was saved.

    Raises:
        UserError: the configuration does not fit the data, the machine or the checkpoint.
    """
    with default_group(group_timeout(config)):
        agreement = Agreement(group_timeout(config))
        setup = prepare_together(config, agreement, functools.partial(_prepare, config))
        use_all_cores()
        if setup.backend.device.type == "cpu":
            keep_freed_memory()
        patch_megatron()
        return _train(setup, agreement)


def _prepare(config: RunConfig) -> RunSetup:
    setup = prepare(config, world_size_from_environment())
    check_resume(config)
    notice = emulation_notice(config.precision)
    if notice and rank_from_environment() == 0:
        say(notice)
    return setup


def _train(setup: RunSetup, agreement: Agreement) -> int:
    """What `train` does once the ranks have found each other alike."""
    config = setup.config
    groups = process_groups(setup.layout, setup.backend, group_timeout(config))
    timeout = 60 * config.training.timeout_minutes
    held = held_by_this_run(Path(config.output_dir))
    with StopRequest() as stop, groups, Watchdog(timeout, EXIT_HANG) as watchdog, held:
        checkpoint = choose_checkpoint(config, watchdog.mark)
        record = _continue_from(setup, checkpoint) if checkpoint else None
        start = setup.start if checkpoint is None else None
        if start:
            require_sound(start.checkpoint, watchdog.mark)
        trackers = build_trackers(config, setup.plan.total_steps, record or _new_run(start), rank_from_environment() == 0)
        watchdog.at_end = functools.partial(trackers.finish, "FAILED")
        status: Status = "FAILED"
        try:
            trainer = Trainer.build(setup, agreement, trackers, watchdog, stop)
            if checkpoint and record:
                trainer.restore(checkpoint, record)
            elif start:
                trainer.begin_from(start)
            status = trainer.run()
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            trackers.finish(status)
    return EXIT_STOPPED if status == "KILLED" else 0


def group_timeout(config: RunConfig) -> timedelta:
    """The time-out of all process groups."""
    return timedelta(minutes=config.training.timeout_minutes, seconds=SECONDS_AFTER_WATCHDOG)


def _continue_from(setup: RunSetup, checkpoint: Path) -> dict[str, Any]:
    """What the checkpoint says of its run, once it is clear that this run may go on from there."""
    record = read_run_file(checkpoint)
    changes = check_changes(setup, record)
    if rank_from_environment() == 0:
        for change in changes:
            say(f"resume: {change}")
    record = {**record, "changes": [*record.get("changes", []), *as_records(changes, record["step"])]}
    if is_same_run(setup.config, checkpoint):
        return record
    if rank_from_environment() == 0:
        note_branch(checkpoint, setup.config)
    return branch_of(record, checkpoint)


def _new_run(start: Start | None) -> dict[str, Any] | None:
    """What the trackers are told of a run that begins with the weights of another."""
    return start and {"step": 0, "mlflow_run_id": None, "run_key": None, **start.inheritance()}


def branch_of(record: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """What a run that starts from another run's checkpoint takes over: all but that run's identity, which becomes its parent."""
    return {**record, "mlflow_run_id": None, "run_key": None, "parent": as_parent(checkpoint, record)}


def use_all_cores() -> None:
    """Share the cores among this machine's ranks.

    torchrun sets one thread a rank unless OMP_NUM_THREADS is given; another value than 1 is left as it is.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


@dataclass
class Trainer:
    """The live objects of a run."""

    setup: RunSetup
    trackers: Trackers
    watchdog: Watchdog
    stop: StopRequest
    chunks: list[torch.nn.Module]
    """Model chunks wrapped for data parallelism."""
    bare_chunks: list[EncoderModel]
    """The same without their wrappers."""
    optimizer: Any
    loader: TrainingLoader
    agreement: Agreement
    saves: Saves
    skipped: SkippedSteps
    speed: SpeedMeter
    batch_log: BatchLog | None
    data_rank: int
    counters: Counters = field(default_factory=Counters)
    step: int = 0
    """Completed steps."""
    inherited: dict[str, Any] = field(default_factory=lambda: dict(INHERITED))
    """Where the run comes from, and what changed in its configuration when it was continued."""
    is_stopping: bool = False
    """A signal has come to some rank."""

    @classmethod
    def build(cls, setup: RunSetup, agreement: Agreement, trackers: Trackers, watchdog: Watchdog, stop: StopRequest) -> "Trainer":
        """Build model, optimizer and loader; the process groups must exist."""
        config = setup.config
        watchdog.mark("building the model")
        start_userbuffers(setup.layout, setup.tokens_per_batch, setup.encoder.hidden_size, config.precision)
        bare = build_model(
            setup.encoder,
            setup.vocab_size,
            setup.layout,
            setup.backend,
            setup.dtype,
            config.training.seed,
            config.precision,
            config.training.recompute,
        )
        chunks = wrap_model(bare, setup.layout)
        optimizer = build_optimizer(config.optimizer, chunks, setup.dtype, setup.layout.distributed_optimizer, config.precision)
        rank = parallel_state.get_data_parallel_rank()
        builder = BatchBuilder(setup.training_data, config.data, setup.vocabulary, config.training.seed)
        folder = checkpoint_folder(config)
        return cls(
            setup=setup,
            trackers=trackers,
            watchdog=watchdog,
            stop=stop,
            chunks=chunks,
            bare_chunks=bare,
            optimizer=optimizer,
            loader=TrainingLoader(builder, setup.plan, config.training, rank, setup.layout.data),
            agreement=agreement,
            saves=Saves(folder, setup, CheckpointSaver(folder, setup, bare, optimizer, agreement), trackers, watchdog.mark),
            skipped=SkippedSteps(Path(config.output_dir), config.training.max_skipped_steps),
            speed=SpeedMeter(_total_peak(setup)),
            batch_log=_batch_log(setup, rank),
            data_rank=rank,
        )

    def restore(self, checkpoint: Any, record: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.watchdog.mark(f"loading {checkpoint}")
        load_checkpoint(checkpoint, self.bare_chunks, self.optimizer)
        self.step = record["step"]
        self.inherited = {name: record.get(name, value) for name, value in INHERITED.items()}
        self.counters = Counters(**{name: record.get(name, 0) for name in Counters().as_dict()})
        self.skipped.in_a_row = record.get("skipped_in_a_row", 0)

    def begin_from(self, start: Start) -> None:
        """Take another checkpoint's weights; the optimizer starts anew, from these weights as this run's precision has them."""
        self.watchdog.mark(f"loading {start.checkpoint}")
        load_checkpoint(start.checkpoint, self.bare_chunks, None)
        self.optimizer.reload_model_params()
        self.inherited = start.inheritance()
        if step_of(start.checkpoint) >= 0 and rank_from_environment() == 0:
            note_branch(start.checkpoint, self.setup.config)

    def run(self) -> Status:
        """Run the steps that are left, or until a signal comes."""
        last = self.setup.config.training.stop_at_step or self.setup.plan.total_steps
        if self.step == last and rank_from_environment() == 0:
            say(f"step {self.step} of {last}: nothing is left to do")
        try:
            self._loop(last)
            self.saves.finish(is_last=True)
        except BaseException:
            self.saves.abandon()
            raise
        if self.is_stopping and self.step < last:
            self._tell_stopped()
            return "KILLED"
        return "FINISHED" if self.step == self.setup.plan.total_steps else "SCHEDULED"

    def _loop(self, last: int) -> None:
        plan, config = self.setup.plan, self.setup.config
        self.speed.start()
        window = Window(self.setup.backend.device)
        for data in self.loader.prefetch(self.step, last):
            phase = plan.phase_at(data.step)
            if phase.resets_optimizer and data.step == phase.start_step:
                reset_optimizer_state(self.optimizer)
            rate = learning_rate(config.optimizer, plan, data.step)
            set_learning_rate(self.optimizer, config.optimizer, rate)
            self.train_step(data, window)
            self.step = data.step + 1
            ends = self.is_stopping or self.step == last
            saves = ends or self.saves.is_due(self.step)
            logs = saves or is_due(self.step, config.training.log_interval)
            is_regular = is_due(self.step, config.validation.interval) and not self.is_stopping
            validates = is_regular or self.step in (phase.end_step, last)
            if logs or validates or window.is_full:
                self._settle(window)
            if logs:
                self._log(window, rate)
                window = Window(self.setup.backend.device)
            if validates:
                self._validate()
            if saves:
                self._save(ends)
            if ends:
                return
            self.watchdog.mark(f"waiting for the data of step {self.step + 1}")

    def train_step(self, data: StepData, window: Window) -> None:
        """Forward, backward and, if loss and gradients are finite on all ranks, update over this rank's micro-batches.

        Args:
            data: the micro-batches.
            window: takes what the step comes to; nothing here waits for the device to know it.
        """
        mark = functools.partial(self.watchdog.mark, f"running step {data.step + 1}")
        if self.batch_log:
            self.batch_log.write(data, self.setup.plan.phase_at(data.step).name)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = run_schedule(self.chunks, data.micro_batches, self.setup.tokens_per_batch, self.setup.backend.device, False, mark)
        norm, is_bad = update(self.optimizer, sums)
        window.add(data, sums, norm, is_bad)
        end_step(self.chunks, is_bad)
        self.is_stopping, is_writing = self.agreement.any(self.stop.came, self.saves.is_writing)
        if self.saves.can_publish(is_writing):
            self._settle(window)  # or the time of steps that the device has yet to do would count as that of publishing
        with self.speed.pause():
            self.saves.collect(is_writing)

    def _settle(self, window: Window) -> None:
        """Learn how the steps went; waits for the device."""
        skipped = window.settle(self.skipped)
        self.counters.skipped_steps += skipped
        count_skipped(self.optimizer, skipped)

    def _log(self, window: Window, rate: float) -> None:
        """Sum the window up over the ranks, count it and log it."""
        sums = window.sums.reduce()
        flops = step_flops(self.setup.encoder, self.setup.vocab_size, sums)
        self.counters.add(sums, window.steps * self.setup.config.training.global_batch_size, flops)
        phase = self.setup.plan.phase_at(self.step - 1)
        predicted = sum(sums.predicted.values())
        losses = {"loss": sum(sums.losses.values()) / predicted} if predicted else {}
        metrics = {
            **losses,
            **{f"loss/{name}": loss for name, loss in sums.mean_losses().items()},
            "learning_rate": rate,
            "gradient_norm": window.gradient_norm,
            **self.speed.read(sums, flops, window.steps),
            **{f"total/{name}": value for name, value in self.counters.as_dict().items()},
            "phase_index": phase.index,
        }
        self.trackers.log(self.step, metrics, phase.name)

    def _validate(self) -> None:
        if self.setup.validation_data is None:
            return
        phase = self.setup.plan.phase_at(self.step - 1)
        mark = functools.partial(self.watchdog.mark, f"validating after step {self.step}")
        with self.speed.pause(), whole_weights(self.chunks):
            losses = validate(self.setup, self.chunks, phase, self.step - 1, self.data_rank, mark)
        self.trackers.log(self.step, losses, phase.name)

    def _save(self, is_last: bool) -> None:
        self.watchdog.mark(f"saving after step {self.step}")
        record = {
            **progress_record(self.setup, self.step),
            **self.counters.as_dict(),
            "skipped_in_a_row": self.skipped.in_a_row,
            **self.inherited,
            **self.trackers.identity(),
        }
        with self.speed.pause(), whole_weights(self.chunks):
            self.saves.save(record, is_last)

    def _tell_stopped(self) -> None:
        if rank_from_environment() == 0:
            name = self.stop.signal_name or "a signal to another rank"
            say(f"stopped by {name} after step {self.step}, which was saved: --resume auto continues it")


def _batch_log(setup: RunSetup, rank: int) -> BatchLog | None:
    """One rank of each model replica keeps it."""
    ranks = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank())
    is_first = ranks == (0, 0) and parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    if not (setup.config.training.log_batches and is_first):
        return None
    return BatchLog(Path(setup.config.output_dir), setup.training_data, rank)


def _total_peak(setup: RunSetup) -> float:
    """FLOP/s of all ranks together, measured at the same time on a CPU, since they share its cores."""
    torch.distributed.barrier()
    rate = torch.tensor(peak_flops(setup.backend.device), dtype=torch.float64, device=setup.backend.device)
    torch.distributed.all_reduce(rate)
    return float(rate)
