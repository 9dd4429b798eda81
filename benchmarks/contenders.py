"""One process of `benchmarks.training_step`: a model and an optimizer that make a step on the same batch when told to.

python -m benchmarks.contenders megatron_ext --shape tiny --objective mlm
"""

import argparse
import dataclasses
import importlib
import os
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np

from benchmarks.alternating import take_turns
from benchmarks.memory import peak, reset_peak
from benchmarks.own_run import own_groups, own_step
from benchmarks.trainer_peer import trainer_step
from megatron_ext.errors import run_command

MASK_RATIO = 0.4
LEARNING_RATE, CLIP = 1e-4, 1.0


@dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    preset: str
    layers: int | None
    vocab_size: int
    batch_size: int
    sequence_length: int

    @property
    def tokens(self) -> int:
        """In a batch."""
        return self.batch_size * self.sequence_length


SHAPES = {
    "210m": Shape("210m", None, 128_256, 4, 512),
    "tiny": Shape("tiny", None, 8_192, 8, 256),
    "wide": Shape("210m", 2, 8_192, 4, 512),
    "smoke": Shape("tiny", 1, 512, 2, 32),
}


@dataclass(frozen=True)
class Batch:
    """The same for all contenders."""

    tokens: np.ndarray
    """[b, s] what the model sees."""
    labels: np.ndarray
    """[b, s] what it is to say there, -100 where nothing; for CLM the tokens themselves, which it is to say one place earlier."""


def make_batch(shape: Shape, objective: str, seed: int = 0) -> Batch:
    """Random tokens; for MLM exactly 40 % of each row are predicted."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, shape.vocab_size, (shape.batch_size, shape.sequence_length))
    if objective == "clm":
        return Batch(tokens, tokens)
    labels = np.full_like(tokens, -100)
    for row in range(shape.batch_size):
        chosen = generator.choice(shape.sequence_length, round(MASK_RATIO * shape.sequence_length), replace=False)
        labels[row, chosen] = tokens[row, chosen]
        tokens[row, chosen] = 4
    return Batch(tokens, labels)


def encoder_of(shape: Shape) -> Any:
    """Our sizes of a shape."""
    from megatron_ext.model.presets import PRESETS

    encoder = PRESETS[shape.preset]()
    return dataclasses.replace(encoder, num_layers=shape.layers) if shape.layers else encoder


def step_flops(shape: Shape, objective: str) -> float:
    """Useful FLOPs of a step."""
    from megatron_ext.model.flops import training_flops

    share = MASK_RATIO if objective == "mlm" else 1 - 1 / shape.sequence_length
    attended = shape.sequence_length / (2 if objective == "clm" else 1) * shape.tokens
    return training_flops(
        encoder_of(shape), shape.vocab_size, tokens=shape.tokens, attended=attended, predicted=share * shape.tokens
    )


def own_micro_batch(shape: Shape, objective: str, seed: int = 0) -> Any:
    """The batch of `make_batch` as this project's `MicroBatch`."""
    from megatron_ext.data.batch import collate
    from megatron_ext.objective import OBJECTIVES, Example

    batch, examples = make_batch(shape, objective, seed), []
    for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
        places = np.arange(len(tokens) - 1) if objective == "clm" else np.flatnonzero(labels >= 0)
        examples.append(Example(tokens, places, labels[places + 1] if objective == "clm" else labels[places]))
    lengths = [np.array([shape.sequence_length])] * shape.batch_size
    return collate(examples, lengths, OBJECTIVES[objective], documents_attend_across=False, restart_positions=True)


Step = Callable[[], float]
"""Makes an optimizer step; returns the loss per predicted token before it."""


def contending_step(encoder: Any, vocab_size: int, layout: Any, backend: Any) -> Any:
    """`own_step` in float32 with the optimizer's settings that all contenders have."""
    import torch

    from megatron_ext.config import OptimizerConfig

    config = OptimizerConfig(learning_rate=LEARNING_RATE, clip_grad_norm=CLIP)
    return own_step(encoder, vocab_size, torch.float32, layout, backend, config)


def build_ours(shape: Shape, objective: str, stack: ExitStack) -> Step:
    """This project, as a run of one rank builds it."""
    encoder, micro_batch = encoder_of(shape), own_micro_batch(shape, objective)
    layout, backend = stack.enter_context(own_groups(encoder, shape.batch_size))
    own = contending_step(encoder, shape.vocab_size, layout, backend)

    def step() -> float:
        sums = own([micro_batch])
        return float(sums.losses[objective]) / sums.predicted[objective]

    return step


