"""A report as a value, and as one HTML file with all that it needs in it."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unrolled import figures, storage
from unrolled.errors import ModelError, StorageError, nearest

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from unrolled.trace import Trace

__all__ = ["Report", "Section", "expect_place", "table"]

_FILES = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """One thing to be seen.

    Attributes:
        name: what `show` calls it by; title: its heading.
        text: a sentence or two, HTML, on what is to be seen.
        body: HTML that stands before the figures; figures: in their order.
    """

    name: str
    title: str
    text: str
    body: str = ""
    figures: Sequence[go.Figure] = ()


@dataclass(frozen=True)
class Report:
    """A page: what a model is, and sections of what is to be seen in it. It shows itself in a notebook.

    Attributes:
        title, subtitle: of the page; facts: a few labels and values, for the top of it.
        traces: what the pictures are of, by the model's name.
    """

    title: str
    subtitle: str
    facts: Mapping[str, str]
    sections: Sequence[Section]
    traces: Mapping[str, Trace] = field(default_factory=dict)

    def only(self, names: Sequence[str]) -> Report:
        """The report with these sections alone.

        Raises:
            ModelError: there is no such section in it.
        """
        have = {section.name for section in self.sections}
        for name in names:
            if name not in have:
                why = {
                    "attention": "no decoder with attention was recorded: train one with --attention dot",
                    "gradient": "no gradient was recorded",
                    "next": "numbers come out, no choice among symbols",
                    "units": "no text was read",
                }.get(name, "there is none here")
                raise ModelError(f"{name} cannot be shown: {why} ({nearest(name, have)})")
        return Report(
            self.title,
            self.subtitle,
            self.facts,
            [section for section in self.sections if section.name in names],
            self.traces,
        )

    def html(self) -> str:
        """The page, whole: style, script and plotly.js are in it, and it asks no network for anything."""
        from plotly.offline import get_plotlyjs

        style, script = ((_FILES / name).read_text("utf-8") for name in ("page.css", "page.js"))
        number, parts, drawn = 0, [], []
        for section in self.sections:
            places = []
            for figure in section.figures:
                layout = figure.layout
                least = (layout.meta or {}).get("least_width", 0)
                places.append(
                    f'<div class="scroll"><div class="figure" id="figure-{number}" '
                    f'style="height:{layout.height}px;min-width:{least}px"></div></div>'
                )
                drawn.append(figure.to_json())
                number += 1
            parts.append(
                f'<section id="{section.name}"><h2>{html.escape(section.title)}</h2>\n<p>{section.text}</p>\n'
                f"{section.body}\n{''.join(places)}</section>"
            )
        facts = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in self.facts.items())
        links = "".join(f'<a href="#{s.name}">{html.escape(s.title)}</a>' for s in self.sections)
        # "<" could end the script that these stand in.
        data = f"[{','.join(drawn)}]".replace("<", "\\u003c")
        settings = json.dumps(dict(figures.CONFIG))
        return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="generator" content="unrolled">
<title>{html.escape(self.title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>{html.escape(self.title)}</h1>
<p class="form">{html.escape(self.subtitle)}</p>
<dl>{facts}</dl>
<nav>{links}</nav>
</header>
<main>
{"".join(parts)}
</main>
<footer>Made by <b>unrolled</b>. Everything on this page is in this one file; it asks no network for anything. The
camera in a figure's corner saves it as SVG, the button beside it as PNG.</footer>
<script>{get_plotlyjs()}</script>
<script type="application/json" id="data-figures">{data}</script>
<script type="application/json" id="data-settings">{settings}</script>
<script>{script}</script>
</body>
</html>
"""

    def save(self, path: str | Path) -> None:
        """Write the page as one file.

        Raises:
            StorageError: it cannot be written; an earlier one is whole.
        """
        expect_place(path)
        storage.write_text(path, self.html())

    def _repr_html_(self) -> str:
        # In a frame of its own: neither its style nor its script can meet the notebook's.
        page = html.escape(self.html(), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:800px;border:0" title="unrolled"></iframe>'


_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'none'; base-uri 'none'; form-action 'none'"
)
"""What a browser may do for the page: nothing that is not in it."""


def expect_place(path: str | Path) -> None:
    """
    Raises:
        StorageError: nothing can be written there; said before work is done in vain.
    """
    path = Path(path)
    if path.is_dir():
        raise StorageError(f"cannot write {path}: it is a folder, expected the name of a file, {path / 'report.html'}")
    if not path.parent.is_dir():
        raise StorageError(f"cannot write {path}: folder {path.parent} does not exist")


def table(rows: Sequence[Sequence[Any]], head: Sequence[str]) -> str:
    """A table as HTML; cells are plain text."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'
