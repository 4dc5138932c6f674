# SPDX-License-Identifier: Apache-2.0
"""Reports as one self-contained HTML file, readable on a phone, in light and dark, by a screen reader."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..._utils.console import WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # replaced by the text colour of the page


@dataclass(frozen=True)
class Table:
    """``rows``: cells as text; the first of each is its heading. ``best``: (row, column) of cells to set in bold."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Chart:
    """``label``: its content, in a sentence or two, for readers who cannot see it."""

    figure: Figure
    label: str


@dataclass(frozen=True)
class Section:
    title: str
    paragraphs: Sequence[str] = ()
    items: Sequence[Table | Chart] = field(default_factory=tuple)


def render(title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """Return the page. All text is escaped."""
    import jinja2

    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    charts = [item for section in sections for item in section.items if isinstance(item, Chart)]
    drawn = {id(chart): svg(chart.figure, f"c{number}") for number, chart in enumerate(charts)}
    return template.render(title=title, lead=lead, sections=sections, footer=footer, drawn=drawn, id=id)


def plain(table: Table, width: int = WIDTH) -> str:
    """Format a table for a terminal of this width: headings are broken into lines, and what the first column holds, so
    far as it must be."""
    columns = list(zip(table.header, *table.rows, strict=True))
    # as narrow as the cells and the words of the heading allow
    widths = [max(len(part) for part in (*heading.split(), *cells, "")) for heading, *cells in columns]
    first = max(map(len, columns[0]))
    widths[0] = max(16, min(first, width - sum(widths[1:]) - 2 * (len(widths) - 1)))
    rows = [[textwrap.wrap(cell, w) or [""] for cell, w in zip(table.header, widths, strict=True)]]
    rows += [[textwrap.wrap(row[0], widths[0]) or [""], *([cell] for cell in row[1:])] for row in table.rows]
    lines = [line for number, row in enumerate(rows) for line in _lines(row, widths, bottom=number == 0)]
    return "\n".join([table.caption, *lines, ""])


def _lines(cells: Sequence[Sequence[str]], widths: Sequence[int], bottom: bool) -> list[str]:
    """Return the lines of a row of cells of some lines each, at the top or at the bottom of the row."""
    height = max(map(len, cells))
    padded = [[""] * (height - len(c)) + list(c) if bottom else list(c) + [""] * (height - len(c)) for c in cells]
    lines = []
    for line in zip(*padded, strict=True):
        first, *others = (part.rjust(w) for part, w in zip(line, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    return lines


def without_empty(table: Table, nothing: str) -> Table:
    """Return the table without the columns of which every cell is ``nothing``; the headings of rows stay."""
    kept = [i for i in range(len(table.header)) if i == 0 or any(row[i] != nothing for row in table.rows)]
    best = frozenset((row, kept.index(column)) for row, column in table.best if column in kept)
    return replace(
        table, header=[table.header[i] for i in kept], rows=[[row[i] for i in kept] for row in table.rows], best=best
    )


def figure(width: float, height: float, rows: int, columns: int, **how: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure of this size in inches, and its panels row by row; ``how``: see
    ``matplotlib.pyplot.subplots``."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    made, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **how)
    plt.close(made)  # releases it from pyplot; the caller draws it
    return made, list(axes.ravel())


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Add one legend for all panels, each label once, at the right."""
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside right center", fontsize=8)


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an <svg> element in the text colour around it; ``name`` makes its ids unique."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<image [^>]*?) id="[^"]*"', r"\1", text)  # a hash of the pixels: equal maps would share it
    ids = set(re.findall(r'id="([^"]+)"', text))
    for reference in (r'(id=")([^"]+)(")', r"(url\(#)([^)]+)(\))", r'(href="#)([^"]+)(")'):
        text = re.sub(reference, lambda m: f"{m[1]}{name}-{m[2]}{m[3]}" if m[2] in ids else m[0], text)
    widest = f"{1.2 * figure.get_figwidth():.1f}in"  # a small figure is not enlarged to the page
    shown = f'<svg aria-hidden="true" focusable="false" style="max-width:{widest};min-width:min(34rem,{widest})"'
    return text.replace("<svg", shown, 1).replace(INK, "currentColor")


def style() -> Any:
    """Return matplotlib settings (``matplotlib.rc_context``) for figures of a page."""
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(ink, INK),
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
    }


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root { --ink: #1b1f24; --paper: #fdfdfc; --faint: #6b7280; --line: #d9dce1; --band: #f2f4f6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #14171b; --faint: #9aa3af; --line: #333941; --band: #1d2127 } }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25 } h2 { margin-top: 2.5rem; font-size: 1.2rem }
p, figcaption { max-width: 56rem }
.lead, footer, caption { color: var(--faint) } footer { margin-top: 3rem; font-size: .85rem; overflow-wrap: anywhere }
.wide { overflow-x: auto } figure { margin: 1.2rem 0 } figure svg { width: 100%; height: auto }
figcaption { color: var(--faint); font-size: .9rem }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; width: 100% }
caption { text-align: left; white-space: normal; padding-bottom: .4rem; font-size: .9rem }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child { text-align: left } thead th { background: var(--band) }
a { color: inherit } .wide:focus { outline: 2px solid var(--faint) }
nav ul { padding-left: 1.2rem }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
<nav aria-label="Contents"><ul>
{% for section in sections %}
<li><a href="#s{{ loop.index }}">{{ section.title }}</a></li>
{% endfor %}
</ul></nav>
{% for section in sections %}
<section aria-labelledby="s{{ loop.index }}">
<h2 id="s{{ loop.index }}">{{ section.title }}</h2>
{% for paragraph in section.paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
{% for item in section.items %}
{% if item.figure is defined %}
<figure>
<div class="wide" tabindex="0" role="img" aria-label="{{ item.label }}">{{ drawn[id(item)] | safe }}</div>
<figcaption>{{ item.label }}</figcaption>
</figure>
{% else %}
<div class="wide" tabindex="0" role="group" aria-label="table, scrolls sideways">
<table>
<caption>{{ item.caption }}</caption>
<thead><tr>{% for cell in item.header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in item.rows %}
{% set line = loop.index0 %}
<tr>{% for cell in row %}{% if loop.first %}<th scope="row">{{ cell }}</th>{% else %}<td>
{%- if (line, loop.index0) in item.best %}<strong>{{ cell }}</strong>{% else %}{{ cell }}{% endif %}</td>
{%- endif %}{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
{% endfor %}
</section>
{% endfor %}
</main>
<footer>{{ footer }}</footer>
</body>
</html>
"""
