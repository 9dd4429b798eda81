"""Reports as text for a terminal: aligned columns, a few colours where the output is one, any script without crashing."""

import os
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

from megatron_ext import errors
from megatron_ext.doctor.report import Report

COLOURS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "grey": 90, "bold": 1}
RIGHT_TO_LEFT = ("R", "AL", "RLE", "RLO", "RLI")
ISOLATE, END_ISOLATE = "\u2068", "\u2069"
DOTTED_CIRCLE = "\u25cc"


class Painter:
    """Colours text, or leaves it as it is."""

    def __init__(self, coloured: bool | None = None):
        """
        Args:
            coloured: None decides by whether stdout is a terminal and NO_COLOR is unset.
        """
        self._coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ if coloured is None else coloured

    def __call__(self, text: str, colour: str) -> str:
        """The text in a colour of `COLOURS`."""
        return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if self._coloured else text


def printable(text: str) -> str:
    """Text of any script on one line: controls spelled out, a lone combining mark on a dotted circle, right-to-left isolated."""
    shown = errors.printable(text)
    if shown and unicodedata.combining(shown[0]):
        shown = DOTTED_CIRCLE + shown
    if any(unicodedata.bidirectional(char) in RIGHT_TO_LEFT for char in shown):
        shown = ISOLATE + shown + END_ISOLATE
    return shown


def width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(_columns(char) for char in text)


def _columns(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), indent: str = "  ") -> list[str]:
    """Rows of cells as aligned lines; the last column is not padded."""
    rows = [header, *rows] if header else list(rows)
    widths = [max((width(cell) for cell in column), default=0) for column in zip(*rows, strict=True)]
    return [indent + "  ".join(_pad(cell, size) for cell, size in zip(row, widths, strict=True)).rstrip() for row in rows]


def _pad(cell: str, size: int) -> str:
    return cell + " " * (size - width(cell))


def size(count: int | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return "unlimited"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def render(report: Report, paint: Painter) -> list[str]:
    """A report's lines: what was seen, then notes, problems and the verdict."""
    body = {"machine": machine_lines, "equivalence": equivalence_lines, "checkpoint": checkpoint_lines, "data": data_lines}
    lines = body[report.check](report.facts, paint)
    lines += [f"{paint('note:', 'yellow')} {printable(note)}" for note in report.notes]
    lines += [f"{paint('problem:', 'red')} {printable(problem)}" for problem in report.problems]
    count = len(report.problems)
    verdict = paint("all good", "green") if report.ok else paint(f"{count} problem{'s' if count > 1 else ''}", "red")
    return [*lines, f"{report.check}: {verdict}"]


def machine_lines(facts: dict[str, Any], paint: Painter) -> list[str]:
    """Hardware, software, and what will be used."""
    system, links = facts["system"], facts["communication"]
    gpus = [
        f"{gpu['name']}, {gpu['architecture']} {'.'.join(map(str, gpu['compute_capability']))}, {size(gpu['memory_bytes'])}"
        for gpu in facts["gpus"]
    ]
    limits = ", ".join(f"{name} {_limit(name, value)}" for name, value in system["limits"].items())
    hardware = [
        ("cpu", f"{system['cores']} cores, {system['cpu_capability'] or 'of a kind that only torch knows'}"),
        ("memory", _memory(system["memory_bytes"], system["memory_available_bytes"])),
        ("shared memory", size(system["shared_memory_bytes"])),
        ("free disk", f"{size(system['free_disk_bytes'])} in {system['folder']}"),
        ("limits", limits),
        ("gpus", "; ".join(gpus) or "none"),
        ("fp8", "possible" if facts["fp8"]["possible"] else f"no: {facts['fp8']['reason']}"),
        ("gloo", "yes" if links["gloo"] else "no"),
        ("nccl", links["nccl_version"] or "no"),
        ("cuda", links["cuda_version"] or "no"),
    ]
    engine, apex = facts["transformer_engine"], facts["apex"]
    kinds = {"none": "no", "nvidia": f"NVIDIA's, {apex['location']}", "foreign": f"NOT NVIDIA's: {apex['location']}"}
    software = [
        ("python", system["python"]),
        *((name, version or "missing") for name, version in facts["packages"].items()),
        ("transformer engine", engine["version"] or "no"),
        ("apex", kinds[apex["kind"]]),
        ("flash attention", facts["flash_attention"] or "no"),
    ]
    lines = [paint("this machine", "bold"), *table(hardware), paint("software", "bold"), *table(software)]
    if facts["will_use"] is None:
        return lines
    used = facts["will_use"]
    lines += [paint("what will be used (training.backend: auto)", "bold")]
    lines += table([(name, used[name]) for name in ("device", "layers", "communication")])
    rows = [
        (row["objective"], "packed" if row["packed"] else "unpacked", row["kernel"], row["mask_type"], _runs(row))
        for row in used["attention"]
    ]
    return lines + table(rows, ("objective", "documents", "attention", "mask type", "applied to"))


def _memory(total: int | None, available: int | None) -> str:
    return "unknown" if total is None else f"{size(total)}, {size(available)} available"


def _limit(name: str, value: int | None) -> str:
    return "unlimited" if value is None else size(value) if name == "locked memory" else str(value)


def _runs(row: dict[str, Any]) -> str:
    what = "document" if row["packed"] else "sample"
    assert row["runs"] == row["documents" if row["packed"] else "samples"]
    return f"each {what}"


def equivalence_lines(facts: dict[str, Any], paint: Painter) -> list[str]:
    """One line for each objective and step."""
    allowed = facts["tolerance"]
    lines = [
        paint(f"{facts['layout']}, {facts['precision']}, {facts['packing']}, against one float32 rank", "bold"),
        f"  {facts['world_size']} ranks on {facts['device']}, {facts['communication']}; "
        f"{facts['micro_batches']} micro-batches a step",
    ]
    rows = [
        (
            row["objective"],
            str(row["step"]),
            f"{row['loss']:.6f}",
            f"{row['loss_difference']:.1e}",
            f"{row['gradient_norm_difference']:.1e}",
            f"{row['worst_gradient_difference']:.1e}",
            "PASS" if row["ok"] else "FAIL",
            row["worst_parameter"],
        )
        for row in facts["results"]
    ]
    limits = ("allowed", "", "", *(f"{allowed[name]:.1e}" for name in ("loss", "gradient_norm", "gradient")), "", "")
    lines += table(
        [*rows, limits], ("objective", "step", "loss", "off by", "norm off by", "gradient off by", "", "worst parameter")
    )
    return lines + facts.get("traceback", "").splitlines()


def checkpoint_lines(facts: dict[str, Any], paint: Painter) -> list[str]:
    """One block for each checkpoint."""
    lines = []
    for seen in facts["checkpoints"]:
        lines.append(paint(seen["path"], "bold"))
        rows = [(name.replace("_", " "), _value(value)) for name, value in seen.items() if name != "path" and value is not None]
        lines += table(rows)
    return lines


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))


