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
from megatron_ext.hf.import_model import import_model
from megatron_ext.hf.mask_token import MaskToken
from megatron_ext.hf.verify import LIMIT
from megatron_ext.train.checkpoint_logits import checkpoint_logits
from tests.unit.hf_models import RECIPES, Recipe, weights_of, write_model
from tests.unit.hf_tokenizers import VOCAB_SIZE, WRITERS, sample_lines
from tests.unit.test_hf_import_config import SPELLINGS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RECIPES)
def test_logits_are_those_of_transformers_and_the_bits_come_back(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    model = write_model(tmp_path / "model", recipe, max_shard_size="150KB")
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


SCALED_DOWN = {
    "vocab_size": VOCAB_SIZE + 5,
    "hidden_size": 72,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
}
HEADS = {"Qwen2.5 0.5B": (6, 2), "SmolLM2 135M": (9, 3), "Qwen3 0.6B": (4, 2), "EuroBERT 210M": (6, 6), "Llama 2 7B": (6, 6)}
TOKENIZERS = {"Llama 2 7B": "llama 2", "Mistral 0.3": "mistral", "Qwen2.5 0.5B": "qwen", "Qwen3 0.6B": "qwen"}


@pytest.mark.parametrize("name", [name for name in SPELLINGS if "oldest" not in name])
def test_a_hub_folder_in_its_own_spelling_computes_the_same(name: str, tmp_path: Path) -> None:
    """The `config.json` of a known model with smaller numbers in it, beside weights of that shape in its dtype."""
    import transformers

    heads, groups = HEADS.get(name, (4, 2))
    tree = SPELLINGS[name][0] | SCALED_DOWN | {"num_attention_heads": heads, "num_key_value_heads": groups}
    if "head_dim" in tree:
        tree |= {"head_dim": 24}
    if name.startswith("EuroBERT"):
        tree |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "mask_token_id": 4}
    if name == "Llama 3.2 1B":  # the verified rows are shorter than the texts that it was trained on
        tree |= {"rope_scaling": tree["rope_scaling"] | {"original_max_position_embeddings": 64}}
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.json").write_text(json.dumps(tree))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "config")
    model = getattr(transformers, tree["architectures"][0])(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, float(parameter.dim() == 1), 0.1)
    dtype = getattr(torch, tree["torch_dtype"])
    model.to(dtype).save_pretrained(tmp_path / "model")
    WRITERS[TOKENIZERS.get(name, "with mask" if name.startswith("EuroBERT") else "llama 3")](tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps(tree))
    report = import_model(tmp_path / "model", tmp_path / "checkpoint", reference_logits=checkpoint_logits)
    assert report.verification is not None and report.verification.max_abs_diff < LIMIT
    assert report.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "again", reference_logits=checkpoint_logits)
    before, after = weights_of(tmp_path / "model"), weights_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].to(report.dtype), after[key]) for key in before)


