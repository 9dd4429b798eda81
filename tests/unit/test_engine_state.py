"""Scales of Transformer Engine's modules go through a checkpoint as tensors; the modules are stand-ins with TE's attributes."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import fp8_utils
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_ext.train.engine_state import put_back, take_out

KEY = "layer._extra_state"


class EngineModule(torch.nn.Module):
    """What `engine_state` touches of a Transformer Engine module."""

    def __init__(self, history: int):
        super().__init__()
        self.history, self.fp8_meta = history, {}

    def init_fp8_meta_tensors(self, recipe: str) -> None:
        assert recipe == "the recipe"
        for name, count in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            if name not in self.fp8_meta:
                scales = SimpleNamespace(scale=torch.ones(count), amax_history=torch.zeros(self.history, count))
                self.fp8_meta[name] = scales


def make_chunk(history: int = 4, recipe: str = "delayed") -> Any:
    chunk = torch.nn.Module()
    chunk.layer = EngineModule(history)
    chunk.config = SimpleNamespace(fp8="hybrid", fp8_recipe=recipe)
    return chunk


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What is read back of a trained module, through torch's reader of plain data."""
    monkeypatch.setattr(fp8_utils, "get_fp8_recipe", lambda config: "the recipe")
    chunk = make_chunk()
    chunk.layer.init_fp8_meta_tensors("the recipe")
    for number, name in enumerate(("scaling_fwd", "scaling_bwd")):
        chunk.layer.fp8_meta[name].scale += number + 0.5
        chunk.layer.fp8_meta[name].amax_history += number + 7
    pickled = ShardedObject(KEY, torch.ones(9, dtype=torch.uint8), (1,), (0,), 0)
    take_out(chunk, {KEY: pickled})
    file = io.BytesIO()
    torch.save(pickled.data, file)
    chunk.layer.fp8_meta["scaling_fwd"].scale += 100  # what was taken out is a copy
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_scales_come_back(stored: dict[str, torch.Tensor]) -> None:
    assert all(tensor.dtype == torch.float32 for tensor in stored.values()), "no bytes"
    chunk = make_chunk()
    assert put_back(chunk, {KEY: stored, "weight": 1}) == {KEY: None, "weight": 1}
    assert chunk.layer.fp8_meta["scaling_fwd"].scale.tolist() == [1.5] * 3
    assert chunk.layer.fp8_meta["scaling_bwd"].scale.tolist() == [2.5] * 2
    assert chunk.layer.fp8_meta["scaling_bwd"].amax_history.tolist() == [[8.0, 8.0]] * 4


@pytest.mark.parametrize("change", [{"history": 5}, {"recipe": "tensorwise"}])
def test_another_recipe_or_length_begins_anew(stored: dict[str, torch.Tensor], change: dict[str, Any]) -> None:
    chunk = make_chunk(**change)
    assert put_back(chunk, {KEY: stored}) == {KEY: None}
    assert all((scales.scale == 1).all() for scales in chunk.layer.fp8_meta.values() if hasattr(scales, "scale"))


def test_modules_without_scales_are_left_alone() -> None:
    chunk = make_chunk()
    empty = ShardedObject(KEY, torch.empty(0, dtype=torch.uint8), (1,), (0,), 0)
    assert take_out(chunk, {KEY: empty})[KEY].data.numel() == 0
    assert put_back(chunk, {KEY: None}) == {KEY: None}
