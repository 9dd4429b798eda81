"""A study's models as a tree: stretches of training that several of them begin with are in it once."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_ext.study.models import Model, Part


@dataclass
class Segment:
    """A stretch of training that is run once, from its parent's last checkpoint."""

    size: str
    part: Part
    """Its `steps` are this segment's."""
    start_step: int
    """Steps before it: where its data begin."""
    models: list[Model] = field(default_factory=list)
    """Those that end with it."""
    children: list["Segment"] = field(default_factory=list)

    @property
    def end_step(self) -> int:
        """Steps when it is done."""
        return self.start_step + self.part.steps

    def walk(self) -> Iterator["Segment"]:
        """It and all below, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


def build_tree(models: list[Model]) -> list[Segment]:
    """The roots, one or more for each size.

    Two models share a stretch as long as objective, ratio and learning rate are the same, step by step. A decay is shared only by
    models that have all of it in common.
    """
    roots: list[Segment] = []
    for size in dict.fromkeys(model.size for model in models):
        roots += _grow(size, 0, [(model, list(model.parts)) for model in models if model.size == size])
    return roots


def _grow(size: str, start: int, paths: list[tuple[Model, list[Part]]]) -> list[Segment]:
    groups: dict[tuple, list[tuple[Model, list[Part]]]] = {}
    for model, parts in paths:
        first = parts[0]
        key = (*first.kind, first.steps if first.is_decay else None)
        groups.setdefault(key, []).append((model, parts))
    segments = []
    for group in groups.values():
        first = group[0][1][0]
        steps = min(parts[0].steps for _, parts in group)
        segment = Segment(size, _cut(first, steps), start)
        left = [(model, _without(parts, steps)) for model, parts in group]
        segment.models = [model for model, parts in left if not parts]
        segment.children = _grow(size, segment.end_step, [(model, parts) for model, parts in left if parts])
        segments.append(segment)
    return segments


def _cut(part: Part, steps: int) -> Part:
    return Part(part.objective, part.ratio, part.is_decay, steps, part.rewarms)


def _without(parts: list[Part], steps: int) -> list[Part]:
    """What is left after the first steps; what goes on does not warm up again."""
    first, rest = parts[0], parts[1:]
    if first.steps == steps:
        return rest
    return [Part(first.objective, first.ratio, first.is_decay, first.steps - steps), *rest]


def all_paths(roots: list[Segment]) -> list[tuple[Segment, ...]]:
    """For every segment, parents before children, the segments from its root to it."""

    def below(path: tuple[Segment, ...]) -> Iterator[tuple[Segment, ...]]:
        yield path
        for child in path[-1].children:
            yield from below((*path, child))

    return [path for root in roots for path in below((root,))]


def all_segments(roots: list[Segment]) -> list[Segment]:
    """Every segment, parents before children."""
    return [segment for root in roots for segment in root.walk()]
