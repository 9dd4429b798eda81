"""Gives the tokenizer of a decoder the mask token that masked objectives need: one it has, a reserved id, or a new id."""

import json
import re
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_ext.checkpoint_files import TOKENIZER_FILES
from megatron_ext.data.tokenizer import MASK_PIECES, Tokenizer, load_tokenizer
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MASK = "[MASK]"
LONGEST_RESERVED = 100
RESERVED = re.compile(
    r"<[^>]*(reserved|unused|placeholder|extra|special)[^>]*\d+[^>]*>|\[(unused|control_)\d+\]",
    re.IGNORECASE,
)
"""How tokenizers spell ids that were left free for later."""
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True)
class MaskToken:
    """Which id is the mask token, and how it came to be."""

    how: Literal["present", "reserved", "appended"]
    """The tokenizer had one, named as such or not; an id that it held in reserve; an id of its own after all others."""
    id: int
    replaced: str | None = None
    """What the reserved id was called."""


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a model folder's tokenizer files; what `config.json` says of code of its own stays behind.

    Args:
        source: the model folder, whose `config.json` is a JSON object.
        target: a folder that does not exist.
    """
    target.mkdir()
    for path in {path for name in TOKENIZER_FILES for path in source.glob(name)}:
        if path.is_file() and path.name != "config.json":
            shutil.copy(path, target)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # By these transformers chooses the tokenizer's class, for some model types whatever tokenizer_config.json says.
    choice = {name: config[name] for name in ("model_type", "tokenizer_class") if name in config}
    version = metadata.version("transformers")  # without it, it suspects an old Mistral tokenizer of a mistake, and warns
    (target / "config.json").write_text(json.dumps({**choice, "transformers_version": version}))


def check_ids(source: Path, tokenizer: Tokenizer, rows: int) -> None:
    """Hold a model folder's tokenizer against its embedding.

    Raises:
        UserError: there are ids without a row.
    """
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{source} cannot be imported: its tokenizer has {tokenizer.vocab_size} ids, its embedding {rows} rows; the ids from "
            f"{rows} on mean nothing to the model"
        )


def add_mask_token(folder: Path) -> tuple[Tokenizer, MaskToken]:
    """Make sure that the tokenizer in a folder has a mask token; its files are replaced if it has none.

    A new mask token takes the spaces before it along, as the pieces that it stands for begin with them.

    Args:
        folder: holds the files of a tokenizer alone.

    Raises:
        UserError: the tokenizer cannot be read, or has no fast form to be changed.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.mask_id is not None:
        return tokenizer, MaskToken("present", tokenizer.mask_id)
    fast = tokenizer.to_fast()
    pipeline = json.loads(fast.backend_tokenizer.to_str())
    unnamed = next((piece for piece in MASK_PIECES if piece in fast.get_vocab()), None)
    reserved = None if unnamed else _first_reserved(fast, pipeline)
    if reserved is not None:
        _rename(pipeline, reserved)
    changed = _plain(fast, pipeline, unnamed or MASK, reserved)
    shutil.rmtree(folder)  # files of older formats would go on without the mask token
    changed.save_pretrained(folder)
    how = "present" if unnamed else "appended" if reserved is None else "reserved"
    return load_tokenizer(folder), MaskToken(how, changed.mask_token_id, reserved)


def _plain(fast: "PreTrainedTokenizerFast", pipeline: dict[str, Any], mask: str, replaced: str | None) -> "PreTrainedTokenizerFast":
    """A pipeline with the names of the special tokens, and no class of a model type that would build it again in its own way."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as TokenizersPipeline
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=TokenizersPipeline.from_str(json.dumps(pipeline)),
        mask_token=AddedToken(mask, lstrip=True, normalized=False, special=True),
        **{name: getattr(fast, name) for name in NAMED},
        extra_special_tokens=[str(token) for token in fast.extra_special_tokens if str(token) != replaced],
        chat_template=fast.chat_template,
        model_max_length=fast.model_max_length,
        padding_side=fast.padding_side,
        clean_up_tokenization_spaces=False,
    )


def _first_reserved(fast: "PreTrainedTokenizerFast", pipeline: dict[str, Any]) -> str | None:
    """The special token of lowest id that is held in reserve, and that nothing has a use for."""
    used = {getattr(fast, name) for name in NAMED}
    template = json.dumps(pipeline["post_processor"], ensure_ascii=False)
    tokens = sorted((token["id"], token["content"]) for token in pipeline["added_tokens"] if token["special"])
    free = (content for _, content in tokens if content not in used and content not in template)
    return next((content for content in free if len(content) <= LONGEST_RESERVED and RESERVED.fullmatch(content)), None)


def _rename(pipeline: dict[str, Any], old: str) -> None:
    for token in pipeline["added_tokens"]:
        if token["content"] == old:
            token |= {"content": MASK, "lstrip": True}
    vocabulary = pipeline["model"]["vocab"]
    if isinstance(vocabulary, list):  # a Unigram's
        pipeline["model"]["vocab"] = [[MASK, score] if piece == old else [piece, score] for piece, score in vocabulary]
    elif old in vocabulary:
        vocabulary[MASK] = vocabulary.pop(old)
