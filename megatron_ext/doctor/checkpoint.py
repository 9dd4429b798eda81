"""Is a checkpoint whole, and does it hold what its `run.json` says? Files, tensors, counters, tokenizer.

What `run.json` says is held against what can be worked out from its own configuration, and against the files.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.checkpoint_files import RUN_FILE, find_damage, read_run_file, step_of
from megatron_ext.config import RunConfig
from megatron_ext.config_reading import from_dict
from megatron_ext.doctor.optimizer_steps import check_optimizer_steps
from megatron_ext.doctor.report import Report
from megatron_ext.errors import UserError
from megatron_ext.objective import OBJECTIVES, Phase, PhasePlan
from megatron_ext.run_record import LARGEST_COUNT
from megatron_ext.runtime.capabilities import check_apex, installed_version

if TYPE_CHECKING:
    from megatron_ext.hf.checkpoint_reader import CheckpointReader
    from megatron_ext.model.presets import EncoderConfig

MOMENTS = ("optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
"""Prefixes of AdamW's two moments, before the parameter's name."""
UNFINISHED = (".writing-", ".removing-")
BATCH, LENGTH = "training.global_batch_size", "data.sequence_length"
"""Sizes that a resume may change, which samples and tokens follow from."""
MOST_NAMES = 3
"""Tensors named in one line; the others are counted."""


def check_checkpoints(folder: Path) -> Report:
    """Check one checkpoint, or all of a run, the newest last.

    Args:
        folder: a `step_*` directory, a run's `checkpoints` folder, or its output_dir.

    Raises:
        UserError: there is no checkpoint there, or an `apex` that is not NVIDIA's.
    """
    check_apex()
    checkpoints = _find(folder)
    report = Report("checkpoint", {"checkpoints": []})
    for checkpoint in checkpoints:
        found = check_checkpoint(checkpoint)
        name = f"{checkpoint.name}: " if len(checkpoints) > 1 else ""
        report.facts["checkpoints"].append(found.facts)
        report.problems += [name + line for line in found.problems]
        report.notes += [name + line for line in found.notes]
    if checkpoints[0] != folder:
        for path in sorted(path for path in checkpoints[0].parent.iterdir() if path.name.startswith(UNFINISHED)):
            report.notes.append(f"{path} was left by a run that was stopped; it may be removed when no run is going on")
    return report


def _find(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"--checkpoint {folder}: there is no such folder")
    if (folder / RUN_FILE).is_file() or step_of(folder) >= 0:
        return [folder]
    for parent in (folder, folder / "checkpoints"):
        # A step_* folder that lacks its run.json is a finding, not nothing.
        found = sorted(path for path in parent.glob("step_*") if path.is_dir() and step_of(path) >= 0)
        if found:
            return found
    raise UserError(f"--checkpoint {folder}: it is no step_* folder, and there is none in it or in its checkpoints folder")


def check_checkpoint(checkpoint: Path) -> Report:
    """Every check on one checkpoint."""
    found = Report("checkpoint", {"path": str(checkpoint)})
    try:
        record = read_run_file(checkpoint)
        _check_files(checkpoint, record, found)
        # One that was imported has no training behind it.
        config = from_dict(record["config"]) if record["phase"] != "imported" else None
        if config is not None:
            _check_counters(checkpoint, record, config, found)
        _check_tokenizer(checkpoint, record, found)
        _check_tensors(checkpoint, record, config, found)
        if config is not None:
            check_optimizer_steps(checkpoint, record, PhasePlan.from_config(config), found)
        _note_versions(record["versions"], found)
    except UserError as error:
        found.problems.append(str(error))
    return found


def _note_versions(versions: dict[str, str], found: Report) -> None:
    for name, version in versions.items():
        installed = installed_version(name)
        if installed != version:
            found.notes.append(f"written with {name} {version}; {installed or 'none'} is installed here")


def _check_files(checkpoint: Path, record: dict[str, Any], found: Report) -> None:
    found.problems += find_damage(checkpoint).values()
    there = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if not path.is_dir()}
    strays = sorted(name for name in there - record["files"].keys() - {RUN_FILE} if not _is_branch_note(name))
    found.problems += [f"{name} is there, but {RUN_FILE} does not name it" for name in strays]
    found.facts |= {"files": len(record["files"]), "bytes": sum(entry["bytes"] for entry in record["files"].values())}


def _is_branch_note(name: str) -> bool:
    """What a run leaves in the checkpoint that it starts from; a name with a dot in front was not finished."""
    from megatron_ext.train.retention import BRANCHES

    folder, _, note = name.partition("/")
    return folder == BRANCHES and "/" not in note and note.endswith(".json") != note.startswith(".")


def _check_counters(checkpoint: Path, record: dict[str, Any], config: RunConfig, found: Report) -> None:
    """Step, phase, samples and tokens follow from the configuration."""
    from megatron_ext.model.presets import EncoderConfig

    step, plan = record["step"], PhasePlan.from_config(config)
    found.facts |= {name: record[name] for name in ("step", "phase", "samples", "tokens", "predicted_tokens", "flops")}
    if step_of(checkpoint) not in (-1, step):
        found.problems.append(f"{RUN_FILE} is of step {step}, the folder's name says {step_of(checkpoint)}")
    if not 0 < step <= plan.total_steps:
        found.problems.append(f"step {step} lies outside the plan of {plan.total_steps} steps")
        return
    phase = plan.phase_at(step - 1)
    expected: dict[str, Any] = {"phase": phase.name, "causal": _is_causal(phase)}
    expected["encoder"] = vars(_encoder(record, config))
    written = record | {"encoder": vars(EncoderConfig(**record["encoder"]))}  # with the fields that earlier versions lack
    consumed = _consumed(record, config)
    if consumed is None:
        found.problems.append(f"the changes in {RUN_FILE} do not lead to its configuration: samples and tokens were not checked")
    else:
        expected |= consumed
    for name, value in expected.items():
        if written[name] != value:
            found.problems.append(f"{name} is {written[name]} in {RUN_FILE}, but step {step} of its configuration gives {value}")
    if record["predicted_tokens"] > record["tokens"]:
        found.problems.append(f"predicted_tokens is {record['predicted_tokens']} of {record['tokens']} tokens")
    if [(entry["name"], entry["start_step"], entry["end_step"]) for entry in record["phases"]] != [
        (entry.name, entry.start_step, entry.end_step) for entry in plan.phases
    ]:
        found.problems.append(f"the phases in {RUN_FILE} are not those of its configuration")


def _encoder(record: dict[str, Any], config: RunConfig) -> "EncoderConfig":
    """The configured shape. One that came from another checkpoint is taken as recorded: that one may be gone by now."""
    from megatron_ext.model.presets import EncoderConfig, build_encoder_config

    if config.model.checkpoint is None:
        return build_encoder_config(config.model)
    given = {name: value for name, value in vars(config.model).items() if name in record["encoder"] and value is not None}
    return EncoderConfig(**{**record["encoder"], **given})


def _consumed(record: dict[str, Any], config: RunConfig) -> dict[str, int] | None:
    """Samples and tokens of the steps up to the checkpoint, each step under the sizes that it ran with.

    A resume may change these sizes by name; `changes` keeps from which step on, and what they were before.

    Returns:
        None if the changes are not of sizes that follow one another up to those of the configuration.
    """
    sizes = {BATCH: config.training.global_batch_size, LENGTH: config.data.sequence_length}
    samples, tokens, end = 0, 0, record["step"]
    changes = [change for change in record.get("changes", []) if change.get("field") in (BATCH, LENGTH)]
    for change in [*reversed(changes), {"step": 0}]:
        start = change.get("step")
        if not _is_whole(start, 0, end):
            return None
        samples += (end - start) * sizes[BATCH]
        tokens += (end - start) * sizes[BATCH] * sizes[LENGTH]
        end = start
        if "field" in change:
            if change.get("now") != sizes[change["field"]] or not _is_whole(change.get("before"), 1, LARGEST_COUNT):
                return None
            sizes[change["field"]] = change["before"]
    return {"samples": samples, "tokens": tokens}


def _is_whole(value: Any, lowest: int, highest: int) -> bool:
    return type(value) is int and lowest <= value <= highest


def _is_causal(phase: Phase) -> bool:
    return all(OBJECTIVES[name].causal for name in phase.weights)


def _check_tokenizer(checkpoint: Path, record: dict[str, Any], found: Report) -> None:
    from megatron_ext.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(checkpoint / record["tokenizer"]["path"])
    except UserError as error:
        found.problems.append(str(error))
        return
    found.facts["tokenizer_fingerprint"] = tokenizer.fingerprint
    if tokenizer.fingerprint != record["tokenizer"]["fingerprint"]:
        recorded = record["tokenizer"]["fingerprint"]
        found.problems.append(f"the tokenizer has the fingerprint {tokenizer.fingerprint[:12]}, the run's had {recorded[:12]}")
    # A model that was imported may know more ids than its tokenizer gives.
    if tokenizer.vocab_size > record["vocab_size"] or (not record.get("imported") and tokenizer.vocab_size != record["vocab_size"]):
        found.problems.append(f"the tokenizer has {tokenizer.vocab_size} ids, {RUN_FILE} says {record['vocab_size']}")


def _check_tensors(checkpoint: Path, record: dict[str, Any], config: RunConfig | None, found: Report) -> None:
    """Every tensor of the model and, if it was trained, of AdamW, in its full shape and finite."""
    from megatron_ext.hf.checkpoint_reader import CheckpointReader
    from megatron_ext.hf.weight_map import build_mappings

    try:
        reader = CheckpointReader(checkpoint, mapped=False)
    except UserError as error:
        found.problems.append(str(error))
        return
    run = reader.record
    mappings = build_mappings(run.encoder, run.vocab_size, run.padded_vocab_size)
    shapes = {mapping.megatron_key: mapping.converter.megatron_shape for mapping in mappings}
    _compare_shapes(reader.tensors, shapes, "tensor", found)
    of_optimizer = {}
    if config is not None:
        _check_padding(record, found)
        of_optimizer = _optimizer_shapes(reader, shapes, config)
    _compare_shapes(reader.optimizer_tensors, of_optimizer, "AdamW tensor", found)
    found.facts |= {"tensors": len(reader.tensors), "optimizer_tensors": len(reader.optimizer_tensors)}
    _check_values(reader, found)


def _check_padding(record: dict[str, Any], found: Report) -> None:
    """The embedding's rows follow from the layout that the checkpoint was trained at."""
    from megatron_ext.model.presets import padded_vocab_size

    tensor, ids, rows = record["parallel"].get("tensor"), record["vocab_size"], record["padded_vocab_size"]
    padded = padded_vocab_size(ids, tensor) if isinstance(tensor, int) and tensor > 0 else None
    if padded is None:
        found.problems.append(f"parallel.tensor is {tensor} in {RUN_FILE}: it must be at least 1")
    elif rows != padded:
        found.problems.append(f"padded_vocab_size is {rows}: {ids} ids at this layout give {padded}")


