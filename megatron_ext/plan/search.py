"""The best layout, batch and numbers for a run on so many GPUs: every candidate is checked, weighed and timed.

The global batch, the phase plan and the model stay as configured. What is searched: tensor, pipeline (interleaved or not), context
and with them data parallelism, the micro-batch, recomputation, bfloat16 against one FP8 recipe.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_ext.config import ParallelConfig, PrecisionConfig, Recipe, RunConfig, TrainingConfig
from megatron_ext.errors import UserError
from megatron_ext.model.presets import EncoderConfig, build_encoder_config
from megatron_ext.plan.execution import Execution
from megatron_ext.plan.hardware import Gpu
from megatron_ext.plan.memory import RankMemory, rank_memory
from megatron_ext.plan.phases import PhaseWork, phase_works
from megatron_ext.plan.speed import Prediction, predict
from megatron_ext.runtime.precision import check_precision
from megatron_ext.runtime.topology import Layout, check_layout

USABLE_MEMORY = 0.92
"""Share of a GPU's memory: CUDA's context, NCCL's buffers and fragmentation have the rest."""
SHORTEST_SLICE = 512
"""Tokens that context parallelism leaves on a rank, at least."""
MOST_CHUNKS = 4
LARGEST_MICRO_BATCH = 64
RECOMPUTATIONS = ("none", "attention", "full")


@dataclass(frozen=True)
class Candidate:
    """One way to run the plan that fits, and what it costs."""

    parallel: ParallelConfig
    training: TrainingConfig
    precision: PrecisionConfig
    layout: Layout
    memory: RankMemory | None = None
    """Of the fuller of the first and the last stage, in the most demanding phase."""
    predictions: tuple[tuple[PhaseWork, Prediction], ...] = ()
    """Each phase's objectives with a step of each."""

    @property
    def seconds(self) -> float:
        """The whole plan."""
        return sum(work.steps * prediction.seconds for work, prediction in self.predictions)

    @property
    def tokens(self) -> float:
        """Tokens of the whole plan."""
        return sum(work.steps * p.run.global_batch * p.work.sequence for work, p in self.predictions)

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU, over the whole plan."""
        return self.tokens / self.seconds / self.layout.world_size

    @property
    def mfu(self) -> float:
        """Over the whole plan, in units of the recipe's data-sheet rate."""
        _, first = self.predictions[0]
        flops = sum(work.steps * p.run.global_batch * p.work.sequence * p.work.flops_per_token() for work, p in self.predictions)
        return flops / self.seconds / self.layout.world_size / first.gpu.peak(first.run.is_fp8)

    def share(self, *parts: str) -> float:
        """Share of the plan's time that these parts of a step take."""
        return sum(w.steps * sum(getattr(p.parts, name) for name in parts) for w, p in self.predictions) / self.seconds


