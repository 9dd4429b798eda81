"""A dry run for people and as JSON."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_ext.plan.dry_run import DryRun, Group, RankReport

TRAFFIC = {
    "tensor": "tensor",
    "pipeline": "pipeline",
    "context": "context",
    "reduce_scatter": "gradients scattered",
    "all_gather": "weights gathered",
    "all_reduce": "gradients reduced",
    "embedding": "tied embedding",
}


def as_dict(result: DryRun) -> dict[str, Any]:
    """Plain dictionaries, lists and numbers; groups and memory with their totals."""
    tree = dataclasses.asdict(result)
    for rank, report in zip(tree["ranks"], result.ranks, strict=True):
        rank["memory"]["total"] = report.memory.total
    return tree


def render(result: DryRun) -> Iterator[str]:
    """Lines of text."""
    yield f"{result.world_size} ranks as {result.layout}, {result.precision}, {result.layers} layers"
    padding = f", padded to {result.padded_vocab_size:,}" if result.padded_vocab_size > result.vocab_size else ""
    yield f"vocabulary: {result.vocab_size:,} ids from {result.vocabulary_from}{padding}"
    yield f"a step: {result.micro_batches} micro-batch(es) a rank, logits for {result.predicted_share:.0%} of the tokens at most"
    yield ""
    yield from _table(["rank", *(_title(rank) for rank in result.ranks)], list(_rows(result.ranks)))
    yield ""
    for report in result.ranks:
        groups = "; ".join(f"{name} {_describe(group)}" for name, group in report.groups.items() if group.size > 1)
        yield f"groups of rank {report.rank}: {groups or 'none'}"
    yield ""
    yield "built, as the run would build it: weights, gradients, optimizer, groups, checkpoint"
    yield "by formula: activations, head, workspace, bytes sent (docs/dry_run.md)"
    yield f"not checked here: {'; '.join(result.unchecked)}"


def _title(report: RankReport) -> str:
    holds = f" {'+'.join(report.holds)}" if report.holds else ""
    return f"{report.rank} (stage {report.stage}{holds})"


def _rows(ranks: Sequence[RankReport]) -> Iterator[list[str]]:
    yield ["parameters", *(f"{rank.parameters:,}" for rank in ranks)]
    for name in ("weights", "gradients", "optimizer", "activations", "logits", "workspace", "total"):
        yield [name, *(size(getattr(rank.memory, name)) for rank in ranks)]
    for name, title in TRAFFIC.items():
        if any(rank.traffic[name] for rank in ranks):
            yield [f"sent: {title}", *(size(rank.traffic[name]) for rank in ranks)]
    yield ["checkpoint tensors", *(f"{rank.checkpoint.tensors:,}" for rank in ranks)]
    yield ["checkpoint bytes", *(size(rank.checkpoint.bytes) for rank in ranks)]
    yield ["built in", *(f"{rank.seconds:.1f} s" for rank in ranks)]


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        yield "  ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )


def size(count: float) -> str:
    """Bytes in the unit that fits, e.g. 1.41 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"


def _describe(group: Group) -> str:
    """Size and members in short: `8 (0, 2, 4 ... 14)`."""
    members = [str(rank) for rank in group.ranks]
    short = members if len(members) <= 4 else [*members[:3], f"... {members[-1]}"]
    return f"{group.size} ({', '.join(short).replace(', ...', ' ...')})"