def _optimizer_shapes(reader: "CheckpointReader", shapes: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Two moments a parameter; and its float32 master weights, wherever this optimizer keeps them."""
    from megatron_ext.train.optimizer_state import MASTER_PREFIXES

    prefixes = list(MOMENTS)
    stored = [prefix for prefix in MASTER_PREFIXES if any(key.startswith(prefix) for key in reader.optimizer_tensors)]
    needs_masters = config.precision.recipe != "fp32"
    prefixes += stored or ([MASTER_PREFIXES[0]] if needs_masters else [])
    return {prefix + key: shape for prefix in prefixes for key, shape in shapes.items()}


def _compare_shapes(found_tensors: dict[str, Any], shapes: dict[str, Any], what: str, found: Report) -> None:
    for keys, wrong in (
        (shapes.keys() - found_tensors.keys(), "is missing"),
        (found_tensors.keys() - shapes.keys(), "is there and belongs to no parameter"),
    ):
        if keys:
            found.problems.append(f"{what} {_names(sorted(keys))}: {wrong}")
    for key in sorted(shapes.keys() & found_tensors.keys()):
        has = tuple(found_tensors[key].shape)
        if has != shapes[key]:
            found.problems.append(f"{what} {key} has the shape {list(has)}, the encoder's sizes ask for {list(shapes[key])}")


def _names(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _check_values(reader: "CheckpointReader", found: Report) -> None:
    """Read every tensor, one at a time: finite, and the second moments not negative."""
    parameters = 0
    for key, tensor in _stream(reader, found):
        if key in reader.tensors:
            parameters += tensor.numel()
        wrong = tensor.numel() - int(tensor.isfinite().sum())
        if wrong:
            found.problems.append(f"{key} holds {wrong} of {tensor.numel()} values that are not finite")
        elif key.startswith(MOMENTS[1]) and bool((tensor < 0).any()):
            found.problems.append(f"{key} holds negative values: it is a mean of squares")
    found.facts["parameters"] = parameters


def _stream(reader: "CheckpointReader", found: Report) -> Iterator[tuple[str, Any]]:
    """(key, tensor), with a bar on stderr where that is a terminal; those that cannot be read are reported and left out."""
    from tqdm import tqdm

    keys = [*reader.tensors, *reader.fp8_histories, *reader.optimizer_tensors]
    for key in tqdm(keys, desc=reader.directory.name, unit="tensor", disable=None):
        try:
            tensor = reader.read(key)
        except UserError as error:
            found.problems.append(str(error))
            continue
        yield key, tensor