@dataclass
class Search:
    """What was found."""

    config: RunConfig
    gpu: Gpu
    gpus: int
    found: list[Candidate] = field(default_factory=list)
    """All that fit, fastest first."""
    too_large: list[Candidate] = field(default_factory=list)
    """Those that do not fit; larger micro-batches of a layout that does not fit even with full recomputation are not tried."""
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Fields that the layout check complained of: how often, and its last words."""

    @property
    def room(self) -> float:
        """Usable bytes of a GPU."""
        return self.gpu.memory * USABLE_MEMORY


def fp8_recipe(gpu: Gpu, configured: Recipe) -> Recipe | None:
    """The FP8 recipe that is held against bfloat16: the configured one, else the simplest of the GPU; None without FP8."""
    if not gpu.fp8_peak:
        return None
    blackwell = gpu.name.startswith("b")
    if configured.startswith("fp8") or (configured == "mxfp8" and blackwell):
        return configured
    return "mxfp8" if blackwell else "fp8-tensorwise"


def search(config: RunConfig, vocab_size: int, gpus: int, gpu: Gpu, document: float | None = None) -> Search:
    """Try every layout on these GPUs.

    Args:
        config: the run; its global batch and plan stay.
        vocab_size: ids that belong to tokens.
        gpus: all of them.
        gpu: their kind.
        document: mean length of the run of tokens that a token belongs to; None: the whole sample.

    Raises:
        UserError: nothing fits.
    """
    encoder = build_encoder_config(config.model)
    works = phase_works(config, encoder, vocab_size, document)
    result = Search(config, gpu, gpus)
    full: set[tuple[Layout, str]] = set()
    for parallel, training, layout in _layouts(config, encoder, gpus, gpu, result):
        for precision in _precisions(config, gpu):
            place, candidate = (layout, precision.recipe), Candidate(parallel, training, precision, layout)
            if place in full or not _is_allowed(encoder, candidate, config, gpu):
                continue
            if not _try(result, encoder, works, candidate):
                full.add(place)
    result.found.sort(key=lambda candidate: candidate.seconds)
    if not result.found:
        raise UserError(_nothing(result))
    return result


def _nothing(result: Search) -> str:
    if not result.too_large:
        _, complaint = max(result.refused.values(), default=(0, "no size fits"))
        return f"no layout on {result.gpus} GPUs is allowed: {complaint}"
    needed = min(candidate.memory.total for candidate in result.too_large)
    return (
        f"nothing fits on {result.gpus} GPUs of {result.room / 2**30:.0f} usable GiB: the smallest layout needs "
        f"{needed / 2**30:.1f} GiB a GPU; use more GPUs"
    )


def _precisions(config: RunConfig, gpu: Gpu) -> Iterator[PrecisionConfig]:
    for recipe in ("bf16", fp8_recipe(gpu, config.precision.recipe)):
        if recipe is not None:
            fp8_parameters = config.precision.fp8_parameters and recipe != "bf16"
            yield dataclasses.replace(config.precision, recipe=recipe, emulation=False, fp8_parameters=fp8_parameters)


def _layouts(
    config: RunConfig, encoder: EncoderConfig, gpus: int, gpu: Gpu, result: Search
) -> Iterator[tuple[ParallelConfig, TrainingConfig, Layout]]:
    for tensor, pipeline, context in _sizes(config, encoder, gpus, gpu):
        ranks = gpus // (tensor * pipeline * context)
        for chunks in _divisors(encoder.num_layers // pipeline) if pipeline > 1 else [1]:
            if chunks > MOST_CHUNKS:
                continue
            for micro in _micro_batches(config.training.global_batch_size, ranks):
                parallel = ParallelConfig(
                    tensor=tensor,
                    pipeline=pipeline,
                    virtual_pipeline=chunks,
                    context=context,
                    distributed_optimizer=ranks * context > 1 or config.precision.fp8_parameters,
                    overlap_gradient_reduce=ranks * context > 1,
                    overlap_parameter_gather=ranks * context > 1,
                    overlap_tensor_communication=tensor > 1,
                )
                training = dataclasses.replace(config.training, micro_batch_size=micro, recompute="none")
                layout = _checked(config, encoder, parallel, training, gpus, result)
                if layout is not None:
                    yield parallel, training, layout


def _sizes(config: RunConfig, encoder: EncoderConfig, gpus: int, gpu: Gpu) -> Iterator[tuple[int, int, int]]:
    """Tensor (inside a node), pipeline and context sizes that divide the GPUs and, for the pipeline, the layers."""
    for tensor in _divisors(gpus):
        for pipeline in _divisors(gpus // tensor):
            for context in _divisors(gpus // tensor // pipeline):
                short = context > 1 and config.data.sequence_length // context < SHORTEST_SLICE
                if tensor <= gpu.gpus_per_node and encoder.num_layers % pipeline == 0 and not short:
                    yield tensor, pipeline, context


def _micro_batches(global_batch: int, ranks: int) -> list[int]:
    """Sizes to try: divisors of a rank's samples. A batch that does not divide is tried with 1, for the check to say so."""
    return [n for n in _divisors(global_batch // ranks) if n <= LARGEST_MICRO_BATCH] if global_batch % ranks == 0 else [1]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _checked(
    config: RunConfig, encoder: EncoderConfig, parallel: ParallelConfig, training: TrainingConfig, gpus: int, result: Search
) -> Layout | None:
    """The layout, if `check_layout` takes it and the tokens divide."""
    tokens = training.micro_batch_size * config.data.sequence_length
    shards = {
        "model.num_attention_heads": encoder.num_attention_heads,
        "model.num_query_groups": encoder.num_query_groups,
        "model.ffn_hidden_size": encoder.ffn_hidden_size,
    }
    try:
        layout = check_layout(parallel, training, encoder.num_layers, shards, gpus)
        if layout.tensor * layout.pipeline * layout.context * layout.data != gpus or tokens % (parallel.tensor * parallel.context):
            raise UserError(f"parallel.context is {parallel.context}: it does not divide the tokens of a micro-batch, {tokens}")
    except UserError as error:
        field_name = re.search(r"(parallel|model|training)\.\w+", str(error))
        name = field_name[0] if field_name else "layout"
        result.refused[name] = (result.refused.get(name, (0, ""))[0] + 1, str(error))
        return None
    return layout


def _is_allowed(encoder: EncoderConfig, candidate: Candidate, config: RunConfig, gpu: Gpu) -> bool:
    """The recipe's products divide at this layout."""
    tokens = candidate.training.micro_batch_size * config.data.sequence_length // candidate.layout.context
    try:
        check_precision(candidate.precision, encoder, candidate.layout, tokens, gpu.capability, has_te=True)
    except UserError:
        return False
    return True


def _try(result: Search, encoder: EncoderConfig, works: list[PhaseWork], plain: Candidate) -> bool:
    """Take the least recomputation that fits; more of it is only slower. Returns whether any fits."""
    predicted = max(work.predicted_share for work in works)
    sequence, vocab_size = result.config.data.sequence_length, works[0].workload.shape.vocab
    for recompute in RECOMPUTATIONS:
        training = dataclasses.replace(plain.training, recompute=recompute)
        memories = [
            rank_memory(encoder, vocab_size, plain.layout, training, plain.precision, sequence, stage, predicted)
            for stage in sorted({0, plain.layout.pipeline - 1})
        ]
        memory = max(memories, key=lambda each: each.total)
        run = Execution.of(plain.layout, training, plain.precision, overlap=True)
        predictions = tuple((work, predict(result.gpu, work.workload, run)) for work in works)
        candidate = dataclasses.replace(plain, training=training, memory=memory, predictions=predictions)
        if memory.total <= result.room:
            result.found.append(candidate)
            return True
        result.too_large.append(candidate)
    return False