def data_lines(facts: dict[str, Any], paint: Painter) -> list[str]:
    """Totals of each set, and the sample if one was asked for."""
    lines = []
    for seen in facts["sets"]:
        lines.append(paint(printable(seen["prefix"]), "bold"))
        rows = [(name.replace("_", " "), _value(value)) for name, value in seen.items() if name != "prefix" and value is not None]
        lines += table(rows)
    return lines + (sample_lines(facts["sample"], paint) if facts["sample"] else [])


def sample_lines(sample: dict[str, Any], paint: Painter) -> list[str]:
    """A sample position by position, with a line before each document."""
    head = [(name.replace("_", " "), _value(sample[name])) for name in sample["heading"] if sample[name] is not None]
    lines = [paint(f"sample {sample['index']}", "bold"), *table(head)]
    colours = {"masked": "red", "random": "yellow", "kept": "green"}
    header = ("row", "position", "input", "", "was", "", "state", "predicts", "")
    cells = [
        (
            str(row["row"]),
            str(row["position"]),
            str(row["input_id"]),
            printable(row["input"]),
            "" if row["state"] == "shown" else str(row["original_id"]),
            "" if row["state"] == "shown" else printable(row["original"]),
            "" if row["state"] == "shown" else row["state"],
            "" if row["target_id"] is None else str(row["target_id"]),
            "" if row["target_id"] is None else printable(row["target"]),
        )
        for row in sample["tokens"]
    ]
    lines_of_rows = table(cells, header)
    lines.append(paint(lines_of_rows[0], "grey"))
    document = None
    for row, line in zip(sample["tokens"], lines_of_rows[1:], strict=True):
        if row["document"] != document:
            document = row["document"]
            lines.append(paint(f"  -- document {document}, {sample['documents'][document]['length']} tokens", "blue"))
        lines.append(paint(line, colours[row["state"]]) if row["state"] in colours else line)
    return lines
