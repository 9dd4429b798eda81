"""A checkpoint of megatron-core's own GPTModel, as Megatron-LM writes it, read one layer's tensor at a time without megatron.

Its format is that of our checkpoints, `torch_dist`. What differs: homogeneous layers are stacked into one tensor, the shape stands
in the arguments of the training, and there is no tokenizer.
"""

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ext.checkpoint_files import file_sum
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.errors import UserError, one_line, warn
from megatron_ext.hf.checkpoint_reader import CheckpointReader
from megatron_ext.hf.families import choose_family
from megatron_ext.hf.import_config import ImportedConfig
from megatron_ext.hf.mask_token import copy_tokenizer
from megatron_ext.hf.stock_shape import stock_encoder
from megatron_ext.hf.stored_arguments import read_arguments
from megatron_ext.hf.verification_error import VerificationError
from megatron_ext.hf.verify import PROBE_LENGTH, UNMOVED, ReferenceLogits, verification_rows
from megatron_ext.hf.weight_map import Mapping, is_vocabulary
from megatron_ext.model.presets import EncoderConfig
from megatron_ext.regular_file import read_small_file
from megatron_ext.unpickling import COMMON_FILE, INDEX_FILE, read_index

LATEST_FILE = "latest_checkpointed_iteration.txt"
LARGEST_LATEST = 64
LAYERS = "decoder.layers."
IGNORED = re.compile(r"(chained_\d+\.)?optimizer\..*|.*\._extra_state(/.*)?|rng_state.*|rerun_state_machine_state.*")
"""Keys of what is no weight: the optimizer's state, Transformer Engine's, the random generators'."""

DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
"""Stored -> imported: half precision becomes float32, which holds its every value."""


@dataclass(frozen=True)
class StockVerification:
    """What a successful verification of an imported stock checkpoint found."""

    tensors: int
    """Tensors that were read back and are the source's, bit by bit."""
    first_position_change: float
    """Largest change of the first position's logits when the last token is another one."""


def is_stock_checkpoint(folder: Path) -> bool:
    """Whether a folder is one of megatron's checkpoints, or a training's folder of them."""
    return (folder / INDEX_FILE).is_file() or (folder / LATEST_FILE).is_file()


