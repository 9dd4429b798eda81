"""An encoder out of a Hugging Face folder, looking both ways or only back, whatever it was trained last with."""

from pathlib import Path
from typing import Any, Literal

from megatron_ext.errors import UserError, one_line

Attention = Literal["bidirectional", "causal"]
CLASSES = {"bidirectional": "EuroBert", "causal": "Llama"}
TWINS = {"eurobert", "llama"}
"""Model types with the same weights under the same names: one looks both ways, the other back."""


def load_backbone(folder: Path, attention: Attention) -> Any:
    """The model without its language-model head, in float32.

    Raises:
        UserError: the folder holds no model, or not all of its weights, or one whose attention cannot be chosen.
    """
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # that the language-model head is left out is meant
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {folder}: there is no config.json in it")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model_class: Any = AutoModel
        if config.model_type in TWINS:
            config = _twin(config, attention)
            model_class = getattr(transformers, f"{CLASSES[attention]}Model")
        elif attention == "causal":
            raise UserError(f"--model {folder} is a {config.model_type}: its attention cannot be made causal")
        model, found = model_class.from_pretrained(
            folder,
            config=config,
            dtype="float32",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {folder} cannot be loaded: {one_line(error)}") from None
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"--model {folder}: its files lack {len(missing)} weights, such as {missing[0]}")
    if attention == "bidirectional" and config.model_type not in TWINS and not _sees_both_ways(model):
        raise UserError(f"--model {folder} is a {config.model_type} that sees only back, and none of {', '.join(sorted(TWINS))}")
    return model


def _sees_both_ways(model: Any) -> bool:
    """Whether what comes last is noticed by what comes first."""
    import torch

    model.eval()
    with torch.no_grad():
        first, other = (model(input_ids=torch.tensor([[5, 6, 7, last]])).last_hidden_state[0, 0] for last in (8, 9))
    return not torch.allclose(first, other, rtol=1e-6, atol=1e-7)


def _twin(config: Any, attention: Attention) -> Any:
    """The same sizes as the class that looks as it should."""
    import transformers

    wanted = getattr(transformers, f"{CLASSES[attention]}Config")
    left_out = ("model_type", "architectures", "is_causal", "use_cache")
    return wanted(**{name: value for name, value in config.to_dict().items() if name not in left_out}, use_cache=False)


def load_tokenizer(folder: Path) -> Any:
    """Its tokenizer, which must know where in the text each token is.

    Raises:
        UserError: there is none, or a slow one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder} has no tokenizer that can be loaded: {one_line(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"--model {folder} has a tokenizer without offsets (no tokenizer.json): convert it to a fast one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def between(tokenizer: Any) -> str:
    """What stands after the first of two texts where the tokenizer puts nothing there by itself."""
    return "" if tokenizer.sep_token else tokenizer.eos_token or ""
