"""The model on one rank: head, attention and weights against dense torch and transformers, sizes against the study's table.

Everything that needs a process group is measured in one process of its own and compared here.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_ext.config import MaskingConfig, ModelConfig, ParallelConfig, TrainingConfig
from megatron_ext.data.batch import MicroBatch, collate
from megatron_ext.errors import UserError
from megatron_ext.model.flops import attended_length, count_parameters, training_flops
from megatron_ext.model.presets import PRESETS, EncoderConfig, build_encoder_config
from megatron_ext.objective import MASK_STREAM, OBJECTIVES, Vocabulary, make_example, random_generator
from megatron_ext.runtime.launch import run_on_ranks

VOCAB_SIZE = 101  # padded to 128
ENCODER = EncoderConfig(
    num_layers=3,
    hidden_size=42,
    ffn_hidden_size=56,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=8,  # not 42 / 6
    rotary_base=700.0,
    norm_epsilon=1e-4,
    init_std=0.15,
    max_position_embeddings=64,
)
DOCUMENTS = (9, 1, 14, 8)
LENGTH = sum(DOCUMENTS)
VOCABULARY = Vocabulary(1, np.arange(VOCAB_SIZE) < 5, np.ones(VOCAB_SIZE, dtype=bool))
HEAD_ROWS = 37
# Logits alive at once: all 37 rows in one chunk, exactly one row a chunk, five rows a chunk, less than a row.
CHUNKS = {"one chunk": 2**25, "a row": 128, "five rows": 5 * 128 + 3, "less than a row": 7}


def make_tokens(seed: int = 0, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, VOCAB_SIZE, size=length)


def make_batch(
    tokens: np.ndarray, objective: str, documents: tuple[int, ...] = DOCUMENTS, across: bool = False, restart: bool = True
) -> MicroBatch:
    """One sample under an objective, as the loader would make it."""
    generator = random_generator(3, MASK_STREAM, 0)
    segments = np.array(documents)
    example = make_example(tokens, segments, OBJECTIVES[objective], MaskingConfig(), 0.4, VOCABULARY, generator)
    return collate([example], [segments], OBJECTIVES[objective], documents_attend_across=across, restart_positions=restart)


def plain(batch: MicroBatch, tokens: np.ndarray) -> MicroBatch:
    """The same batch with uncorrupted input."""
    return dataclasses.replace(batch, input_ids=torch.from_numpy(tokens))


# --- measured in a process of its own -------------------------------------------------------------------------------------


def measure() -> dict[str, Any]:
    from megatron_ext.runtime.backend import choose_backend
    from megatron_ext.runtime.topology import check_layout, initialize

    layout, backend = check_layout(ParallelConfig(), TrainingConfig(), ENCODER.num_layers, {}, 1), choose_backend("local")
    initialize(layout, backend)
    build = _Builder(layout, backend)
    model = build(ENCODER)
    return {
        "weights": _weights(model),
        "logits": _measure_logits(model),
        "head": _measure_head(model),
        "gradients": _measure_gradients(model),
        "other seed": _weights(build(ENCODER, seed=4)),
        "again": _weights(build(ENCODER)),
        "fewer layers": _weights(build(dataclasses.replace(ENCODER, num_layers=2))),
        "tied": _weights(build(dataclasses.replace(ENCODER, tie_embeddings=True))),
        "tied logits": _logits(build(dataclasses.replace(ENCODER, tie_embeddings=True)), make_batch(make_tokens(), "clm")),
    }


class _Builder:
    def __init__(self, layout: Any, backend: Any):
        self.layout, self.backend = layout, backend

    def __call__(self, encoder: EncoderConfig, seed: int = 3) -> Any:
        from megatron_ext.train.build import build_model

        return build_model(encoder, VOCAB_SIZE, self.layout, self.backend, torch.float32, seed)[0]


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _logits(model: Any, batch: MicroBatch) -> torch.Tensor:
    """[t, vocab_size]."""
    with torch.no_grad():
        return model(batch, return_logits=True)[:, :VOCAB_SIZE].clone()


def _measure_logits(model: Any) -> dict[Any, Any]:
    tokens = make_tokens()
    results: dict[Any, Any] = {}
    for objective in OBJECTIVES:
        for across in (False, True):
            batch = plain(make_batch(tokens, objective, across=across), tokens)
            results[objective, across] = _logits(model, batch)
            for position in range(LENGTH):
                changed = tokens.copy()
                changed[position] = 5 + (changed[position] - 4) % (VOCAB_SIZE - 5)
                results[objective, across, position] = _logits(model, plain(batch, changed))
        ends = np.cumsum([0, *DOCUMENTS])
        for number, length in enumerate(DOCUMENTS):
            alone = tokens[ends[number] : ends[number + 1]]
            results[objective, "alone", number] = _logits(model, plain(make_batch(alone, objective, (length,)), alone))
        whole = plain(make_batch(tokens, objective, (LENGTH,)), tokens)
        results[objective, "whole"] = _logits(model, whole)
        results[objective, "restarted"] = _logits(model, plain(make_batch(tokens, objective, across=True, restart=True), tokens))
        results[objective, "counted on"] = _logits(model, plain(make_batch(tokens, objective, across=True, restart=False), tokens))
    return results


def _measure_head(model: Any) -> dict[str, Any]:
    """Loss and gradients of the sparse head for several chunk sizes, and its inputs."""
    from megatron_ext.model import head

    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(LENGTH * 2, 1, ENCODER.hidden_size, generator=generator) * 3
    positions = torch.sort(torch.randperm(LENGTH * 2, generator=generator)[:HEAD_ROWS]).values
    targets = torch.randint(VOCAB_SIZE, (HEAD_ROWS,), generator=generator)
    weight = model.output_layer.weight
    results: dict[str, Any] = {"hidden": hidden, "positions": positions, "targets": targets, "weight": weight.detach().clone()}
    default, padding = head.LOGITS_PER_CHUNK, weight.detach()[VOCAB_SIZE:].clone()
    cases = [(name, size, 0.0, HEAD_ROWS) for name, size in CHUNKS.items()]
    for name, size, padded_rows, rows in [*cases, ("padding", default["cpu"], 9.0, HEAD_ROWS), ("nothing", default["cpu"], 0.0, 0)]:
        head.LOGITS_PER_CHUNK = {"cpu": size}
        weight.data[VOCAB_SIZE:] = padded_rows
        weight.grad, states = None, hidden.clone().requires_grad_()
        loss = model.output_layer(states, positions[:rows], targets[:rows])
        (loss * 0.5).backward()
        with torch.no_grad():
            without_gradients = model.output_layer(states, positions[:rows], targets[:rows])
        results[name] = (loss.detach(), states.grad.clone(), weight.grad.clone(), without_gradients)
    head.LOGITS_PER_CHUNK, weight.data[VOCAB_SIZE:] = default, padding
    weight.grad = None
    return results


def _measure_gradients(model: Any) -> dict[str, Any]:
    """Loss and gradients of the whole model by objective; also of a batch in which nothing is predicted."""
    results = {}
    tokens = make_tokens()
    nothing = torch.zeros(0, dtype=torch.int64)
    batches = {name: make_batch(tokens, name) for name in OBJECTIVES}
    batches["nothing"] = dataclasses.replace(batches["mlm"], target_positions=nothing, target_ids=nothing)
    for name, batch in batches.items():
        model.zero_grad()
        loss = model(batch)
        loss.backward()
        gradients = {parameter: value.grad.clone() for parameter, value in model.named_parameters()}
        results[name] = {"batch": batch, "loss": float(loss.detach()), "gradients": gradients}
    model.zero_grad()
    return results


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return run_on_ranks(measure, 1)[0]


# --- head -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", CHUNKS)
def test_sparse_head_equals_dense_cross_entropy(measured: dict[str, Any], chunks: str) -> None:
    inputs = measured["head"]
    hidden, weight = inputs["hidden"].clone().requires_grad_(), inputs["weight"].clone().requires_grad_()
    logits = (hidden[:, 0] @ weight.t())[:, :VOCAB_SIZE]
    dense = F.cross_entropy(logits[inputs["positions"]], inputs["targets"], reduction="sum")
    (dense * 0.5).backward()
    loss, grad_hidden, grad_weight, without_gradients = inputs[chunks]
    torch.testing.assert_close(loss, dense.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(without_gradients, loss, rtol=0, atol=0)
    torch.testing.assert_close(grad_hidden, hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_weight, weight.grad, rtol=1e-5, atol=1e-5)


def test_padded_vocabulary_rows_take_no_part(measured: dict[str, Any]) -> None:
    results = measured["head"]
    for plain_value, padded_value in zip(results["one chunk"], results["padding"], strict=True):
        assert torch.equal(plain_value, padded_value), "large values in the padding rows change nothing"
    assert results["padding"][2].shape[0] == 128
    assert not results["padding"][2][VOCAB_SIZE:].any()
    for name in ("clm", "mlm", "mntp"):
        gradients = measured["gradients"][name]["gradients"]
        assert not gradients["output_layer.weight"][VOCAB_SIZE:].any()
        assert not gradients["embedding.word_embeddings.weight"][VOCAB_SIZE:].any()


def test_no_predicted_position_is_legal(measured: dict[str, Any]) -> None:
    loss, grad_hidden, grad_weight, _ = measured["head"]["nothing"]
    assert float(loss) == 0.0
    assert not grad_hidden.any() and not grad_weight.any()
    whole = measured["gradients"]["nothing"]
    assert whole["loss"] == 0.0
    for name, gradient in whole["gradients"].items():
        assert not gradient.any(), name


# --- attention ------------------------------------------------------------------------------------------------------------


def document_of(position: int) -> int:
    return int(np.searchsorted(np.cumsum(DOCUMENTS), position, side="right"))


@pytest.mark.parametrize("across", [False, True], ids=["packed", "across"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_who_sees_whom(measured: dict[str, Any], objective: str, across: bool) -> None:
    """Another token at one position changes the logits of exactly the positions that see it."""
    logits = measured["logits"]
    for position in range(LENGTH):
        change = (logits[objective, across, position] - logits[objective, across]).abs().amax(dim=1)
        for other in range(LENGTH):
            sees = across or document_of(other) == document_of(position)
            if objective == "clm":
                sees = sees and other >= position
            if sees:
                assert change[other] > 1e-6, f"position {other} should see position {position}"
            else:
                assert change[other] == 0, f"position {other} should not see position {position}"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_document_alone_gives_the_same_logits_as_in_a_pack(measured: dict[str, Any], objective: str) -> None:
    packed = measured["logits"][objective, False].split(DOCUMENTS)
    for number, expected in enumerate(packed):
        torch.testing.assert_close(measured["logits"][objective, "alone", number], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_positions_count_on_when_they_do_not_restart(measured: dict[str, Any], objective: str) -> None:
    logits = measured["logits"]
    torch.testing.assert_close(logits[objective, "counted on"], logits[objective, "whole"], rtol=0, atol=1e-5)
    assert (logits[objective, "restarted"] - logits[objective, "whole"]).abs().max() > 1e-3


# --- against transformers ---------------------------------------------------------------------------------------------------


def transformers_model(weights: dict[str, torch.Tensor], causal: bool) -> Any:
    """The same weights in transformers' model, mapped here row by row and not by the package's own converter."""
    from transformers import EuroBertConfig, EuroBertForMaskedLM, LlamaConfig, LlamaForCausalLM

    kind, config_kind = (LlamaForCausalLM, LlamaConfig) if causal else (EuroBertForMaskedLM, EuroBertConfig)
    config = config_kind(
        vocab_size=VOCAB_SIZE,
        hidden_size=ENCODER.hidden_size,
        intermediate_size=ENCODER.ffn_hidden_size,
        num_hidden_layers=ENCODER.num_layers,
        num_attention_heads=ENCODER.num_attention_heads,
        num_key_value_heads=ENCODER.num_query_groups,
        head_dim=ENCODER.head_dim,
        hidden_act="silu",
        rms_norm_eps=ENCODER.norm_epsilon,
        max_position_embeddings=ENCODER.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": ENCODER.rotary_base},
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    model = kind(config).eval()
    width, per_group = ENCODER.head_dim, ENCODER.num_attention_heads // ENCODER.num_query_groups
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:VOCAB_SIZE],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"][:VOCAB_SIZE],
    }
    for layer in range(ENCODER.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        rows = weights[ours + "self_attention.linear_qkv.weight"]
        queries, keys, values, row = [], [], [], 0
        for _ in range(ENCODER.num_query_groups):
            for _ in range(per_group):
                queries.append(rows[row : row + width])
                row += width
            keys.append(rows[row : row + width])
            values.append(rows[row + width : row + 2 * width])
            row += 2 * width
        gate_and_up = weights[ours + "mlp.linear_fc1.weight"]
        state |= {
            theirs + "self_attn.q_proj.weight": torch.cat(queries),
            theirs + "self_attn.k_proj.weight": torch.cat(keys),
            theirs + "self_attn.v_proj.weight": torch.cat(values),
            theirs + "self_attn.o_proj.weight": weights[ours + "self_attention.linear_proj.weight"],
            theirs + "mlp.gate_proj.weight": gate_and_up[: ENCODER.ffn_hidden_size],
            theirs + "mlp.up_proj.weight": gate_and_up[ENCODER.ffn_hidden_size :],
            theirs + "mlp.down_proj.weight": weights[ours + "mlp.linear_fc2.weight"],
            theirs + "input_layernorm.weight": weights[ours + "input_layernorm.weight"],
            theirs + "post_attention_layernorm.weight": weights[ours + "pre_mlp_layernorm.weight"],
        }
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logits_equal_transformers(measured: dict[str, Any], objective: str) -> None:
    model = transformers_model(measured["weights"], OBJECTIVES[objective].causal)
    tokens = torch.from_numpy(make_tokens())
    with torch.no_grad():
        whole = model(input_ids=tokens[None]).logits[0]
        packed = torch.cat([model(input_ids=document[None]).logits[0] for document in tokens.split(DOCUMENTS)])
    assert whole.std() > 0.1
    torch.testing.assert_close(measured["logits"][objective, "whole"], whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(measured["logits"][objective, False], packed, rtol=0, atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_equal_transformers(measured: dict[str, Any], objective: str) -> None:
    model = transformers_model(measured["weights"], OBJECTIVES[objective].causal)
    found = measured["gradients"][objective]
    batch = found["batch"]
    logits = torch.cat([model(input_ids=document[None]).logits[0] for document in batch.input_ids.split(DOCUMENTS)])
    loss = F.cross_entropy(logits[batch.target_positions], batch.target_ids, reduction="sum")
    loss.backward()
    assert len(batch.target_ids) > 5
    assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for ours, theirs in (
        ("embedding.word_embeddings.weight", model.model.embed_tokens.weight),
        ("decoder.layers.0.self_attention.linear_proj.weight", model.model.layers[0].self_attn.o_proj.weight),
        ("decoder.layers.1.mlp.linear_fc2.weight", model.model.layers[1].mlp.down_proj.weight),
        ("decoder.layers.2.pre_mlp_layernorm.weight", model.model.layers[2].post_attention_layernorm.weight),
        ("output_layer.weight", model.lm_head.weight),
    ):
        gradient = found["gradients"][ours][: theirs.shape[0]]
        torch.testing.assert_close(gradient, theirs.grad, rtol=1e-3, atol=1e-4 * float(theirs.grad.abs().max()))


# --- initial weights --------------------------------------------------------------------------------------------------------


def test_initial_weights_depend_on_seed_and_name_only(measured: dict[str, Any]) -> None:
    weights = measured["weights"]
    assert weights.keys() == measured["again"].keys() == measured["other seed"].keys()
    matrices = [name for name in weights if weights[name].dim() == 2]
    assert len(matrices) == 2 + 4 * ENCODER.num_layers
    for name in weights:
        assert torch.equal(weights[name], measured["again"][name]), name
        assert torch.equal(weights[name], measured["other seed"][name]) == (name not in matrices), name
    residual = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
    for name, tensor in measured["fewer layers"].items():
        # Another depth changes the scale of the residual projections and nothing else.
        scale = (2 / 3) ** 0.5 if name.endswith(residual) else 1.0
        torch.testing.assert_close(tensor * scale, weights[name], rtol=1e-5, atol=1e-7, msg=name)
    drawn = torch.stack([weights[name].flatten()[:200] for name in matrices])
    alike = torch.corrcoef(drawn).abs() - torch.eye(len(matrices))
    assert float(alike.max()) < 0.5, "no two matrices are drawn from the same numbers"


def test_initial_weights_have_the_stated_spread(measured: dict[str, Any]) -> None:
    residual_std = ENCODER.init_std / (2 * ENCODER.num_layers) ** 0.5
    for name, tensor in measured["weights"].items():
        if tensor.dim() == 1:
            assert (tensor == 1).all(), name
            continue
        if "decoder" not in name:
            assert not tensor[VOCAB_SIZE:].any(), "padding rows are zero"
            tensor = tensor[:VOCAB_SIZE]
        expected = residual_std if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else ENCODER.init_std
        assert float(tensor.std()) == pytest.approx(expected, rel=0.1), name
        assert abs(float(tensor.mean())) < 0.1 * expected, name


def test_tied_model_has_one_embedding(measured: dict[str, Any]) -> None:
    tied, untied = measured["tied"], measured["weights"]
    assert untied.keys() - tied.keys() == {"output_layer.weight"}
    assert all(torch.equal(tensor, untied[name]) for name, tensor in tied.items())
    assert measured["tied logits"].shape == (LENGTH, VOCAB_SIZE)
    assert not torch.equal(measured["tied logits"], measured["logits"]["clm", False])


def test_parameters_are_counted_as_built(measured: dict[str, Any]) -> None:
    for name, tied in (("weights", False), ("tied", True)):
        built = sum((t[:VOCAB_SIZE] if "decoder" not in n else t).numel() for n, t in measured[name].items())
        assert count_parameters(dataclasses.replace(ENCODER, tie_embeddings=tied), VOCAB_SIZE).total == built


# --- sizes ------------------------------------------------------------------------------------------------------------------

STUDY_VOCABULARY = 128_256
# Parameters of the blocks (M) and training GFLOP per token at 2,048 tokens: bidirectional with logits everywhere, causal with
# logits everywhere, bidirectional with logits at 40 %; and the parameters with the embedding counted once (M).
STUDY = {
    "210m": (113.2, 1.497, 1.384, 1.142, 211.8),
    "610m": (460.1, 4.383, 4.015, 3.851, 607.9),
    "1b": (966.1, 8.316, 7.721, 7.518, 1188.0),
    "2b": (1811.9, 14.457, 13.551, 13.393, 2108.0),
}


@pytest.mark.parametrize("preset", STUDY)
def test_sizes_and_flops_of_the_study(preset: str) -> None:
    config = PRESETS[preset]()
    blocks, bidirectional, causal, sparse, total = STUDY[preset]
    assert count_parameters(config, STUDY_VOCABULARY).blocks / 1e6 == pytest.approx(blocks, abs=0.05)
    for expected, is_causal, share in ((bidirectional, False, 1.0), (causal, True, 1.0), (sparse, False, 0.4)):
        attended = attended_length(np.array([2048]), is_causal)
        flops = training_flops(config, STUDY_VOCABULARY, tokens=2048, attended=attended, predicted=2048 * share)
        assert flops / 2048 / 1e9 == pytest.approx(expected, abs=0.0006)
    tied = dataclasses.replace(config, tie_embeddings=True)
    assert count_parameters(tied, STUDY_VOCABULARY).total / 1e6 == pytest.approx(total, rel=0.02)
    untied = dataclasses.replace(config, tie_embeddings=False)
    difference = count_parameters(untied, STUDY_VOCABULARY).total - count_parameters(tied, STUDY_VOCABULARY).total
    assert difference == STUDY_VOCABULARY * config.hidden_size


def test_attention_is_counted_over_the_documents() -> None:
    assert attended_length(np.array([3, 5]), causal=False) == 34
    assert attended_length(np.array([3, 5]), causal=True) == 17
    assert attended_length(np.array([2**17] * 4), causal=False) == 4 * 2.0**34, "no overflow"
    config = PRESETS["210m"]()
    packed, whole = (
        training_flops(config, 1000, tokens=2048, attended=attended_length(np.array(lengths), False), predicted=0)
        for lengths in ([1024, 1024], [2048])
    )
    assert whole - packed == pytest.approx(12 * 12 * 768 * (2048**2 - 2 * 1024**2))


def test_preset_with_other_sizes() -> None:
    changed = build_encoder_config(ModelConfig(preset="210m", num_layers=3, hidden_size=384, num_query_groups=4))
    assert (changed.num_layers, changed.hidden_size, changed.head_dim, changed.num_query_groups) == (3, 384, 32, 4)
    assert build_encoder_config(ModelConfig(preset="210m", num_attention_heads=24, head_dim=16)).head_dim == 16
    assert build_encoder_config(ModelConfig(preset="210m", tie_embeddings=True)).tie_embeddings
    assert build_encoder_config(ModelConfig(preset="210m")) == PRESETS["210m"]()
    for wrong, key in (
        (ModelConfig(preset="7b"), "model.preset"),
        (ModelConfig(preset="tiny", num_query_groups=3), "model.num_query_groups"),
        (ModelConfig(preset="tiny", hidden_size=250), "model.hidden_size"),
        (ModelConfig(preset="tiny", head_dim=7), "model.head_dim"),
    ):
        with pytest.raises(UserError, match=key):
            build_encoder_config(wrong)


def test_shape_that_cannot_be_exported_is_refused() -> None:
    """transformers' configurations want a width that the heads divide, whatever the width of a head."""
    with pytest.raises(UserError, match="model.hidden_size 250.*model.num_attention_heads 4"):
        build_encoder_config(ModelConfig(preset="tiny", hidden_size=250, head_dim=64))
