"""The contact sheet as a page: HTML without a script, its one style named by hash in the content security policy."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.query.contact_sheet import Section, caption
from pipeline.records import Hit
from pipeline.shown import escaped, html_page

_LONG_TITLE = 36
"""Characters from which a title may be cut after three lines, and is shown whole when it has the focus."""

_COLOURS = 8


def page(sections: Sequence[Section], *, query: str, thumbnails: Mapping[str, bytes], note: str = "") -> str:
    """The contact sheet as HTML.

    A section is a list with a heading; a link that skips to it is in the page's navigation. A hit that looks like a
    better one links to it; the ids of duplicates that are not shown unfold. All of that works by keyboard.
    """
    lead = f"<p>{escaped(note)}</p>" if note else ""
    links = "\n".join(
        f'<li><a href="#s{number}">{escaped(section.label)}</a></li>' for number, section in enumerate(sections)
    )
    lists = "\n".join(list_of(section, f"s{number}", thumbnails) for number, section in enumerate(sections))
    body = (
        '<a class="skip" href="#results">Skip to the results</a>\n'
        f'<header><h1 dir="auto">{escaped(query)}</h1>{lead}\n'
        f'<nav aria-label="Lists"><ul role="list">\n{links}\n</ul></nav></header>\n'
        f'<main id="results" tabindex="-1">\n{lists}\n</main>'
    )
    return html_page(query, style(), body, sources="img-src data:")


def style() -> str:
    """The style of a page with such lists."""
    return (Path(__file__).parent / "contact_page.css").read_text(encoding="utf-8")


def list_of(section: Section, name: str, thumbnails: Mapping[str, bytes], *, heading: str = "h2") -> str:
    """One result list as markup.

    Args:
        section: the list.
        name: the id of its heading, of letters and digits, and the beginning of its hits' ids.
        thumbnails: JPEG bytes by product_id.
        heading: `h2` or a lower one.
    """
    tiles = "\n".join(
        _tile(hit, section.better(place), name, thumbnails.get(hit.product_id), section.remarks.get(place, ""))
        for place, hit in enumerate(section.hits)
    )
    note = f'<p id="{name}-note">{escaped(section.note)}</p>\n' if section.note else ""
    described = f' aria-describedby="{name}-note"' if section.note else ""
    # A list without bullets is none to some screen readers, unless it says its role.
    body = f'<ol role="list" aria-labelledby="{name}">\n{tiles}\n</ol>' if tiles else "<p>Nothing was found.</p>"
    return (
        f'<section aria-labelledby="{name}"{described}>\n'
        f'<{heading} id="{name}" tabindex="-1">{escaped(section.label)}</{heading}>\n{note}{body}\n</section>'
    )


def _tile(hit: Hit, better: Hit | None, name: str, thumbnail: bytes | None, remark: str) -> str:
    shown = caption(hit, better)
    title, product = html.escape(shown.title), escaped(hit.product_id)
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
        ids = "".join(f"<li>{escaped(product_id)}</li>" for product_id in hit.duplicates)
        left_out = f'<details><summary>{shown.left_out}</summary><ul role="list">{ids}</ul></details>'
    reach = ' tabindex="0"' if len(shown.title) > _LONG_TITLE else ""  # where it may be cut, the focus shows it whole
    category = f"<span>{html.escape(shown.category)}</span>" if shown.category else ""
    said = f"<span>{escaped(remark)}</span>" if remark else ""
    marked = ' class="alike"' if same else ""
    return (
        f'<li id="{name}-{hit.rank}"{marked}><figure><div class="top">{image}{badge}{same}</div>'
        f'<figcaption><b dir="auto"{reach}>{title}</b>{category}<span>{shown.score}</span>{said}{left_out}</figcaption>'
        "</figure></li>"
    )
