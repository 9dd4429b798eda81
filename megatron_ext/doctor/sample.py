"""Sample i of a run, token by token, built by the code that builds it in training."""

import dataclasses
from typing import TYPE_CHECKING, Any

from megatron_ext.config import RunConfig
from megatron_ext.doctor.report import Report
from megatron_ext.errors import UserError
from megatron_ext.objective import OBJECTIVES, Objective, Phase
from megatron_ext.run_record import LARGEST_COUNT

if TYPE_CHECKING:
    from megatron_ext.data.batch import MicroBatch
    from megatron_ext.data.tokenizer import Tokenizer
    from megatron_ext.doctor.data import DataQuestion
    from megatron_ext.train.preflight import RunSetup

HEADING = ("prefix", "source_sample", "epoch", "step", "micro_batch", "phase", "objective", "mask_ratio", "attention", "predicted")


def show_sample(config: RunConfig, question: "DataQuestion", report: Report) -> dict[str, Any]:
    """Everything that the model gets of one sample, and what was there before masking.

    Args:
        config: the run.
        question: which sample, and under what.
        report: takes notes.

    Raises:
        UserError: the sample, phase or objective does not exist in this run.
    """
    from megatron_ext.data.loader import BatchBuilder
    from megatron_ext.train.preflight import prepare

    index = question.sample
    if index is None or not 0 <= index <= LARGEST_COUNT:
        raise UserError(f"--sample is {index}: it must lie between 0 and {LARGEST_COUNT}")
    setup = prepare(config, world_size=1)
    step = index // config.training.global_batch_size
    phase = _phase(setup, question, step)
    ratio = phase.mask_ratio(min(max(step, phase.start_step), phase.end_step - 1))
    masking = phase.masking
    if question.ratio is not None:
        masking, ratio = dataclasses.replace(masking, ratio=question.ratio, final_ratio=None), question.ratio
    objective = _objective(setup, question, phase, index)
    if not phase.start_step <= step < phase.end_step:
        report.notes.append(f"sample {index} belongs to step {step}, outside phase {phase.name}: the ratio is that of its edge")
    builder = BatchBuilder(setup.training_data, config.data, setup.vocabulary, config.training.seed)
    batch = builder.build(index, 1, objective, masking, ratio)
    sample = setup.training_data.sample(index)
    source, number = setup.training_data.locate(index)
    documents = [{"length": int(length)} for length in sample.segment_lengths]
    return {
        "index": index,
        "heading": list(HEADING),
        "prefix": config.data.train[source].prefix,
        "source_sample": number,
        "epoch": number // setup.training_data.sources[source].samples_per_epoch,
        "step": step,
        "micro_batch": index // config.training.micro_batch_size,
        "phase": phase.name,
        "objective": objective.name,
        "mask_ratio": ratio if objective.corrupts else None,
        "masking": dataclasses.asdict(masking) if objective.corrupts else None,
        "attention": _attention(batch, len(documents)),
        "causal": batch.causal,
        "segment_lengths": list(batch.segment_lengths),
        "documents": documents,
        "predicted": batch.target_ids.numel(),
        "text": setup.tokenizer.decode(sample.tokens.tolist()),
        "tokens": _rows(batch, sample.tokens.tolist(), [entry["length"] for entry in documents], setup.tokenizer),
    }


def _phase(setup: "RunSetup", question: "DataQuestion", step: int) -> Phase:
    phases = setup.plan.phases
    if question.phase is not None:
        if not 0 <= question.phase < len(phases):
            raise UserError(f"--phase is {question.phase}: the plan has the phases 0 to {len(phases) - 1}")
        return phases[question.phase]
    if step >= setup.plan.total_steps:
        last = setup.plan.total_steps * setup.config.training.global_batch_size - 1
        raise UserError(f"--sample is {question.sample}: the plan ends with sample {last}; name a --phase to look beyond it")
    return setup.plan.phase_at(step)


def _objective(setup: "RunSetup", question: "DataQuestion", phase: Phase, index: int) -> Objective:
    if question.objective == "all":
        raise UserError("--objective is all: a sample is shown under one of clm, mlm and mntp")
    training = setup.config.training
    chosen = question.objective and OBJECTIVES[question.objective]
    objective = chosen or phase.objective(training.seed, index // training.micro_batch_size)
    if objective.corrupts and setup.tokenizer.mask_id is None:
        raise UserError(f"--objective is {objective.name}, but the tokenizer {setup.tokenizer.source} has no mask token")
    return objective


def _attention(batch: "MicroBatch", documents: int) -> str:
    direction = "causal" if batch.causal else "bidirectional"
    runs = len(batch.segment_lengths)
    where = "inside each document" if runs == documents and documents > 1 else "over the whole sample"
    return f"{direction}, {where}"


def _rows(batch: "MicroBatch", tokens: list[int], lengths: list[int], tokenizer: "Tokenizer") -> list[dict[str, Any]]:
    """One entry for each row of the sample."""
    objective, inputs = batch.objective, batch.input_ids.tolist()
    targets = dict(zip(batch.target_positions.tolist(), batch.target_ids.tolist(), strict=True))
    hidden = {row + objective.predicts_next for row in targets} if objective.corrupts else set()
    document_of = [number for number, length in enumerate(lengths) for _ in range(length)]
    return [
        {
            "row": row,
            "document": document_of[row],
            "position": position,
            "input_id": inputs[row],
            "input": tokenizer.piece(inputs[row]),
            "original_id": tokens[row],
            "original": tokenizer.piece(tokens[row]),
            "state": _state(row in hidden, inputs[row], tokens[row], tokenizer.mask_id),
            "target_id": targets.get(row),
            "target": tokenizer.piece(targets[row]) if row in targets else None,
        }
        for row, position in enumerate(batch.position_ids.tolist())
    ]


def _state(is_hidden: bool, input_id: int, original_id: int, mask_id: int | None) -> str:
    """`shown` as it is, or hidden: `masked`, replaced at `random`, or `kept` and predicted all the same."""
    if not is_hidden:
        return "shown"
    return "masked" if input_id == mask_id else "kept" if input_id == original_id else "random"
