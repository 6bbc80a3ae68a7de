"""Search results that a person can look at: a row of pictures per result list, as a page (.html) or picture (.png)."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import QueryError
from pipeline.records import Hit
from pipeline.shown import visible


@dataclass(frozen=True, slots=True)
class Section:
    """One result list: a row of the sheet.

    Attributes:
        label: what the list is, such as `query to description`.
        hits: best first; shown with `title`, `broad_category` and `fine_category` where their fields have them.
        note: a short remark beside the label.
    """

    label: str
    hits: Sequence[Hit]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Caption:
    """The texts under one picture, safe to draw: no control characters."""

    title: str
    category: str
    score: str
    cluster: int | None


def contact_sheet(
    sections: Sequence[Section],
    path: str | Path,
    *,
    query: str,
    thumbnails: Mapping[str, bytes],
    note: str = "",
) -> Path:
    """Write a contact sheet.

    Args:
        sections: the rows, in order.
        path: a name that ends in `.html` (one self-contained page, no script, nothing loaded) or `.png`.
        query: what was searched, for the heading.
        thumbnails: JPEG bytes by product_id, as `Searcher.thumbnails` gives them; a product without one gets a blank
            tile that says so.
        note: a line under the heading.

    Returns:
        The path.

    Raises:
        QueryError: the name ends in something else, or cannot be written.
        MissingExtra: a PNG is asked for and Pillow is not installed.
    """
    path = Path(path)
    if path.suffix == ".html":
        content = page(sections, query=query, thumbnails=thumbnails, note=note).encode()
    elif path.suffix == ".png":
        from pipeline.query.contact_picture import picture

        content = picture(sections, query=query, thumbnails=thumbnails, note=note)
    else:
        raise QueryError(f"A contact sheet is an .html or a .png file, not {path.name!r}.")
    try:
        path.write_bytes(content)
    except OSError as error:
        raise QueryError(f"The contact sheet {path} cannot be written: {error.strerror}.") from error
    return path


def caption(hit: Hit) -> Caption:
    """What stands under a hit's picture."""
    title = html.unescape(str(hit.fields.get("title") or hit.fields.get("description") or hit.product_id))
    parts = dict.fromkeys(hit.fields.get(name) for name in ("broad_category", "fine_category"))
    category = " › ".join(visible(part) for part in parts if part)
    return Caption(visible(title), category, f"{hit.score:.3f}", hit.cluster)


def page(sections: Sequence[Section], *, query: str, thumbnails: Mapping[str, bytes], note: str = "") -> str:
    """The contact sheet as HTML: no script, its one style named by hash in the content security policy."""
    style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    heading = html.escape(visible(query))
    return _PAGE.format(
        policy=html.escape(policy, quote=True),
        style=_STYLE,
        heading=heading,
        note=f"<p>{html.escape(visible(note))}</p>" if note else "",
        sections="\n".join(_section(section, number, thumbnails) for number, section in enumerate(sections)),
    )


def _section(section: Section, number: int, thumbnails: Mapping[str, bytes]) -> str:
    tiles = "\n".join(_tile(hit, thumbnails.get(hit.product_id)) for hit in section.hits)
    note = f" <small>{html.escape(visible(section.note))}</small>" if section.note else ""
    body = f"<ol>\n{tiles}\n</ol>" if section.hits else "<p>Nothing was found.</p>"
    label = html.escape(visible(section.label))
    return f'<section aria-labelledby="s{number}"><h2 id="s{number}">{label}{note}</h2>\n{body}\n</section>'


def _tile(hit: Hit, thumbnail: bytes | None) -> str:
    shown = caption(hit)
    title, category = html.escape(shown.title), html.escape(shown.category)
    image = '<div class="none" role="img" aria-label="no image">no image</div>'
    if thumbnail:
        image = f'<img src="data:image/jpeg;base64,{base64.b64encode(thumbnail).decode()}" alt="{title}">'
    badge = ""
    if shown.cluster is not None:
        badge = f'<span class="badge c{shown.cluster % 8}">cluster {shown.cluster + 1}</span>'
    return (
        f'<li><figure>{image}{badge}<figcaption><b title="{title}">{title}</b><span>{category}</span>'
        f"<span>{hit.rank}. score {shown.score}</span></figcaption></figure></li>"
    )


_STYLE = """
:root { color-scheme: light dark; --back: #f4f4f2; --card: #fff; --text: #1b1b1a; --soft: #5f5f5b; --line: #dcdcd6; }
@media (prefers-color-scheme: dark) {
  :root { --back: #161616; --card: #222; --text: #efefec; --soft: #aaaaa4; --line: #3a3a38; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 112rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 0.875rem/1.4 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0.5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 1.75rem 0 0.6rem; }
p, small { color: var(--soft); margin: 0.2rem 0 0; font-weight: normal; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 0.75rem;
  grid-template-columns: repeat(auto-fill, minmax(8.75rem, 1fr)); }
figure { position: relative; margin: 0; height: 100%; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; overflow: hidden; }
img, .none { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff; }
.none { display: grid; place-items: center; color: #767672; background: #ececea; }
figcaption { padding: 0.5rem 0.6rem 0.6rem; display: grid; gap: 0.15rem; }
b { font-weight: 600; display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden;
  overflow-wrap: anywhere; min-height: 2.8em; }
figcaption span { color: var(--soft); font-size: 0.8rem; overflow-wrap: anywhere; }
.badge { position: absolute; top: 0.4rem; left: 0.4rem; padding: 0.05rem 0.5rem; border-radius: 1rem; color: #fff;
  font-size: 0.75rem; }
.c0 { background: #2f5fb3; } .c1 { background: #a8440f; } .c2 { background: #22783c; } .c3 { background: #8a3c94; }
.c4 { background: #8f6400; } .c5 { background: #0f7479; } .c6 { background: #b02a57; } .c7 { background: #57575a; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{heading}</h1>{note}</header>
<main>
{sections}
</main>
</body>
</html>
"""