@pytest.mark.parametrize(
    "field, word",
    [
        ({"num_hidden_layers": 5}, "lacks model.layers.4"),
        ({"num_hidden_layers": 3}, "holds model.layers.3"),
        ({"intermediate_size": 96}, "has the shape [80, 96]"),
        ({"attention_bias": True}, "lacks model.layers.0.self_attn.q_proj.bias"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
        ({"sliding_window": 64, "model_type": "mistral"}, "slides a window of 64 tokens"),
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}, "model_type": "own"}, "does not know it"),
    ],
    ids=str,
)
def test_a_folder_that_is_not_what_its_configuration_says_is_refused(field: dict[str, Any], word: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model", RECIPES["llama 2"])
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **field}))
    with pytest.raises(UserError) as caught:
        import_model(tmp_path / "model", tmp_path / "checkpoint")
    assert word in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("family", "tokenizer"),
    [
        ("llama 2", "llama 2"),
        ("llama 3.x", "llama 3"),
        ("mistral", "mistral"),
        ("qwen2", "qwen"),
        ("qwen2", "llama 3"),  # transformers reads it as a Qwen2Tokenizer, whatever the folder says
        ("qwen3", "llama 3"),
        ("eurobert", "with mask"),
    ],
)
def test_the_checkpoints_tokenizer_gives_the_ids_that_users_of_the_model_get(family: str, tokenizer: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    recipe = RECIPES[family]
    changes = recipe.changes | {"vocab_size": VOCAB_SIZE + 5}  # a Qwen2Tokenizer adds an id of its own where it is missing
    write_model(tmp_path / "model", Recipe(recipe.config_class, recipe.model_class, changes, tokenizer=tokenizer))
    import_model(tmp_path / "model", tmp_path / "checkpoint")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "model"), load_tokenizer(tmp_path / "checkpoint/tokenizer")
    for line in sample_lines():
        if "[" not in line and "<" not in line:  # a quoted special token is text in training
            assert ours.encode(line) == theirs(line, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("spare_rows", [0, 5])
@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("llama 2", None),
        ("llama 3.x", "<|reserved_special_token_0|>"),
        ("mistral", "[control_8]"),
        ("qwen2", None),
        ("qwen2 tied", None),
        ("qwen3", None),
    ],
)
def test_a_mask_token_is_found_a_place_and_round_trips(name: str, replaced: str | None, spare_rows: int, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    recipe = RECIPES[name]
    changes = {**recipe.changes, "vocab_size": VOCAB_SIZE + spare_rows}
    recipe = Recipe(recipe.config_class, recipe.model_class, changes, tokenizer=recipe.tokenizer)
    write_model(tmp_path / "model", recipe)
    source = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert source.mask_token is None
    report = import_model(tmp_path / "model", tmp_path / "checkpoint", with_mask_token=True, reference_logits=checkpoint_logits)
    recorded = read_run_file(tmp_path / "checkpoint")["imported"]["mask_token"]
    mask_id = recorded["id"]
    assert recorded["embedding"] == "mean" and recorded["replaced"] == replaced
    if replaced:
        assert (recorded["how"], mask_id) == ("reserved", source.convert_tokens_to_ids(replaced))
        assert report.vocab_size == VOCAB_SIZE + spare_rows
    else:
        assert (recorded["how"], mask_id) == ("appended", VOCAB_SIZE)
        assert report.vocab_size == VOCAB_SIZE + max(spare_rows, 1), "the embedding grows only where it is full"
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "again", reference_logits=checkpoint_logits)
    fast = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (fast.mask_token, fast.mask_token_id) == ("[MASK]", mask_id)
    begin, end = source("a")["input_ids"], source("a b")["input_ids"][-1]
    # Qwen2's own class in transformers reads every special token without the spaces around it.
    space = source(" ", add_special_tokens=False)["input_ids"] if name.startswith("qwen2") else []
    assert fast("a [MASK] b")["input_ids"] == [*begin, *space, mask_id, end], "the mask takes the space of the piece that it hides"
    assert fast.decode([mask_id]).strip() == "[MASK]"
    text = "All human beings are born free, 1948.\n\tÀ bientôt"
    assert fast(text)["input_ids"] == source(text)["input_ids"]
    if replaced:
        assert replaced not in fast.get_vocab() and len(fast) == len(source)
    check_rows(tmp_path, mask_id)


def check_rows(folder: Path, mask_id: int) -> None:
    """The mask's rows are means of ordinary ones, all others as they were."""
    special = set(load_tokenizer(folder / "checkpoint/tokenizer").special_ids) | {mask_id}
    ordinary = [index for index in range(VOCAB_SIZE) if index not in special]
    before, after = (weights_of(folder / name) for name in ("model", "again"))
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & before.keys():
        mean = before[name][ordinary].mean(dim=0)
        torch.testing.assert_close(after[name][mask_id], mean, rtol=1e-5, atol=1e-6)
        others = [index for index in range(len(before[name])) if index != mask_id]
        assert torch.equal(after[name][others], before[name][others])


def test_without_being_asked_no_mask_token_is_added(tmp_path: Path) -> None:
    write_model(tmp_path / "model", RECIPES["llama 3.x"])
    assert import_model(tmp_path / "model", tmp_path / "checkpoint").mask_token is None
    assert read_run_file(tmp_path / "checkpoint")["imported"]["mask_token"] is None


def test_a_mask_token_that_is_there_is_left_alone(tmp_path: Path) -> None:
    write_model(tmp_path / "model", RECIPES["eurobert"])
    report = import_model(tmp_path / "model", tmp_path / "checkpoint", with_mask_token=True)
    assert report.mask_token == MaskToken("present", 4)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "again")
    before, after = (weights_of(tmp_path / name)["model.embed_tokens.weight"] for name in ("model", "again"))
    assert torch.equal(before, after)


