"""Hugging Face -> checkpoint -> ranks of a layout -> checkpoint of that layout -> Hugging Face: the same bits."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_ext.hf.export import export_checkpoint
from megatron_ext.hf.import_model import import_model
from megatron_ext.runtime.launch import run_on_ranks
from tests.distributed.models import Case
from tests.unit.hf_models import RECIPES, weights_of, write_model

LAYOUTS = {2: {"TP2": Case(tensor=2), "PP2": Case(pipeline=2), "PP2 interleaved": Case(pipeline=2, virtual_pipeline=2)}}
LAYOUTS[4] = {"TP2 x PP2": Case(tensor=2, pipeline=2)}


def save_at_layouts(names: list[str], folder: Path, layouts: dict[str, Case]) -> None:
    """Load each model's checkpoint at each layout, and save it from there."""
    from megatron.core import dist_checkpointing

    from megatron_ext.checkpoint_files import read_run_file
    from megatron_ext.model.presets import EncoderConfig, padded_vocab_size
    from megatron_ext.train.build import build_model
    from megatron_ext.train.checkpoint import load_checkpoint, sharded_state
    from tests.distributed.models import start

    for layout_name, case in layouts.items():
        layout, backend = start(case)
        for name in names:
            record = read_run_file(folder / name / "checkpoint")
            encoder = EncoderConfig(**record["encoder"])
            chunks = build_model(encoder, record["vocab_size"], layout, backend, RECIPES[name].dtype, seed=1)
            load_checkpoint(folder / name / "checkpoint", chunks, None)
            target = folder / name / layout_name
            if torch.distributed.get_rank() == 0:
                target.mkdir()
                shutil.copytree(folder / name / "checkpoint/tokenizer", target / "tokenizer")
                record |= {"padded_vocab_size": padded_vocab_size(record["vocab_size"], layout.tensor), "files": {}}
                (target / "run.json").write_text(json.dumps(record))
            torch.distributed.barrier()
            dist_checkpointing.save(sharded_state(chunks, None, is_loading=False), str(target))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family's model, imported, and saved again from every layout."""
    folder = tmp_path_factory.mktemp("models")
    for name, recipe in RECIPES.items():
        (folder / name).mkdir()
        write_model(folder / name / "model", recipe)
        import_model(folder / name / "model", folder / name / "checkpoint")
    for ranks, layouts in LAYOUTS.items():
        run_on_ranks(save_at_layouts, ranks, list(RECIPES), folder, layouts)
    return folder


@pytest.mark.parametrize("layout", [name for layouts in LAYOUTS.values() for name in layouts])
@pytest.mark.parametrize("name", RECIPES)
def test_the_bits_come_back_from_every_layout(folder: Path, name: str, layout: str, tmp_path: Path) -> None:
    export_checkpoint(folder / name / layout, tmp_path / "again")
    before, after = weights_of(folder / name / "model"), weights_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert [key for key in before if before[key].dtype != after[key].dtype or not torch.equal(before[key], after[key])] == []
