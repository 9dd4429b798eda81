"""Gives the tokenizer of a decoder the mask token that masked objectives need: one it has, a reserved id, or a new id."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_ext.checkpoint_files import TOKENIZER_FILES
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.errors import UserError

MASK = "[MASK]"
RESERVED = re.compile(r"<[^>]*(reserved|unused|placeholder|extra)[^>]*\d+[^>]*>|\[unused\d+\]", re.IGNORECASE)
"""How tokenizers spell ids that were left free for later."""


@dataclass(frozen=True)
class MaskToken:
    """Which id is the mask token, and how it came to be."""

    how: Literal["present", "reserved", "appended"]
    """The tokenizer had one; an id that it held in reserve; an id of its own after all others."""
    id: int
    replaced: str | None = None
    """What the reserved id was called."""


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a model folder's tokenizer files; what `config.json` says of code of its own stays behind.

    Args:
        source: the model folder.
        target: a folder that does not exist.
    """
    target.mkdir()
    for path in {path for name in TOKENIZER_FILES for path in source.glob(name)}:
        if path.is_file() and path.name != "config.json":
            shutil.copy(path, target)
    config, settings = source / "config.json", target / "tokenizer_config.json"
    names_class = settings.is_file() and "tokenizer_class" in json.loads(settings.read_text(encoding="utf-8"))
    if config.is_file() and not names_class:  # transformers then looks the class up by the model type
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        (target / "config.json").write_text(json.dumps({"model_type": model_type}))


def add_mask_token(folder: Path) -> tuple[Tokenizer, MaskToken]:
    """Make sure that the tokenizer in a folder has a mask token; its files are rewritten if it has none.

    Raises:
        UserError: the tokenizer cannot be read, or has no fast form to be changed.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.mask_id is not None:
        return tokenizer, MaskToken("present", tokenizer.mask_id)
    fast = tokenizer.to_fast()
    pipeline = json.loads(fast.backend_tokenizer.to_str())
    reserved = _first_reserved(pipeline)
    if reserved is None:
        fast.add_special_tokens({"mask_token": MASK})
        fast.save_pretrained(folder)
        changed = load_tokenizer(folder)
        return changed, MaskToken("appended", _id_of(changed, folder))
    _rename(pipeline, reserved)
    fast.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(pipeline, ensure_ascii=False), encoding="utf-8")
    _rename_in_config(folder / "tokenizer_config.json", reserved)
    changed = load_tokenizer(folder)
    return changed, MaskToken("reserved", _id_of(changed, folder), reserved)


def _id_of(tokenizer: Tokenizer, folder: Path) -> int:
    if tokenizer.mask_id is None:
        raise UserError(f"tokenizer {folder}: no mask token can be added to it")
    return tokenizer.mask_id


def _first_reserved(pipeline: dict[str, Any]) -> str | None:
    """The special token of lowest id that is held in reserve."""
    tokens = sorted((token["id"], token["content"]) for token in pipeline["added_tokens"] if token["special"])
    return next((content for _, content in tokens if RESERVED.fullmatch(content)), None)


def _rename(pipeline: dict[str, Any], old: str) -> None:
    for token in pipeline["added_tokens"]:
        if token["content"] == old:
            token["content"] = MASK
    vocabulary = pipeline["model"].get("vocab")
    if isinstance(vocabulary, dict) and old in vocabulary:
        vocabulary[MASK] = vocabulary.pop(old)
    elif isinstance(vocabulary, list):
        pipeline["model"]["vocab"] = [[MASK, score] if piece == old else [piece, score] for piece, score in vocabulary]


def _rename_in_config(path: Path, old: str) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    for token in tree.get("added_tokens_decoder", {}).values():
        if token["content"] == old:
            token["content"] = MASK
    for name in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(tree.get(name), list):
            tree[name] = [token for token in tree[name] if (token.get("content") if isinstance(token, dict) else token) != old]
    path.write_text(json.dumps({**tree, "mask_token": MASK}, ensure_ascii=False, indent=2), encoding="utf-8")
