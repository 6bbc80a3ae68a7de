"""Search results that a person can look at: a row of pictures per result list, as a page (.html) or picture (.png)."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import QueryError
from pipeline.records import Hit
from pipeline.shown import visible

LEAST_THREE_DIGITS = 0.1
"""Scores below are shown with four digits after the point: sums of reciprocal ranks differ in the fourth."""


@dataclass(frozen=True, slots=True)
class Section:
    """One result list: a row of the sheet.

    Attributes:
        label: what the list is, such as `query to description`.
        hits: best first; shown with `title`, `broad_category` and `fine_category` where their fields have them.
        note: a short remark under the label, such as what the scores are.
        alike: hits that look like a better one of the list, place to place, as `Hits.look_alikes` gives them.
        remarks: a word or two at a hit, by place; only the page shows them.
    """

    label: str
    hits: Sequence[Hit]
    note: str = ""
    alike: Mapping[int, int] = field(default_factory=dict)
    remarks: Mapping[int, str] = field(default_factory=dict)

    def better(self, place: int) -> Hit | None:
        """The hit that the one at this place looks like, if there is one."""
        return self.hits[self.alike[place]] if place in self.alike else None


@dataclass(frozen=True, slots=True)
class Caption:
    """The texts at one picture, safe to draw: no control characters.

    Attributes:
        title: the product's title, else its description, else its id.
        category: broad and fine category.
        score: with its rank, as `1. score 0.913`.
        cluster: `cluster 1`, or empty.
        same: `looks like no. 3`, or empty.
        left_out: `+2 alike`, of duplicates that are not shown, or empty.
    """

    title: str
    category: str
    score: str
    cluster: str = ""
    same: str = ""
    left_out: str = ""


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
    kind = path.suffix.lower()
    if kind == ".html":
        from pipeline.query.contact_page import page

        content = page(sections, query=query, thumbnails=thumbnails, note=note).encode()
    elif kind == ".png":
        from pipeline.query.contact_picture import picture

        content = picture(sections, query=query, thumbnails=thumbnails, note=note)
    else:
        raise QueryError(f"A contact sheet is an .html or a .png file, not {visible(path.name)!r}.")
    try:
        path.write_bytes(content)
    except (OSError, ValueError) as error:  # a name with a NUL in it is a ValueError
        said = getattr(error, "strerror", None) or error
        raise QueryError(f"The contact sheet {visible(path)} cannot be written: {said}.") from error
    return path


def caption(hit: Hit, better: Hit | None = None) -> Caption:
    """What stands at a hit's picture; `better` is the hit that it looks like."""
    title = html.unescape(str(hit.fields.get("title") or hit.fields.get("description") or hit.product_id))
    parts = dict.fromkeys(hit.fields.get(name) for name in ("broad_category", "fine_category"))
    digits = 3 if abs(hit.score) >= LEAST_THREE_DIGITS else 4
    return Caption(
        title=visible(title),
        category=" › ".join(visible(part) for part in parts if part),
        score=f"{hit.rank}. score {hit.score:.{digits}f}",
        cluster="" if hit.cluster is None else f"cluster {hit.cluster + 1}",
        same="" if better is None else f"looks like no. {better.rank}",
        left_out=f"+{len(hit.duplicates)} alike" if hit.duplicates else "",
    )
