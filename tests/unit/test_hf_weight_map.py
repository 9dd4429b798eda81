"""Names and layouts of the exported tensors, against transformers' own models and against row labels."""

import dataclasses

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.hf.families import FAMILIES, choose_family
from megatron_ext.hf.weight_files import parse_size, plan_shards
from megatron_ext.hf.weight_map import SplitGateUp, SplitQKV, StripVocabularyPadding, build_mappings
from megatron_ext.model.presets import EncoderConfig

SHAPES = {
    "plain": EncoderConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=4, head_dim=8),
    "grouped": EncoderConfig(
        num_layers=3, hidden_size=48, ffn_hidden_size=80, num_attention_heads=6, num_query_groups=2, head_dim=16
    ),
    "tied": EncoderConfig(
        num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=1, head_dim=8, tie_embeddings=True
    ),
}

REPRESENTED = {
    *((family, frozenset(extras)) for family in ("eurobert", "llama") for extras in ([], ["qkv_bias"])),
    ("mistral", frozenset()),
    ("qwen2", frozenset(["qkv_bias"])),
    *(
        (family, frozenset(extras))
        for family in ("qwen3", "qwen3-bidirectional")
        for extras in (["qk_norm"], ["qkv_bias", "qk_norm"])
    ),
}
"""Which family has which of the two extras."""


def test_qkv_rows_go_to_their_heads():
    heads, groups, width = 6, 2, 4
    labels, rows = [], []
    for group in range(groups):
        kinds = [("q", group * 3 + i) for i in range(3)] + [("k", group), ("v", group)]
        labels += [(kind, head, row) for kind, head in kinds for row in range(width)]
    rows = torch.arange(len(labels), dtype=torch.float32)[:, None].expand(-1, 10).contiguous()
    parts = SplitQKV(heads, groups, width, 10).to_hf(rows)
    for kind, part, count in zip("qkv", parts, (heads, groups, groups), strict=True):
        expected = [(kind, head, row) for head in range(count) for row in range(width)]
        assert [labels[int(value)] for value in part[:, 0]] == expected


def test_gate_comes_before_up():
    gate, up = SplitGateUp(3, 2).to_hf(torch.arange(12.0).view(6, 2))
    assert gate.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert up.tolist() == [[6, 7], [8, 9], [10, 11]]


def test_padding_rows_are_dropped():
    (stripped,) = StripVocabularyPadding(1003, 1024, 2).to_hf(torch.arange(2048.0).view(1024, 2))
    assert torch.equal(stripped, torch.arange(2006.0).view(1003, 2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("extras", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"qkv_bias": True, "qk_norm": True}], ids=str)
def test_table_names_every_weight_of_the_transformers_class(family, shape, extras):
    import transformers

    encoder = dataclasses.replace(SHAPES[shape], **extras)
    if FAMILIES[family].refusal(encoder):
        assert (family, frozenset(extras)) not in REPRESENTED
        return
    assert (family, frozenset(extras)) in REPRESENTED
    config = getattr(transformers, FAMILIES[family].config_class)(
        vocab_size=1003,
        hidden_size=encoder.hidden_size,
        intermediate_size=encoder.ffn_hidden_size,
        num_hidden_layers=encoder.num_layers,
        num_attention_heads=encoder.num_attention_heads,
        num_key_value_heads=encoder.num_query_groups,
        head_dim=encoder.head_dim,
        tie_word_embeddings=encoder.tie_embeddings,
        attention_bias=encoder.qkv_bias,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = getattr(transformers, FAMILIES[family].architecture)(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    mapped = dict(FAMILIES[family].zero_tensors(encoder))
    for mapping in build_mappings(encoder, 1003, 1024):
        tensors = mapping.to_hf(torch.empty(mapping.converter.megatron_shape, device="meta"))
        assert [tuple(tensor.shape) for tensor in tensors.values()] == list(mapping.converter.hf_shapes)
        assert not mapped.keys() & tensors.keys()
        mapped |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert mapped == expected


EXPORTED_AS = {  # origin, its extras -> the family after causal training, after bidirectional training
    ("eurobert", frozenset()): ("llama", "eurobert"),
    ("llama", frozenset()): ("llama", "eurobert"),
    ("llama", frozenset(["qkv_bias"])): ("llama", "eurobert"),
    ("mistral", frozenset()): ("mistral", "eurobert"),
    ("qwen2", frozenset(["qkv_bias"])): ("qwen2", "eurobert"),
    ("qwen3", frozenset(["qk_norm"])): ("qwen3", "qwen3-bidirectional"),
    ("qwen3-bidirectional", frozenset(["qk_norm"])): ("qwen3", "qwen3-bidirectional"),
    (None, frozenset()): ("llama", "eurobert"),
    (None, frozenset(["qkv_bias"])): ("llama", "eurobert"),
    (None, frozenset(["qk_norm"])): ("qwen3", "qwen3-bidirectional"),
    (None, frozenset(["qk_norm", "qkv_bias"])): ("qwen3", "qwen3-bidirectional"),
}


@pytest.mark.parametrize(("origin", "extras"), EXPORTED_AS)
def test_a_model_leaves_as_what_it_came_as_unless_its_attention_changed(origin, extras):
    encoder = dataclasses.replace(SHAPES["grouped"], **dict.fromkeys(extras, True))
    for causal, expected in zip((True, False), EXPORTED_AS[origin, extras], strict=True):
        assert choose_family("auto", encoder, causal, origin).name == expected
    for family in FAMILIES.values():
        if family.causal:
            with pytest.raises(UserError, match=f"last step was bidirectional.*; use {EXPORTED_AS[origin, extras][1]}$"):
                choose_family(family.name, encoder, False, origin)
        if (family.name, extras) not in REPRESENTED:
            with pytest.raises(UserError, match="unlike this checkpoint"):
                choose_family(family.name, encoder, True, origin)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_give_the_same_numbers(shape):
    encoder = dataclasses.replace(SHAPES[shape], qkv_bias=True, qk_norm=True)
    for mapping in build_mappings(encoder, 1003, 1003):
        tensor = torch.randn(mapping.converter.megatron_shape)
        parts = tuple(part.clone() for part in mapping.to_hf(tensor).values())
        assert torch.equal(mapping.from_hf(parts), tensor)


def test_shards_keep_order_and_limit():
    mappings = build_mappings(SHAPES["grouped"], 1003, 1024)
    shards = plan_shards(mappings, itemsize=2, largest_file=60_000)
    assert [mapping for shard in shards for mapping in shard] == mappings
    assert len(shards) > 3
    for shard in shards:
        assert len(shard) == 1 or sum(mapping.parameters for mapping in shard) * 2 <= 60_000


def test_sizes_are_decimal():
    assert (parse_size("5GB"), parse_size("500 mb"), parse_size("1234")) == (5 * 10**9, 500 * 10**6, 1234)
