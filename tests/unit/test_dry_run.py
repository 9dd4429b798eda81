"""The dry run: what it builds and refuses, against formulas, a real small run and the trainer's own check."""

import dataclasses
import json
import multiprocessing
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config import RunConfig
from megatron_ext.config_reading import from_dict
from megatron_ext.errors import UserError
from megatron_ext.model.flops import count_parameters
from megatron_ext.model.presets import PRESETS
from megatron_ext.plan.dry_run import DryRun, dry_run, largest_predicted_share
from megatron_ext.plan.memory import rank_memory
from megatron_ext.runtime.backend import ON_CPU, expected_backend
from megatron_ext.runtime.launch import PRELOADED, run_on_ranks
from megatron_ext.train.preflight import check_structure, prepare
from tests.unit.processes import refusal, run_tool

VOCAB_SIZE, SEQUENCE_LENGTH = 1000, 64
CASES = {
    "data": {},
    "data, distributed optimizer": {"parallel": {"distributed_optimizer": True}},
    "bf16": {"precision": {"recipe": "bf16"}},
    "bf16, distributed optimizer": {"precision": {"recipe": "bf16"}, "parallel": {"distributed_optimizer": True}},
    "tensor and pipeline": {"parallel": {"tensor": 2, "pipeline": 2}},
    "interleaved, bf16, distributed optimizer": {
        "precision": {"recipe": "bf16"},
        "parallel": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True},
    },
    "tied over a pipeline, distributed optimizer": {
        "model": {"preset": "nano", "tie_embeddings": True},
        "parallel": {"pipeline": 4, "distributed_optimizer": True},
    },
    "context, overlap, recomputation": {
        "parallel": {
            "context": 2,
            "tensor": 2,
            "distributed_optimizer": True,
            "overlap_gradient_reduce": True,
            "overlap_parameter_gather": True,
        },
        "training": {"micro_batch_size": 2, "global_batch_size": 64, "recompute": "full"},
    },
    "fp8": {"precision": {"recipe": "fp8-delayed"}},
    "fp8 weights": {"precision": {"recipe": "fp8-tensorwise", "fp8_parameters": True}, "parallel": {"distributed_optimizer": True}},
    "tied, biases, norms": {"model": {"preset": "nano", "tie_embeddings": True, "qkv_bias": True, "qk_norm": True}},
}
REAL = {"parallel": {"tensor": 2, "distributed_optimizer": True}, "precision": {"recipe": "bf16"}}


def config_of(**sections: Any) -> RunConfig:
    """A run of the smallest preset whose data and tokenizer are nowhere."""
    tree = {
        "output_dir": "none",
        "data": {"tokenizer": "/nowhere/tokenizer", "train": [{"prefix": "/nowhere/data"}], "sequence_length": SEQUENCE_LENGTH},
        "model": {"preset": "nano"},
        "phases": [{"objective": "mlm", "steps": 10}],
        "training": {"micro_batch_size": 2, "global_batch_size": 64},
        "validation": {"interval": 0},
    }
    return from_dict({**tree, **sections})


def build(world_size: int, ranks: Sequence[int] | None, sections: dict[str, Any]) -> DryRun:
    """A dry run."""
    return dry_run(config_of(**sections), world_size, ranks, VOCAB_SIZE)


def save_for_real(folder: str) -> None:
    """Build, initialize and save the model and optimizer of `REAL` on this rank of a real run."""
    import torch
    from megatron.core import dist_checkpointing

    from megatron_ext.runtime.topology import process_groups
    from megatron_ext.train.build import build_model, wrap_model
    from megatron_ext.train.checkpoint import sharded_state
    from megatron_ext.train.optimizer import build_optimizer, update
    from megatron_ext.train.step import Sums

    config = config_of(**REAL)
    structure, backend = check_structure(config, 2, ON_CPU), ON_CPU
    with process_groups(structure.layout, backend):
        bare = build_model(structure.encoder, VOCAB_SIZE, structure.layout, backend, torch.bfloat16, 0)
        chunks = wrap_model(bare, structure.layout)
        optimizer = build_optimizer(config.optimizer, chunks, torch.bfloat16, True)
        update(optimizer, Sums(backend.device))
        dist_checkpointing.save(sharded_state(bare, optimizer, is_loading=False), folder)