class StockSource:
    """What `import_model` needs to know of a stock checkpoint."""

    def __init__(self, folder: Path, tokenizer: Path, model_fields: dict[str, Any] | None):
        """Read the index, the arguments and the tokenizer.

        Args:
            folder: `iter_*`, or the folder above it, whose latest checkpoint is taken.
            tokenizer: a SentencePiece `.model` file, or a folder with a Hugging Face tokenizer.
            model_fields: what the user's `model` section sets, if there is one.

        Raises:
            UserError: the checkpoint is damaged, its model none that can be represented, or the tokenizer not its own.
        """
        self.folder = folder if (folder / INDEX_FILE).is_file() else _latest(folder)
        self._index = read_index(self.folder)
        self._tensors = {
            key: entry
            for key, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not IGNORED.fullmatch(key)
        }
        self._tokenizer = tokenizer
        stored = read_arguments(self.folder, self._index)
        encoder = stock_encoder(self.folder, stored.values, model_fields)
        self._check_layers(encoder)
        self.config = ImportedConfig(choose_family("auto", encoder, True, None), encoder, self._rows(stored.values or {}))
        names = {info.relative_path for info in self._index.storage_data.values()} | {INDEX_FILE, COMMON_FILE}
        self._files = [self.folder / name for name in sorted(names) if (self.folder / name).is_file()]
        named = re.fullmatch(r"iter_(\d+)", self.folder.name)
        iteration = stored.iteration if stored.iteration is not None or named is None else int(named[1])
        self.origin = {"source": "megatron", "iteration": iteration}

    def copy_tokenizer(self, target: Path) -> Path:
        """Put the tokenizer into a new folder; returns what to load it from."""
        if self._tokenizer.is_dir():
            copy_tokenizer(self._tokenizer, target)
            return target
        target.mkdir()
        return Path(shutil.copy(self._tokenizer, target))

    def sums(self) -> dict[str, str]:
        """See `import_model.Source`."""
        return {path.name: file_sum(path) for path in self._files}

    def check(self, mappings: list[Mapping]) -> None:
        """Hold names, shapes and dtypes against the table, so that nothing is left out or made up.

        Raises:
            UserError: naming the first that differs.
        """
        keys = {mapping.megatron_key: self._locate(mapping)[0] for mapping in mappings}
        if missing := [key for key in keys.values() if key not in self._tensors]:
            raise UserError(f"checkpoint {self.folder} lacks {missing[0]}, which a model of its shape has")
        if extra := self._tensors.keys() - set(keys.values()):
            raise UserError(f"checkpoint {self.folder} cannot be imported: it holds {min(extra)}, which no model of its shape has")
        for mapping in mappings:
            key, chunk = self._locate(mapping)
            stored = self._tensors[key]
            whole = (self.config.encoder.num_layers, *chunk.sizes[1:]) if self._is_stacked(mapping) else tuple(chunk.sizes)
            if is_vocabulary(mapping):
                whole = (max(stored.size[0], whole[0]), *whole[1:])
            if tuple(stored.size) != whole:
                raise UserError(
                    f"checkpoint {self.folder}: {key} has the shape {list(stored.size)}, a model of its shape has {list(whole)}"
                )
            if stored.properties.dtype not in DTYPES:
                allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                raise UserError(f"checkpoint {self.folder}: {key} is stored as {stored.properties.dtype}: allowed are {allowed}")

    def dtype(self, mapping: Mapping) -> torch.dtype:
        """Of the tensor in the new checkpoint."""
        return DTYPES[self._tensors[self._locate(mapping)[0]].properties.dtype]

    def read(self, mapping: Mapping) -> Tensor:
        """One tensor in megatron's layout and its stored dtype; of the vocabulary, the tokens' rows alone.

        Only the layer's own part of a stack is read, as far as the files keep the layers apart (megatron's do).

        Raises:
            UserError: the files that hold it are missing or damaged.
        """
        key, chunk = self._locate(mapping)
        # What no file holds stays NaN, which is refused later.
        tensor = torch.full(chunk.sizes, math.nan, dtype=self._tensors[key].properties.dtype)
        try:
            _read_chunk(self.folder, self._index, key, chunk, tensor)
        except Exception as error:  # missing files, short reads, damaged archives
            raise UserError(f"checkpoint {self.folder}: tensor {key} cannot be read ({one_line(error)})") from None
        return tensor[0] if self._is_stacked(mapping) else tensor

    def verify(
        self, checkpoint: Path, mappings: list[Mapping], tokenizer: Tokenizer, reference_logits: ReferenceLogits
    ) -> StockVerification:
        """Hold a new checkpoint against this one, bit by bit but for the mask token's row, and see that it runs causal.

        Raises:
            VerificationError: a tensor differs, or the training code sees ahead.
        """
        reader = CheckpointReader(checkpoint)
        for mapping in mappings:
            written, source = reader.read(mapping.megatron_key), self.read(mapping).to(self.dtype(mapping))
            skipped = tokenizer.mask_id if is_vocabulary(mapping) else None
            before, after = (len(source), len(source)) if skipped is None else (skipped, skipped + 1)
            is_equal = torch.equal(written[:before], source[:before])
            if not (is_equal and torch.equal(written[after : len(source)], source[after:])):
                raise VerificationError(f"verification failed: {mapping.megatron_key} is not what {self.folder} holds")
        length = min(PROBE_LENGTH, self.config.encoder.max_position_embeddings)
        return StockVerification(len(mappings), _check_causal(checkpoint, tokenizer, length, reference_logits))

    def _locate(self, mapping: Mapping) -> tuple[str, ChunkStorageMetadata]:
        """Key of the stored tensor, and which part of it the table's tensor is."""
        shape = mapping.converter.megatron_shape
        if is_vocabulary(mapping):
            shape = (self.config.vocab_size, *shape[1:])
        if not self._is_stacked(mapping):
            return mapping.megatron_key, ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
        layer, _, name = mapping.megatron_key.removeprefix(LAYERS).partition(".")
        return LAYERS + name, ChunkStorageMetadata(torch.Size([int(layer), *[0] * len(shape)]), torch.Size([1, *shape]))

    def _is_stacked(self, mapping: Mapping) -> bool:
        return mapping.megatron_key.startswith(LAYERS) and mapping.megatron_key not in self._tensors

    def _check_layers(self, encoder: EncoderConfig) -> None:
        """Before a table is made of the layers, which nothing else bounds."""
        layers: set[int] = set()
        for key, entry in self._tensors.items():
            if key.startswith(LAYERS):
                number = re.match(r"\d{1,6}(?=\.)", key.removeprefix(LAYERS))
                layers.add(int(number[0]) + 1 if number else (*entry.size, 0)[0])
        if max(layers, default=0) != encoder.num_layers:
            raise UserError(f"checkpoint {self.folder} holds {max(layers, default=0)} layers, its shape has {encoder.num_layers}")

    def _rows(self, arguments: dict[str, Any]) -> int:
        """Rows that belong to tokens; more of them than padding explains are worth a word."""
        key = "embedding.word_embeddings.weight"
        if key not in self._tensors:
            raise UserError(f"checkpoint {self.folder} lacks {key}: it is none of a GPTModel")
        rows, ids = self._tensors[key].size[0], load_tokenizer(self._tokenizer).vocab_size
        if ids > rows:
            raise UserError(f"tokenizer {self._tokenizer} has {ids} ids, the embedding of checkpoint {self.folder} {rows} rows")
        factors = (arguments.get("make_vocab_size_divisible_by"), arguments.get("tensor_model_parallel_size"))
        if all(type(factor) is int for factor in factors) and rows - ids >= math.prod(factors):
            warn(f"the checkpoint has {rows} rows and the tokenizer {ids} ids, more apart than padding explains: is it its own?")
        return ids


