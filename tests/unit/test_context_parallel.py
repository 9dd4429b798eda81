"""Parts of a micro-batch: attention over each equals a dense computation over the whole row, and the parts add up."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.config import MaskingConfig
from megatron_ext.data.batch import MicroBatch, collate
from megatron_ext.model.flops import attended_length
from megatron_ext.objective import MASK_STREAM, OBJECTIVES, Vocabulary, make_example, random_generator

LENGTH = 24
SEGMENTS = {
    "one document": ((24,), (24,)),
    "documents of one length": ((6, 6, 6, 6), (6, 6, 6, 6)),
    "short and long": ((1, 2, 17, 4), (23, 1)),
    "edges on the cuts": ((12, 12), (4, 8, 12)),
}
HEADS, GROUPS, WIDTH = 4, 2, 8


def make_batch(name: str, objective: str) -> MicroBatch:
    """Two samples of 24 tokens, packed."""
    vocabulary = Vocabulary(1, np.arange(50) < 5, np.ones(50, dtype=bool))
    segments = [np.array(lengths) for lengths in SEGMENTS[name]]
    examples = []
    for number, lengths in enumerate(segments):
        tokens, masks = np.random.default_rng(number).integers(5, 50, size=LENGTH), random_generator(3, MASK_STREAM, number)
        examples.append(make_example(tokens, lengths, OBJECTIVES[objective], MaskingConfig(), 0.4, vocabulary, masks))
    return collate(examples, segments, OBJECTIVES[objective], documents_attend_across=False, restart_positions=True)


def dense_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, lengths: list[int], causal: bool) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) v over a whole row in float64, with a mask of who is in whose document."""
    document = np.repeat(np.arange(len(lengths)), lengths)
    sees = document[:, None] == document[None]
    if causal:
        sees &= np.tri(len(document), dtype=bool)
    key, value = (np.repeat(array, HEADS // GROUPS, axis=1) for array in (key, value))
    scores = np.where(sees[None], np.einsum("qhd,khd->hqk", query, key) / np.sqrt(WIDTH), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), value).reshape(len(document), -1)


@pytest.fixture(scope="module")
def core_attention() -> Any:
    """`DocumentAttention` that is handed the keys and values that it would have gathered."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ext.model.attention import DocumentAttention

    config = TransformerConfig(num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_query_groups=GROUPS)
    return DocumentAttention(config, pg_collection=SimpleNamespace(cp=SimpleNamespace(size=lambda: 1)))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8, 48])
@pytest.mark.parametrize("objective", ["clm", "mlm"])
@pytest.mark.parametrize("name", SEGMENTS)
def test_attention_over_parts_equals_the_dense_one(core_attention: Any, name: str, objective: str, parts: int) -> None:
    from megatron_ext.model.attention import AttentionLayout

    batch = make_batch(name, objective)
    generator = torch.Generator().manual_seed(1)
    tokens = 2 * LENGTH
    query, key, value = (torch.randn(tokens, 1, n, WIDTH, generator=generator) for n in (HEADS, GROUPS, GROUPS))
    lengths = [length for sample in SEGMENTS[name] for length in sample]
    expected = dense_attention(*(x.squeeze(1).double().numpy() for x in (query, key, value)), lengths, batch.causal)
    found = []
    for number in range(parts):
        layout = AttentionLayout.of(batch.part(number, parts))
        own = slice(number * tokens // parts, (number + 1) * tokens // parts)
        seen = slice(layout.first_key, layout.first_key + sum(layout.key_lengths))
        assert layout.cu_seqlens_q.tolist() == np.cumsum([0, *layout.segment_lengths]).tolist()
        assert layout.cu_seqlens_kv.tolist() == np.cumsum([0, *layout.key_lengths]).tolist()
        assert (layout.max_seqlen_q, layout.max_seqlen_kv) == (max(layout.segment_lengths), max(layout.key_lengths))
        found.append(core_attention(query[own], key[seen], value[seen], None, packed_seq_params=layout))
    np.testing.assert_allclose(torch.cat(found).squeeze(1).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("objective", ["clm", "mlm", "mntp"])
@pytest.mark.parametrize("name", SEGMENTS)
def test_parts_add_up_to_the_whole(name: str, objective: str, parts: int) -> None:
    batch = make_batch(name, objective)
    pieces = [batch.part(number, parts) for number in range(parts)]
    size = 2 * LENGTH // parts
    for field in ("input_ids", "position_ids", "target_ids"):
        assert torch.equal(torch.cat([getattr(piece, field) for piece in pieces]), getattr(batch, field))
    places = [piece.target_positions + number * size for number, piece in enumerate(pieces)]
    assert torch.equal(torch.cat(places), batch.target_positions)
    assert all(sum(piece.segment_lengths) == size for piece in pieces)
    attended = [attended_length(piece.segment_lengths, piece.causal, piece.keys and piece.keys.lengths) for piece in pieces]
    assert sum(attended) == attended_length(batch.segment_lengths, batch.causal)


def test_masks_have_transformer_engines_names() -> None:
    from megatron_ext.model.attention import AttentionLayout, mask_type

    names = {}
    for objective in ("clm", "mlm"):
        batch = make_batch("short and long", objective)
        for part in (batch, batch.part(1, 4)):
            layout = AttentionLayout.of(part)
            names[objective, layout.is_cut] = (mask_type(layout, "local"), mask_type(layout, "transformer_engine"))
    assert names == {
        ("clm", False): ("causal", "padding_causal"),
        ("clm", True): ("causal_bottom_right", "padding_causal_bottom_right"),
        ("mlm", False): ("no_mask", "padding"),
        ("mlm", True): ("no_mask", "padding"),
    }
