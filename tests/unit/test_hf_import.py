"""Import: logits equal to transformers' own, the same bits back, and a refusal by name where a model cannot be represented."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint_files import find_damage, read_run_file
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.hf.export import export_checkpoint
from megatron_ext.hf.import_config import REASONS
from megatron_ext.hf.import_model import import_model
from megatron_ext.hf.verify import LIMIT
from megatron_ext.train.checkpoint_logits import checkpoint_logits
from tests.unit.hf_models import RECIPES, Recipe, weights_of, write_model
from tests.unit.test_hf_export import tokenizer_file  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Any:  # noqa: F811
    return load_tokenizer(tokenizer_file).to_fast()


@pytest.mark.parametrize("name", RECIPES)
def test_logits_are_those_of_transformers_and_the_bits_come_back(name: str, tokenizer: Any, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    model = write_model(tmp_path / "model", recipe, tokenizer, max_shard_size="150KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    report = import_model(tmp_path / "model", tmp_path / "checkpoint", reference_logits=checkpoint_logits)
    assert (report.architecture, report.dtype) == (recipe.model_class, recipe.dtype)
    assert report.verification.max_abs_diff < LIMIT and report.verification.tokens > 1000
    assert find_damage(tmp_path / "checkpoint") == {}
    ids = torch.randint(5, 1003, (1, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32).eval()(ids).logits[0]
    (found,) = checkpoint_logits(tmp_path / "checkpoint", ids.tolist())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    exported = export_checkpoint(tmp_path / "checkpoint", tmp_path / "again", reference_logits=checkpoint_logits)
    assert exported.architecture == recipe.model_class
    before, after = weights_of(tmp_path / "model"), weights_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert [key for key in before if before[key].dtype != after[key].dtype or not torch.equal(before[key], after[key])] == []
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("model", "again")]
    for field in ("model_type", "rope_parameters", "head_dim", "tie_word_embeddings", "is_causal", "vocab_size", "rms_norm_eps"):
        assert configs[0].get(field) == configs[1].get(field), field


@pytest.mark.parametrize(
    "recipe, field, word",
    [
        (RECIPES["mistral"], {"sliding_window": 64}, "slides a window of 64 tokens"),
        (RECIPES["llama 2"], {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (RECIPES["llama 2"], {"mlp_bias": True}, "mlp_bias"),
        (RECIPES["llama 2"], {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rule 'yarn'"),
        (RECIPES["llama 2"], {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
        *((RECIPES["llama 2"], {"model_type": kind}, reason) for kind, reason in REASONS.items()),
        (RECIPES["llama 2"], {"model_type": "llamas"}, "does not know it"),
        (RECIPES["llama 2"], {"num_hidden_layers": 5}, "lacks model.layers.4"),
        (RECIPES["llama 2"], {"num_hidden_layers": 3}, "holds model.layers.3"),
        (RECIPES["llama 2"], {"intermediate_size": 96}, "has the shape [80, 96]"),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, Recipe) else value.model_class,
)
def test_what_cannot_be_represented_is_refused_by_name(
    recipe: Recipe, field: dict[str, Any], word: str, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", recipe, tokenizer)
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **field}))
    with pytest.raises(UserError) as caught:
        import_model(tmp_path / "model", tmp_path / "checkpoint")
    assert word in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def without_mask(tokenizer_file: Path, folder: Path, reserved: bool) -> Any:  # noqa: F811
    """The tokenizer without a mask token, with or without an id held in reserve."""
    from transformers import PreTrainedTokenizerFast

    pipeline = json.loads(load_tokenizer(tokenizer_file).to_fast().backend_tokenizer.to_str())
    name = "<|reserved_special_token_0|>" if reserved else "plain"
    for token in pipeline["added_tokens"]:
        if token["content"] == "[MASK]":
            token |= {"content": name, "special": reserved}
    pipeline["model"]["vocab"][name] = pipeline["model"]["vocab"].pop("[MASK]")
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(pipeline))
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("reserved", [True, False])
@pytest.mark.parametrize("spare_rows", [0, 5])
def test_a_mask_token_is_found_a_place_and_round_trips(
    reserved: bool,
    spare_rows: int,
    tokenizer_file: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    tokenizer = without_mask(tokenizer_file, tmp_path / "tokenizer", reserved)
    assert tokenizer.mask_token_id is None
    recipe = Recipe("LlamaConfig", "LlamaForCausalLM", {"vocab_size": 1003 + spare_rows})
    write_model(tmp_path / "model", recipe, tokenizer)
    plain = import_model(tmp_path / "model", tmp_path / "plain", reference_logits=checkpoint_logits)
    assert plain.mask_token is None
    report = import_model(tmp_path / "model", tmp_path / "checkpoint", with_mask_token=True, reference_logits=checkpoint_logits)
    recorded = read_run_file(tmp_path / "checkpoint")["imported"]["mask_token"]
    assert recorded["embedding"] == "mean"
    if reserved:
        assert (recorded["how"], recorded["replaced"]) == ("reserved", "<|reserved_special_token_0|>")
        assert report.vocab_size == 1003 + spare_rows
    else:
        assert (recorded["how"], recorded["id"]) == ("appended", 1003)
        assert report.vocab_size == 1003 + max(spare_rows, 1)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "again", reference_logits=checkpoint_logits)
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert fast.mask_token == "[MASK]" and fast.mask_token_id == recorded["id"]
    assert fast("a [MASK] b", add_special_tokens=False)["input_ids"].count(recorded["id"]) == 1
    before, after = (weights_of(tmp_path / name)["model.embed_tokens.weight"] for name in ("model", "again"))
    special = set(load_tokenizer(tmp_path / "checkpoint/tokenizer").special_ids) | {recorded["id"]}
    ordinary = [index for index in range(1003) if index not in special]
    torch.testing.assert_close(after[recorded["id"]], before[ordinary].mean(dim=0), rtol=1e-5, atol=1e-6)
    others = [index for index in range(len(before)) if index != recorded["id"]]
    assert torch.equal(after[others], before[others])


def test_a_broken_folder_is_one_line(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(UserError, match="there is no such file"):
        import_model(folder, tmp_path / "checkpoint")
    write_model(folder, RECIPES["llama 2"], tokenizer)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read as safetensors"):
        import_model(folder, tmp_path / "checkpoint")
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle, which is not read"):
        import_model(folder, tmp_path / "checkpoint")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    with pytest.raises(UserError, match="only paths inside"):
        import_model(folder, tmp_path / "checkpoint")
