"""The report page's frame, tables, bars and lines. Drawings are inline SVG that stretches and holds no text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from pipeline.shown import escaped, html_page

_WIDTH, _HEIGHT = 1000, 240
_NUMBER = re.compile(r"[+-]?[0-9][0-9,.e+-]*%?")


def document(heading: str, lead: str, sections: Sequence[str]) -> str:
    """The whole page: its one style is named by hash in the content security policy, and nothing else may load.

    Args:
        heading: as text.
        lead: under the heading, as markup.
        sections: as markup.
    """
    shown = "\n".join(sections)
    return html_page(heading, _STYLE, f"<header><h1>{escaped(heading)}</h1>{lead}</header>\n<main>\n{shown}\n</main>")


class Markup(str):
    """Markup of our own, which is not escaped."""

    __slots__ = ()


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the row; cells without markup of ours are escaped."""
    top = "".join(f'<th scope="col">{escaped(name)}</th>' if name else "<td></td>" for name in head)
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    body = "".join(
        f'<tr><th scope="row">{escaped(first)}</th>{"".join(map(_cell, rest))}</tr>' for first, *rest in rows
    )
    return f"<table><caption>{escaped(caption)}</caption>{top}<tbody>{body}</tbody></table>"


def _cell(cell: str) -> str:
    if isinstance(cell, Markup):
        return f'<td class="bars">{cell}</td>'
    kind = "number" if _NUMBER.fullmatch(cell) else "value"
    return f'<td class="{kind}">{escaped(cell)}</td>'


def section(title: str, body: str) -> str:
    """A part of the page under its heading."""
    name = title.lower().replace(" ", "-").replace("'", "")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{body}</section>'


def bar(parts: Sequence[tuple[str, float]], whole: float) -> str:
    """A horizontal bar.

    Args:
        parts: class names and lengths, from the left.
        whole: the length that fills the bar.
    """
    rects, at = [], 0.0
    for name, length in parts:
        width = 100 * max(0.0, length) / whole if whole > 0 else 0.0
        width = min(width, 100.0 - at)
        if width > 0:
            rects.append(f'<rect class="{escape(name)}" x="{at:.2f}" y="0" width="{width:.2f}" height="10"/>')
        at += width
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true" focusable="false">'
        f'<rect class="rest" x="0" y="0" width="100" height="10"/>{"".join(rects)}</svg>'
    )


def line(points: Sequence[tuple[float, float]], *, label: str, unit: str) -> str:
    """A line over time, with the largest value and the times written beside it.

    Args:
        points: seconds and values, in order of time; at least two.
        label: what it shows, for those who do not see it.
        unit: of the values.
    """
    first, last = points[0][0], points[-1][0]
    top = max(value for _, value in points) or 1.0
    span = (last - first) or 1.0
    path = " ".join(
        f"{_WIDTH * (seconds - first) / span:.1f},{_HEIGHT * (1 - value / top):.1f}" for seconds, value in points
    )
    grid = "".join(f'<line class="grid" x1="0" x2="{_WIDTH}" y1="{y}" y2="{y}"/>' for y in (0, _HEIGHT // 2, _HEIGHT))
    return (
        f'<div class="chart"><div class="scale" aria-hidden="true"><span>{top:,.4g}</span><span>{top / 2:,.4g}</span>'
        f"<span>0</span></div>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f'{grid}<polygon class="area" points="0,{_HEIGHT} {path} {_WIDTH},{_HEIGHT}"/>'
        f'<polyline class="line" points="{path}"/></svg>'
        f'<div class="times" aria-hidden="true"><span>{first:,.0f} s</span><span>{escape(unit)}</span>'
        f"<span>{last:,.0f} s</span></div></div>"
    )


_STYLE = """
:root { color-scheme: light dark; --back: #f4f4f2; --card: #fff; --text: #1b1b1a; --soft: #5f5f5b; --line: #dcdcd6;
  --rest: #ecece8; --busy: #2f5fb3; --wait: #d08a3c; --bad: #b02a57; }
@media (prefers-color-scheme: dark) {
  :root { --back: #161616; --card: #222; --text: #efefec; --soft: #aaaaa4; --line: #3a3a38;
    --rest: #303030; --busy: #7ba6ee; --wait: #c98a45; --bad: #e0708f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 100rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 0.9375rem/1.45 system-ui, sans-serif; }
h1, p, .value { overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0.25rem 0 0.75rem; }
h2 { font-size: 1.1rem; margin: 0 0 0.5rem; }
header p { margin: 0.25rem 0; font-size: 1.0625rem; max-width: 60rem; }
main { display: grid; gap: 1rem; margin-top: 1.25rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.9rem 1rem 1rem;
  min-width: 0; overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
table + table { margin-top: 1rem; }
caption { text-align: left; color: var(--soft); padding: 0 0 0.35rem; }
th, td { padding: 0.25rem 0.6rem 0.25rem 0; border-top: 1px solid var(--line); vertical-align: top; }
th { text-align: left; font-weight: normal; }
thead th { color: var(--soft); border-top: 0; text-align: right; }
thead th:first-child { text-align: left; }
thead td { border-top: 0; }
.number { text-align: right; white-space: nowrap; }
.bars { width: 38%; min-width: 3rem; padding-right: 0; }
.bar { display: block; width: 100%; height: 0.85rem; margin-top: 0.25rem; }
.rest { fill: var(--rest); } .busy { fill: var(--busy); } .wait { fill: var(--wait); } .bad { fill: var(--bad); }
.chart { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 0.25rem 0.5rem; color: var(--soft);
  font-size: 0.8125rem; }
.chart svg { width: 100%; height: 12rem; overflow: visible; }
.scale { display: flex; flex-direction: column; justify-content: space-between; text-align: right; }
.times span:not(:nth-child(2)) { white-space: nowrap; }
.times { grid-column: 2; display: flex; justify-content: space-between; gap: 1rem; }
.grid { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
.line { fill: none; stroke: var(--busy); stroke-width: 2; vector-effect: non-scaling-stroke; }
.area { fill: var(--busy); opacity: 0.15; }
"""
