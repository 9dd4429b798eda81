"""One self-contained HTML page of a study's results; the same tables as CSV and Markdown, the same figures as PNG."""

import base64
import csv
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:60rem;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem}
figure{margin:0 0 1rem}figure img{max-width:100%;height:auto;background:#fff}
figcaption,.note{font-size:.9rem;opacity:.8}
.table{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;white-space:nowrap}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #8884}th:first-child,td:first-child{text-align:left}
td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:7rem;position:sticky;left:0;background:Canvas}
td.best{font-weight:700}details{margin:.5rem 0}summary{cursor:pointer}code{font-size:.8rem}
@media(max-width:40rem){figure{overflow-x:auto}figure img{max-width:none;width:36rem}figcaption{position:sticky;left:0}}
"""


@dataclass(frozen=True)
class Table:
    """Of words, as people read it."""

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: bool = False
    """Shown when asked for."""
    best: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of what stands out."""

    def as_html(self) -> str:
        """Scrolls sideways where the screen is narrow."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        body = "".join(
            f"<tr>{''.join(self._cell(r, c, cell) for c, cell in enumerate(row))}</tr>" for r, row in enumerate(self.rows)
        )
        table = f'<div class="table"><table id="{self.name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        note = f'<p class="note">{html.escape(self.caption)}</p>' if self.caption else ""
        if self.folded:
            return f"<details><summary>{html.escape(self.title)}</summary>{note}{table}</details>"
        return f"<h2>{html.escape(self.title)}</h2>{note}{table}"

    def _cell(self, row: int, column: int, cell: str) -> str:
        mark = ' class="best"' if (row, column) in self.best else ""
        return f"<td{mark}>{html.escape(cell)}</td>"

    def as_csv(self) -> str:
        """With a head."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.head, *self.rows])
        return text.getvalue()

    def as_markdown(self) -> str:
        """With its title."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
        return f"## {self.title}\n\n{self.caption}\n\n{table}\n".replace("\n\n\n\n", "\n\n")


@dataclass(frozen=True)
class Picture:
    """A figure as a PNG file."""

    name: str
    title: str
    caption: str
    png: bytes

    def as_html(self) -> str:
        """With the picture inside."""
        data = base64.b64encode(self.png).decode()
        title, caption = html.escape(self.title), html.escape(self.caption)
        image = f'<img id="{self.name}" alt="{title}: {caption}" src="data:image/png;base64,{data}">'
        return f"<h2>{title}</h2><figure>{image}<figcaption>{caption}</figcaption></figure>"


@dataclass(frozen=True)
class Report:
    """All of it."""

    title: str
    notes: Sequence[str]
    pictures: Sequence[Picture] = field(default_factory=tuple)
    tables: Sequence[Table] = field(default_factory=tuple)

    def write(self, folder: Path) -> Path:
        """`report.html`, `report.md`, and a file for each table and picture; the page's path."""
        folder.mkdir(parents=True, exist_ok=True)
        for table in self.tables:
            (folder / f"{table.name}.csv").write_text(table.as_csv(), encoding="utf-8")
        for picture in self.pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        (folder / "report.md").write_text("\n".join(self._markdown()), encoding="utf-8")
        page = folder / "report.html"
        page.write_text(self._html(), encoding="utf-8")
        return page

    def _html(self) -> str:
        notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in self.notes)
        open_tables = "".join(table.as_html() for table in self.tables if not table.folded)
        folded = "".join(table.as_html() for table in self.tables if table.folded)
        body = "".join([open_tables, *(picture.as_html() for picture in self.pictures), "<h2>Every number</h2>", folded])
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
            f"<body><h1>{html.escape(self.title)}</h1>{notes}{body}</body></html>\n"
        )

    def _markdown(self) -> Iterable[str]:
        yield f"# {self.title}\n"
        yield from (f"{note}\n" for note in self.notes)
        for table in self.tables:
            if not table.folded:
                yield table.as_markdown()
        for picture in self.pictures:
            yield f"## {picture.title}\n\n{picture.caption}\n\n![{picture.title}]({picture.name}.png)\n"
