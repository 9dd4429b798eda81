"""A segment as a training run: its name, its folder, and its configuration."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.checkpoint_files import checkpoint_name, complete_checkpoints, step_of
from megatron_ext.config import PhaseConfig, RunConfig
from megatron_ext.config_reading import from_dict
from megatron_ext.config_yaml import read_file
from megatron_ext.errors import UserError
from megatron_ext.study.segments import Segment
from megatron_ext.study.study_file import Sections, Study
from megatron_ext.tree import flatten

COMPARISON_MASK_RATIO = 0.4
"""Of the MLM by which all models of a study are compared, unless `run.validation.mask_ratio` says otherwise."""
SAME = ("data.", "model.", "phases.", "precision.", "optimizer.", "training.seed", "training.global_batch_size")
"""Fields that decide a segment's weights: with others it is another segment, and what was trained is not its."""


@dataclass(frozen=True)
class SegmentRun:
    """One segment in the study's folder."""

    path: tuple[Segment, ...]
    """From the root to it."""
    folder: Path
    config: RunConfig
    evaluated: tuple[int, ...] = ()
    """Steps of this segment whose checkpoints are evaluated besides the last."""

    @property
    def segment(self) -> Segment:
        """What is trained here."""
        return self.path[-1]

    @property
    def name(self) -> str:
        """Of the segment: no other has it."""
        return segment_name(self.path)

    @property
    def parent_name(self) -> str | None:
        """Of the segment where it begins; None for a root."""
        return segment_name(self.path[:-1]) if len(self.path) > 1 else None

    @property
    def config_file(self) -> Path:
        """What `pretrain_encoder.py` reads."""
        return self.folder / "config.yaml"

    @property
    def log_file(self) -> Path:
        """What the run printed, attempt after attempt."""
        return self.folder / "log.txt"

    @property
    def last_checkpoint(self) -> Path:
        """Where its children begin."""
        return self.folder / "checkpoints" / checkpoint_name(self.segment.end_step)

    @property
    def is_done(self) -> bool:
        """Whether it was trained to its end."""
        return self.last_checkpoint in complete_checkpoints(self.folder / "checkpoints")

    def exports(self) -> list[tuple[str, Path]]:
        """(name of the Hugging Face folder, checkpoint) of what is evaluated: finished models, and steps that the study names."""
        found = [(model.name, self.last_checkpoint) for model in self.segment.models]
        return found + [
            (at_step_name(self.path, step), self.folder / "checkpoints" / checkpoint_name(step)) for step in self.evaluated
        ]

    def write_config(self) -> None:
        """Put the configuration where the run reads it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.config_file, yaml.safe_dump(self.config.as_dict(), sort_keys=False))

    def check_config(self) -> None:
        """Refuse to go on with what was begun as another segment.

        Raises:
            UserError: naming the first field that would change the weights.
        """
        if not self.config_file.exists() or not complete_checkpoints(self.folder / "checkpoints"):
            return
        before = flatten(from_dict(read_file(str(self.config_file), str(self.config_file)).values).as_dict())
        now = flatten(self.config.as_dict())
        for name in sorted(before.keys() | now.keys()):
            if name.startswith(SAME) and before.get(name) != now.get(name):
                raise UserError(
                    f"segment {self.name} was begun with {name} {before.get(name)} and the study says {now.get(name)}: "
                    "choose another --output-dir"
                )


def segment_name(path: tuple[Segment, ...]) -> str:
    """`tiny.clm-300.mlm0.4-600.mlm0.4-decay-650`: what was trained until which step."""
    return ".".join([path[0].size, *(f"{segment.part.label.replace(' ', '-')}-{segment.end_step}" for segment in path)])


def at_step_name(path: tuple[Segment, ...], step: int) -> str:
    """Of a model that is exported on the way."""
    return f"{segment_name(path)}.at-{step}"


def segment_runs(study: Study, paths: list[tuple[Segment, ...]], output_dir: Path) -> list[SegmentRun]:
    """Every segment of a study, parents before children.

    Raises:
        UserError: the study file has no section `run`, or its configuration is refused, or another study was begun in the folder.
    """
    if study.run is None:
        raise UserError(f"study {study.name} has no section run: add it, with the data at least, to train anything")
    folder = output_dir / "segments"
    runs = [
        SegmentRun(path, folder / segment_name(path), _config(study, study.run, path, folder), evaluated_steps(study, path[-1]))
        for path in paths
    ]
    for run in runs:
        run.check_config()
    return runs


def evaluated_steps(study: Study, segment: Segment) -> tuple[int, ...]:
    """Steps on the way, not in a decay, which only its end is worth."""
    if segment.part.is_decay:
        return ()
    return tuple(step for step in sorted(study.evaluation_steps) if segment.start_step < step <= segment.end_step)


def _config(study: Study, sections: Sections, path: tuple[Segment, ...], folder: Path) -> RunConfig:
    segment, parent = path[-1], path[:-1]
    phases = _phases(study, sections, path)
    own = folder / segment_name(path)
    tree: dict[str, Any] = {name: value for name, value in dataclasses.asdict(sections).items() if name != "masking"}
    tree["output_dir"] = str(own)
    tree["phases"] = [dataclasses.asdict(phase) for phase in phases]
    tree["model"]["preset"] = segment.size
    tree["data"]["sequence_length"] = study.sequence_length
    tree["training"] |= {"global_batch_size": study.global_batch_size, "stop_at_step": segment.end_step}
    tree["optimizer"] |= {"schedule": "wsd", "warmup_steps": study.warmup_steps, "decay_steps": study.decay_steps}
    tree["validation"]["mask_ratio"] = sections.validation.mask_ratio or COMPARISON_MASK_RATIO
    # The end is saved for ever: others begin there. It is no phase edge where the trunk goes on.
    tree["checkpoint"]["branch_points"] = sorted(
        {*sections.checkpoint.branch_points, *evaluated_steps(study, segment), segment.end_step}
    )
    if parent:
        tree["resume"] = str(folder / segment_name(parent) / "checkpoints" / checkpoint_name(segment.start_step))
        # The parent's configuration ends a phase where its own stretch ends; what has run of it is the same.
        tree["resume_changes"] = [f"phases.{number}" for number in range(len(_phases(study, sections, parent)))]
    else:
        tree["resume"] = "auto"
    return from_dict(tree)


def _phases(study: Study, sections: Sections, path: tuple[Segment, ...]) -> list[PhaseConfig]:
    """The run's whole plan until this segment's end. A stable stretch is given the decay that it does not come to."""
    phases: list[PhaseConfig] = []
    for segment in path:
        part, steps = segment.part, segment.part.steps
        masking = dataclasses.replace(sections.masking, ratio=part.ratio)
        if phases and not part.rewarms and (phases[-1].objective, phases[-1].masking) == (part.objective, masking):
            phases[-1] = dataclasses.replace(phases[-1], steps=(phases[-1].steps or 0) + steps)
        else:
            phases.append(
                PhaseConfig(
                    objective=part.objective, steps=steps, masking=masking, learning_rate="rewarm" if part.rewarms else "continue"
                )
            )
    if not path[-1].part.is_decay:
        phases[-1] = dataclasses.replace(phases[-1], steps=(phases[-1].steps or 0) + study.decay_steps)
    return phases


def trained_steps(run: SegmentRun) -> int:
    """Steps of the segment that its newest checkpoint holds."""
    found = complete_checkpoints(run.folder / "checkpoints")
    return step_of(found[-1]) - run.segment.start_step if found else 0


def write_whole(file: Path, text: str) -> None:
    """Put a text into a file, which is never there by half."""
    aside = file.with_suffix(".part")
    aside.write_text(text)
    aside.rename(file)