@pytest.mark.parametrize("with_mask_token", [False, True])
def test_a_tokenizer_with_ids_that_have_no_embedding_is_refused(with_mask_token: bool, tmp_path: Path) -> None:
    write_model(tmp_path / "model", Recipe("LlamaConfig", "LlamaForCausalLM", {"vocab_size": 1002}, tokenizer="llama 2"))
    with pytest.raises(UserError, match="its tokenizer has 1003 ids, its embedding 1002 rows"):
        import_model(tmp_path / "model", tmp_path / "checkpoint", with_mask_token=with_mask_token)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_broken_folder_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(UserError, match="there is no such file"):
        import_model(folder, tmp_path / "checkpoint")
    write_model(folder, RECIPES["llama 2"])
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read as safetensors"):
        import_model(folder, tmp_path / "checkpoint")
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle, which is not read"):
        import_model(folder, tmp_path / "checkpoint")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    with pytest.raises(UserError, match="only files of this folder"):
        import_model(folder, tmp_path / "checkpoint")


def test_the_folder_of_a_hub_cache_is_links(tmp_path: Path) -> None:
    """`snapshots/<commit>/` holds links to `blobs/`, weight files and all."""
    write_model(tmp_path / "download", RECIPES["llama 3.x"], max_shard_size="500KB")
    snapshot, blobs = tmp_path / "cache/snapshots/0123", tmp_path / "cache/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((tmp_path / "download").iterdir())):
        path.rename(blobs / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert import_model(snapshot, tmp_path / "checkpoint").parameters > 0
    assert find_damage(tmp_path / "checkpoint") == {}


@pytest.mark.parametrize("name", ["a/b.safetensors", "/b.safetensors", "..", "", "\x1b", 5, "x" * 5000])
def test_an_index_names_files_of_its_folder_alone(name: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "model", RECIPES["llama 3.x"])
    (tmp_path / "model/model.safetensors").unlink()
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json names"):
        import_model(tmp_path / "model", tmp_path / "checkpoint")


def test_parts_of_one_tensor_in_different_dtypes_lose_nothing(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_model(tmp_path / "model", RECIPES["llama 3.x"])
    weights = weights_of(tmp_path / "model")
    query, key = (f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qk")
    weights[query] = weights[query].bfloat16()
    save_file(weights, tmp_path / "model/model.safetensors")
    import_model(tmp_path / "model", tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "again", dtype=torch.float32)
    again = weights_of(tmp_path / "again")
    assert torch.equal(again[key], weights[key]) and torch.equal(again[query], weights[query].float())


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000: it must be a whole number from 1 to 4096"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000: it must be a whole number"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0: it must be"),
        ({"hidden_size": -96}, "hidden_size is -96: it must be"),
        ({"rms_norm_eps": -1.0}, "norm_epsilon is -1.0: it must be"),
        ({"rope_theta": 10**400}, "cannot be read as a configuration"),
        ({"rope_theta": True}, "RoPE has no base"),
        ({"rope_scaling": {"rope_type": ["x"]}}, "cannot be"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_built(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model", RECIPES["llama 2"])
    path = tmp_path / "model/config.json"
    tree = json.loads(path.read_text())
    tree.pop("rope_parameters", None)
    path.write_text(json.dumps({**tree, "rope_theta": 10_000.0, **changes}))
    with pytest.raises(UserError, match=word):
        import_model(tmp_path / "model", tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_generation_settings_and_the_chat_template_come_back(tmp_path: Path) -> None:
    write_model(tmp_path / "model", RECIPES["llama 3.x"])
    settings = {"bos_token_id": 998, "eos_token_id": [999, 1002], "do_sample": True, "temperature": 0.6}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "model/chat_template.jinja").write_text("{{ messages[0].content }}")
    import_model(tmp_path / "model", tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "again")
    again = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert settings.items() <= again.items()
    assert (tmp_path / "again/chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    write_model(tmp_path / "model", RECIPES["llama 2"])
    import_model(tmp_path / "model", tmp_path / "checkpoint")
    path = max((tmp_path / "checkpoint").glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: __0_0.distcp"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "again", reference_logits=checkpoint_logits)
    assert not (tmp_path / "again").exists()