def _latest(folder: Path) -> Path:
    """The checkpoint that a training's folder names as its latest."""
    path = folder / LATEST_FILE
    try:
        word = read_small_file(path, LARGEST_LATEST).decode("ascii").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)})") from None
    if word != "release" and not re.fullmatch(r"\d{1,12}", word):
        raise UserError(f"{path} names {word!r:.40}: a number of iterations is needed, or release")
    latest = folder / (word if word == "release" else f"iter_{int(word):07d}")
    if not (latest / INDEX_FILE).is_file():
        raise UserError(f"{path} names {latest.name}, which is no checkpoint in the format torch_dist: it has no {INDEX_FILE}")
    return latest


class _Planner(DefaultLoadPlanner):
    """Puts what is read into one tensor, which is a part of a stored one."""

    def __init__(self, target: Tensor):
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The place of one piece in the target."""
        place = tuple(slice(start, start + size) for start, size in zip(read_item.dest_offsets, read_item.lengths, strict=True))
        return self._target[place]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It was written in place."""


def _read_chunk(folder: Path, index: Metadata, key: str, chunk: ChunkStorageMetadata, target: Tensor) -> None:
    """Read a part of a stored tensor; torch's reader is driven directly, so that it never unpickles the index."""
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(index, is_coordinator=True)
    items = create_read_items_for_chunk_list(key, index.state_dict_metadata[key], [chunk])
    plan = reader.prepare_local_plan(LoadPlan(items))
    reader.read_data(plan, _Planner(target)).wait()


def _check_causal(checkpoint: Path, tokenizer: Tokenizer, length: int, reference_logits: ReferenceLogits) -> float:
    """Put another last token: the training code's logits at the first position must stay, those at the last must move."""
    probe = verification_rows(tokenizer, length, masked=False)[0]
    last = next(index for index in range(tokenizer.vocab_size) if index not in tokenizer.special_ids and index != probe[-1])
    before, after = reference_logits(checkpoint, [probe, [*probe[:-1], last]])
    changes = (before - after).abs().amax(dim=-1)
    if not torch.isfinite(changes).all() or not changes[0] <= UNMOVED < changes[-1]:
        raise VerificationError(
            f"verification failed: with another last token the first position's logits move by {changes[0]:.3g} and the last one's "
            f"by {changes[-1]:.3g}; a causal model moves the last one's alone"
        )
    return changes[0].item()
