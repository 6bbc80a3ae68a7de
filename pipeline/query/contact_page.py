"""The contact sheet as a page: HTML without a script, its one style named by hash in the content security policy."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.query.contact_sheet import Section, caption
from pipeline.records import Hit
from pipeline.shown import visible

_LONG_TITLE = 36
"""Characters from which a title may be cut after three lines, and is shown whole when it has the focus."""

_COLOURS = 8


def page(sections: Sequence[Section], *, query: str, thumbnails: Mapping[str, bytes], note: str = "") -> str:
    """The contact sheet as HTML.

    A section is a list with a heading; a link that skips to it is in the page's navigation. A hit that looks like a
    better one links to it; the ids of duplicates that are not shown unfold. All of that works by keyboard.
    """
    style = (Path(__file__).parent / "contact_page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return _PAGE.format(
        policy=html.escape(policy, quote=True),
        style=style,
        heading=_text(query),
        note=f"<p>{_text(note)}</p>" if note else "",
        links="\n".join(
            f'<li><a href="#s{number}">{_text(section.label)}</a></li>' for number, section in enumerate(sections)
        ),
        sections="\n".join(_section(section, number, thumbnails) for number, section in enumerate(sections)),
    )


def _section(section: Section, number: int, thumbnails: Mapping[str, bytes]) -> str:
    name = f"s{number}"
    tiles = "\n".join(
        _tile(hit, section.better(place), name, thumbnails.get(hit.product_id))
        for place, hit in enumerate(section.hits)
    )
    note = f'<p id="{name}-note">{_text(section.note)}</p>\n' if section.note else ""
    described = f' aria-describedby="{name}-note"' if section.note else ""
    # A list without bullets is none to some screen readers, unless it says its role.
    body = f'<ol role="list" aria-labelledby="{name}">\n{tiles}\n</ol>' if tiles else "<p>Nothing was found.</p>"
    return (
        f'<section aria-labelledby="{name}"{described}>\n'
        f'<h2 id="{name}" tabindex="-1">{_text(section.label)}</h2>\n{note}{body}\n</section>'
    )


def _tile(hit: Hit, better: Hit | None, name: str, thumbnail: bytes | None) -> str:
    shown = caption(hit, better)
    title, product = html.escape(shown.title), _text(hit.product_id)
    image = '<div class="none">no image</div>'
    if thumbnail:
        data = base64.b64encode(thumbnail).decode()
        image = f'<img src="data:image/jpeg;base64,{data}" alt="picture of product {product}" title="{product}">'
    badge = same = left_out = ""
    if hit.cluster is not None:
        badge = f'<span class="badge c{hit.cluster % _COLOURS}">{shown.cluster}</span>'
    if better is not None:
        same = f'<a class="same" href="#{name}-{better.rank}">{shown.same}</a>'
    if shown.left_out:
        ids = "".join(f"<li>{_text(product_id)}</li>" for product_id in hit.duplicates)
        left_out = f'<details><summary>{shown.left_out}</summary><ul role="list">{ids}</ul></details>'
    reach = ' tabindex="0"' if len(shown.title) > _LONG_TITLE else ""  # where it may be cut, the focus shows it whole
    category = f"<span>{html.escape(shown.category)}</span>" if shown.category else ""
    marked = ' class="alike"' if same else ""
    return (
        f'<li id="{name}-{hit.rank}"{marked}><figure><div class="top">{image}{badge}{same}</div>'
        f'<figcaption><b dir="auto"{reach}>{title}</b>{category}<span>{shown.score}</span>{left_out}</figcaption>'
        "</figure></li>"
    )


def _text(text: object) -> str:
    return html.escape(visible(text))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{heading}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#results">Skip to the results</a>
<header><h1 dir="auto">{heading}</h1>{note}
<nav aria-label="Lists"><ul role="list">
{links}
</ul></nav></header>
<main id="results" tabindex="-1">
{sections}
</main>
</body>
</html>
"""