def transformers_model(encoder: Any, vocab_size: int, objective: str) -> Any:
    """transformers' model of our sizes, with SDPA."""
    import transformers

    kind = "Llama" if objective == "clm" else "EuroBert"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab_size,
        hidden_size=encoder.hidden_size,
        intermediate_size=encoder.ffn_hidden_size,
        num_hidden_layers=encoder.num_layers,
        num_attention_heads=encoder.num_attention_heads,
        num_key_value_heads=encoder.num_query_groups,
        max_position_embeddings=encoder.max_position_embeddings,
        tie_word_embeddings=encoder.tie_embeddings,
        use_cache=False,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    return getattr(transformers, "LlamaForCausalLM" if objective == "clm" else "EuroBertForMaskedLM")(config).train()


def build_transformers(shape: Shape, objective: str, stack: ExitStack) -> Step:
    """transformers in a plain loop: SDPA and fused AdamW."""
    import torch

    batch, model = make_batch(shape, objective), transformers_model(encoder_of(shape), shape.vocab_size, objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


def build_trainer(shape: Shape, objective: str, stack: ExitStack) -> Step:
    """transformers' `Trainer`: the same model and optimizer in its loop."""
    import torch

    batch, model = make_batch(shape, objective), transformers_model(encoder_of(shape), shape.vocab_size, objective)
    tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
    return trainer_step(model, tokens, labels, LEARNING_RATE, CLIP, stack)


def megatron_config(encoder: Any, **other: Any) -> Any:
    """megatron-core's configuration of our sizes."""
    import torch
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=encoder.num_layers,
        hidden_size=encoder.hidden_size,
        ffn_hidden_size=encoder.ffn_hidden_size,
        num_attention_heads=encoder.num_attention_heads,
        num_query_groups=encoder.num_query_groups,
        kv_channels=encoder.head_dim,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        **other,
    )


def build_megatron_core(shape: Shape, objective: str, stack: ExitStack) -> Step:
    """megatron-core's GPTModel as it comes, in a plain loop: its local layers, logits at every position, torch's AdamW."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.enums import AttnMaskType

    encoder, batch = encoder_of(shape), make_batch(shape, objective)
    stack.enter_context(own_groups(encoder, shape.batch_size))  # without its patches nothing of megatron-core runs on a CPU
    model_parallel_cuda_manual_seed(0)
    config = megatron_config(encoder, use_cpu_initialization=True)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if objective == "mlm":
        spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.padding
    model = GPTModel(
        config,
        spec,
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.sequence_length,
        share_embeddings_and_output_weights=encoder.tie_embeddings,
        position_embedding_type="rope",
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
    if objective == "clm":
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    counted = labels >= 0
    positions = torch.arange(shape.sequence_length).expand_as(tokens)
    hidden = torch.zeros(1, 1, shape.sequence_length, shape.sequence_length, dtype=torch.bool)  # True is not seen
    if objective == "clm":
        hidden = ~torch.ones_like(hidden).tril()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        losses = model(tokens, positions, hidden, labels=labels.clamp_min(0))
        loss = (losses * counted).sum() / counted.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


CONTENDERS = {
    "megatron_ext": build_ours,
    "transformers": build_transformers,
    "trainer": build_trainer,
    "megatron_core": build_megatron_core,
}
TRANSFORMERS = ["transformers.models.llama.modeling_llama", "transformers.models.eurobert.modeling_eurobert"]
LIBRARIES = {
    "megatron_ext": ["megatron_ext.train.trainer"],
    "transformers": TRANSFORMERS,
    "trainer": [*TRANSFORMERS, "transformers.trainer"],
    "megatron_core": ["megatron.core.models.gpt", "megatron_ext.runtime.topology"],
}
"""What each needs, imported before memory is counted."""


def main() -> int:
    """Build one contender and take turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--objective", choices=("mlm", "clm"), required=True)
    parser.add_argument("--as-it-comes", action="store_true", help="leave the C library's handling of freed memory alone")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    from megatron_ext.runtime.allocator import keep_freed_memory
    from megatron_ext.train.metrics import peak_flops

    if not arguments.as_it_comes:
        keep_freed_memory()  # peers too: it is a setting of the C library, which anybody may make
    for library in LIBRARIES[arguments.contender]:
        importlib.import_module(library)
    torch.manual_seed(0)
    torch.ones(256, 256).mm(torch.ones(256, 256))
    before = reset_peak()
    stack = ExitStack()
    step = CONTENDERS[arguments.contender](SHAPES[arguments.shape], arguments.objective, stack)

    def timed() -> dict[str, float]:
        rate = peak_flops(torch.device("cpu"))  # of this process, at this time
        start = time.perf_counter()
        loss = step()
        return {"seconds": time.perf_counter() - start, "loss": loss, "gemm": rate, "peak_bytes": peak() - before}

    versions = {name: metadata.version(name) for name in ("torch", "transformers", "megatron-core")}
    with stack:
        take_turns({"threads": torch.get_num_threads(), "cores": os.cpu_count(), "versions": versions}, timed)
    return 0


if __name__ == "__main__":
    run_command(main)