@pytest.fixture(scope="module")
def pool() -> ProcessPoolExecutor:
    """A process of its own: a dry run patches megatron-core for good, and takes the default process group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        yield executor


@pytest.mark.parametrize("case", CASES)
def test_formulas_give_the_bytes_of_what_is_built(case: str, pool: ProcessPoolExecutor) -> None:
    config = config_of(**CASES[case])
    structure = check_structure(config, 16, expected_backend("auto", (9, 0)))
    result = pool.submit(build, 16, None, CASES[case]).result()
    assert [report.stage for report in result.ranks] == list(range(config.parallel.pipeline))
    for report in result.ranks:
        args = (structure.encoder, VOCAB_SIZE, structure.layout, config.training, config.precision, SEQUENCE_LENGTH)
        formula = rank_memory(*args, report.stage, result.predicted_share)
        assert report.memory == formula
        assert report.memory.total == sum(dataclasses.astuple(formula))


def test_parameters_of_all_parts_are_those_of_the_model(pool: ProcessPoolExecutor) -> None:
    """Tensor-parallel ranks hold the norms alike, and pad the vocabulary; nothing else is held twice."""
    result = pool.submit(build, 16, (0, 1, 8, 9), CASES["tensor and pipeline"]).result()
    count = count_parameters(PRESETS["nano"](), result.padded_vocab_size)
    assert sum(report.parameters for report in result.ranks) == count.total + count.norms
    assert [report.holds for report in result.ranks] == [["embedding"], ["embedding"], ["head"], ["head"]]


def test_groups_of_a_rank(pool: ProcessPoolExecutor) -> None:
    """megatron counts tensor-parallel ranks first, then data-parallel ones, then stages."""
    (report,) = pool.submit(build, 16, (5,), CASES["tensor and pipeline"]).result().ranks
    groups = {name: group.ranks for name, group in report.groups.items()}
    assert (groups["tensor"], groups["pipeline"], groups["data"]) == ([4, 5], [5, 13], [1, 3, 5, 7])
    assert report.stage == 0


def test_checkpoint_plan_is_that_of_a_real_run(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    run_on_ranks(save_for_real, 2, str(tmp_path))
    stored = FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    tensors = {key: value for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}
    planned = pool.submit(build, 2, (0, 1), REAL).result().ranks
    assert {key for report in planned for key in report.checkpoint.keys} == set(tensors)
    size = sum(value.size.numel() * value.properties.dtype.itemsize for value in tensors.values())
    assert sum(report.checkpoint.bytes for report in planned) == size


REFUSED = {
    "model ranks": ({"parallel": {"tensor": 4, "pipeline": 3}}, 16),
    "heads": ({"parallel": {"tensor": 16}}, 16),
    "layers": ({"parallel": {"pipeline": 8}}, 16),
    "batch": ({"training": {"micro_batch_size": 3, "global_batch_size": 3}}, 16),
    "interleaving": ({"parallel": {"pipeline": 4, "virtual_pipeline": 1}, "training": {"global_batch_size": 6}}, 16),
    "sequence": ({"data": {"tokenizer": "t", "train": [{"prefix": "p"}], "sequence_length": 4096}}, 1),
    "schedule": ({"optimizer": {"warmup_steps": 100}}, 16),
    "stop": ({"training": {"global_batch_size": 64, "stop_at_step": 11}}, 16),
    "preset": ({"model": {"preset": "300b"}}, 16),
    "context": ({"parallel": {"context": 3}}, 15),
    "fp8 shape": ({"precision": {"recipe": "fp8-blockwise", "emulation": True}}, 16),
    "validation": ({"validation": {"interval": 1, "samples": 3}}, 16),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_the_trainer_refuses(case: str) -> None:
    sections, world_size = REFUSED[case]
    config = config_of(**sections)
    with pytest.raises(UserError) as trainer:
        prepare(config, world_size)
    with pytest.raises(UserError) as dry:
        dry_run(config, world_size, None, VOCAB_SIZE)
    assert str(dry.value) == str(trainer.value)
    assert "/nowhere" not in str(dry.value)


@pytest.mark.parametrize(
    "ranks, vocab_size, message", [((16,), 8, "--rank is 16"), (None, 0, "--vocab-size is 0"), (None, None, "/nowhere/tokenizer")]
)
def test_refuses_its_own_options(ranks: Sequence[int] | None, vocab_size: int | None, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        dry_run(config_of(), 16, ranks, vocab_size)


def test_logits_are_counted_for_the_densest_phase() -> None:
    phases = [{"objective": "mlm", "steps": 1, "masking": {"ratio": 0.2, "final_ratio": 0.5}}, {"objective": "mntp", "steps": 1}]
    assert largest_predicted_share(check_structure(config_of(phases=phases), 1, ON_CPU).plan) == 0.5
    phases.append({"objective": {"clm": 0.1, "mlm": 0.9}, "steps": 1})
    assert largest_predicted_share(check_structure(config_of(phases=phases), 1, ON_CPU).plan) == 1.0


def test_the_tool_shows_a_run_and_refuses_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config_of().as_dict()))  # YAML holds JSON
    asked = ("tools/plan.py", "dry-run", "--config", path, "--world-size", 1024, "--training.global_batch_size", 2048)
    shown = run_tool(*asked, "--vocab-size", VOCAB_SIZE, "--parallel.tensor", 2, "--parallel.pipeline", 2, "--json")
    assert shown.code == 0, shown.err
    result = json.loads(shown.out)
    assert result["layout"] == "TP2+SP x PP2 x DP256" and [report["rank"] for report in result["ranks"]] == [0, 512]
    assert result["vocabulary_from"] == "--vocab-size" and "data.tokenizer" in result["unchecked"]
    assert sum(report["seconds"] for report in result["ranks"]) < 60
    refusal(run_tool(*asked, "--parallel.tensor", 3), "1024 ranks cannot hold parallel.tensor 3")
