"""Everything that can be wrong with a run is found here, before any of megatron's process groups or a model exists."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megatron_ext.config import DataSource, RunConfig
from megatron_ext.data.corpus import read_dataset_info
from megatron_ext.data.dataset import Blend, dataset_fingerprint, open_blend
from megatron_ext.data.loader import check_ids
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.errors import UserError, warn
from megatron_ext.model.presets import EncoderConfig, build_encoder_config, padded_vocab_size
from megatron_ext.objective import OBJECTIVES, PhasePlan, Vocabulary
from megatron_ext.runtime.backend import Backend, check_overlap, choose_backend
from megatron_ext.runtime.precision import check_precision, small_width_warning
from megatron_ext.runtime.topology import Layout, check_layout, rank_from_environment
from megatron_ext.train.start import Start, find_start

SAMPLES_LOOKED_AT = 256


@dataclass(frozen=True)
class Structure:
    """What a configuration resolves to by itself, whatever the data and the machine."""

    encoder: EncoderConfig
    plan: PhasePlan
    layout: Layout


@dataclass(frozen=True)
class RunSetup:
    """A configuration that was checked, and what it resolves to."""

    config: RunConfig
    encoder: EncoderConfig
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    plan: PhasePlan
    layout: Layout
    backend: Backend
    training_data: Blend
    validation_data: Blend | None
    data_record: list[dict[str, Any]]
    """What was read: prefix, weight, fingerprint of each set."""
    start: Start | None
    """Where the first weights come from; None draws them."""

    @property
    def vocab_size(self) -> int:
        """Ids that the model knows. A model that was imported may know more than its tokenizer gives."""
        return max(self.tokenizer.vocab_size, self.start.record["vocab_size"] if self.start else 0)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return padded_vocab_size(self.vocab_size, self.layout.tensor)

    @property
    def tokens_per_batch(self) -> int:
        """Tokens in a micro-batch, over all context-parallel ranks."""
        return self.config.training.micro_batch_size * self.config.data.sequence_length

    @property
    def dtype(self) -> torch.dtype:
        """Numbers of weights and activations."""
        return weights_dtype(self.config)


def weights_dtype(config: RunConfig) -> torch.dtype:
    """Numbers of weights and activations."""
    return torch.float32 if config.precision.recipe == "fp32" else torch.bfloat16


def backend_request(config: RunConfig) -> Literal["auto", "local", "transformer_engine"]:
    """The layers that the configuration asks for; emulated FP8 is part of the local ones."""
    return "local" if config.precision.emulation else config.training.backend


def check_structure(config: RunConfig, world_size: int, backend: Backend) -> Structure:
    """Check all that needs neither data nor tokenizer: a dry run refuses what this refuses.

    Args:
        config: the run.
        world_size: number of ranks.
        backend: what it will run on, here or elsewhere.

    Raises:
        UserError: the first thing that does not fit.
    """
    output_dir = Path(config.output_dir)
    if not config.output_dir or (output_dir.exists() and not output_dir.is_dir()):
        raise UserError(f"output_dir is '{config.output_dir}': it must be a folder, or a path where one can be made")
    encoder = build_encoder_config(config.model)
    if config.data.sequence_length > encoder.max_position_embeddings:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} is above model.max_position_embeddings "
            f"{encoder.max_position_embeddings}: raise the latter or shorten the samples"
        )
    layout = _check_layout(config, encoder, world_size)
    _check_precision(config, encoder, layout, backend)
    check_overlap(config.parallel, backend)
    plan = PhasePlan.from_config(config)
    _check_schedule(config, plan)
    return Structure(encoder, plan, layout)


def prepare(config: RunConfig, world_size: int) -> RunSetup:
    """Check a configuration against the number of ranks, the tokenizer, the data and this machine.

    Raises:
        UserError: the first thing that does not fit.
    """
    backend = choose_backend(backend_request(config))
    structure = check_structure(config, world_size, backend)
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocabulary = resolve_vocabulary(config, tokenizer)
    data_record = [_check_source(source, "train", tokenizer) for source in config.data.train]
    data_record += [_check_source(source, "validation", tokenizer) for source in config.data.validation]
    training_data, validation_data = _open_data(config)
    _check_ids(config, training_data, tokenizer)
    if validation_data is not None:
        _warn_of_repetitions(config, validation_data)
    return RunSetup(
        config=config,
        encoder=structure.encoder,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        plan=structure.plan,
        layout=structure.layout,
        backend=backend,
        training_data=training_data,
        validation_data=validation_data,
        data_record=data_record,
        start=find_start(config, tokenizer),
    )


def _check_precision(config: RunConfig, encoder: EncoderConfig, layout: Layout, backend: Backend) -> None:
    tokens = config.training.micro_batch_size * config.data.sequence_length // config.parallel.context
    check_precision(config.precision, encoder, layout, tokens, backend.capability, backend.layers == "transformer_engine")
    warning = small_width_warning(config.precision, encoder.hidden_size)
    if warning and rank_from_environment() == 0:
        warn(warning)


def _check_layout(config: RunConfig, encoder: EncoderConfig, world_size: int) -> Layout:
    shards = {
        "model.num_attention_heads": encoder.num_attention_heads,
        "model.num_query_groups": encoder.num_query_groups,
        "model.ffn_hidden_size": encoder.ffn_hidden_size,
    }
    tokens = config.training.micro_batch_size * config.data.sequence_length
    layout = check_layout(config.parallel, config.training, encoder.num_layers, shards, world_size, tokens=tokens)
    if config.validation.interval:
        # Every rank runs the same number of micro-batches, and the interleaved schedule wants a multiple of its stages.
        multiple = config.training.micro_batch_size * layout.data * (layout.pipeline if layout.virtual_pipeline > 1 else 1)
        if config.validation.samples % multiple:
            raise UserError(
                f"validation.samples is {config.validation.samples}: with training.micro_batch_size "
                f"{config.training.micro_batch_size} and the layout {layout} it must be a multiple of {multiple}"
            )
    return layout


def _check_schedule(config: RunConfig, plan: PhasePlan) -> None:
    needed = config.optimizer.warmup_steps + config.optimizer.decay_steps
    for phase in plan.phases:
        start, end = plan.schedule_segment(phase.start_step)
        if needed > end - start:
            raise UserError(
                f"optimizer.warmup_steps {config.optimizer.warmup_steps} + decay_steps {config.optimizer.decay_steps} do not "
                f"fit into the {end - start} steps of the schedule that starts at step {start}"
            )
    stop = config.training.stop_at_step
    if stop is not None and stop > plan.total_steps:
        raise UserError(f"training.stop_at_step is {stop}: the plan has {plan.total_steps} steps")


def resolve_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> Vocabulary:
    """What masking must know of the tokenizer.

    Raises:
        UserError: the run hides tokens and the tokenizer has no mask token.
    """
    masks = any(OBJECTIVES[name].corrupts for phase in PhasePlan.from_config(config).phases for name in phase.weights)
    if tokenizer.mask_id is None and (masks or config.validation.interval):
        raise UserError(
            f"data.tokenizer {config.data.tokenizer} has no mask token: masked phases and validation need one "
            "(tools/train_tokenizer.py makes tokenizers that have it)"
        )
    is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
    is_special[list(tokenizer.special_ids)] = True
    # Without masked objectives the mask id is never used.
    mask_id = 0 if tokenizer.mask_id is None else tokenizer.mask_id
    return Vocabulary(mask_id=mask_id, is_special=is_special, starts_word=tokenizer.pieces_start_word)


def _check_source(source: DataSource, split: str, tokenizer: Tokenizer) -> dict[str, Any]:
    for ending in (".bin", ".idx"):
        if not Path(source.prefix + ending).is_file():
            raise UserError(f"data set {source.prefix}: there is no file {source.prefix}{ending}")
    info = read_dataset_info(Path(source.prefix))
    if info is not None and info.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"data set {source.prefix} was tokenized with another tokenizer (fingerprint {info.tokenizer_fingerprint[:12]}) than "
            f"data.tokenizer {tokenizer.source} ({tokenizer.fingerprint[:12]})"
        )
    fingerprint = dataset_fingerprint(source.prefix)
    return {
        "prefix": source.prefix,
        "split": split,
        "weight": source.weight,
        "fingerprint": fingerprint,
        "tokenizer_known": info is not None,
    }


def _check_ids(config: RunConfig, data: Blend, tokenizer: Tokenizer) -> None:
    """Look at the first batch: a data set without a sidecar does not say which tokenizer it was made with."""
    for index in range(min(config.training.global_batch_size, SAMPLES_LOOKED_AT)):
        check_ids(data.sample(index), tokenizer.vocab_size)


def _open_data(config: RunConfig) -> tuple[Blend, Blend | None]:
    data, seed = config.data, config.training.seed
    whole = (1.0, 0.0, 0.0)
    shares = whole if data.validation else data.split
    training = open_blend(data.train, 0, shares, data.sequence_length, seed)
    if not config.validation.interval:
        return training, None
    if data.validation:
        validation = open_blend(data.validation, 0, whole, data.sequence_length, seed)
    else:
        validation = open_blend(data.train, 1, shares, data.sequence_length, seed)
    return training, validation


def _warn_of_repetitions(config: RunConfig, data: Blend) -> None:
    """A validation set that is smaller than asked for weighs some of its samples more; it is still fixed, so this is no error."""
    samples = config.validation.samples
    if (repeated := data.repeated(samples)) and rank_from_environment() == 0:
        warn(
            f"validation.samples is {samples}, but the validation data gives only {samples - repeated} different samples "
            f"of {config.data.sequence_length} tokens: {repeated} are measured again"
        )
