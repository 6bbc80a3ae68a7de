"""Searches and products as the JSON of an answer; made in the thread that searched, not in the event loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipeline.errors import QueryError
from pipeline.query import Mixture, Searcher
from pipeline.query.contact_sheet import caption
from pipeline.query.request import VECTOR_MODES
from pipeline.query.rerank import is_distance
from pipeline.records import Hit
from pipeline.shown import as_json, visible

_LONGEST_ID = 100


class NotFound(Exception):
    """A product that the release does not have."""


def search_answer(searcher: Searcher, query: object, chosen: Mapping[str, Any], mark: float | None) -> bytes:
    """Search, and give the answer as JSON.

    Args:
        searcher: held on a release.
        query: as `Searcher.search` takes it.
        chosen: its options.
        mark: cosine distance up to which two images of the page look the same; None: they are not compared.
    """
    begun = time.perf_counter()
    if mark is not None and not is_distance(mark):
        raise QueryError(f"mark_duplicates is a cosine distance from 0 to 2, not {mark!r}.")
    hits = searcher.search(query, **chosen)
    alike = {} if mark is None else hits.look_alikes(mark)
    was_reordered = chosen["diversify"] is not None
    return as_json(
        {
            "release": searcher.release.release,
            "hits": [_hit(hit, hits[alike[place]] if place in alike else None) for place, hit in enumerate(hits)],
            "diversity": hits.diversity if was_reordered else None,
            "rank_correlation": hits.rank_correlation,
            "seconds": round(time.perf_counter() - begun, 6),
        }
    )


def similar_answer(searcher: Searcher, product_id: str, chosen: Mapping[str, Any], mark: float | None) -> bytes:
    """Products whose vectors are near a product's, as JSON; itself left out.

    Raises:
        NotFound: there is no such product.
        QueryError: it has no such vector.
    """
    mode = chosen["mode"]
    if mode not in VECTOR_MODES:
        raise QueryError(f"Similar products are found by {', '.join(VECTOR_MODES)}, not {mode!r}.")
    column = f"{mode}_vector"
    found = searcher.products([product_id], [column])
    if product_id not in found:
        raise NotFound(f"There is no product {_named(product_id)} in release {searcher.release.release}.")
    vector = found[product_id][column]
    if vector is None:
        lacks = "text" if mode == "text" else "image"
        raise QueryError(f"Product {_named(product_id)} has no {lacks}, so nothing is similar to it in mode {mode}.")
    itself = {"product_id": {"ne": product_id}}
    where = chosen["where"]
    where = {"and": [where, itself]} if where else itself
    return search_answer(searcher, vector, {**chosen, "where": where}, mark)


def schema_answer(searcher: Searcher) -> bytes:
    """What can be asked of a release, as JSON."""
    release = searcher.release
    return as_json(
        {
            "release": release.release,
            "products": release.checks.get("products"),
            "model": release.model,
            "modes": searcher.modes,
            "columns": [asdict(facet) for facet in searcher.facets()],
        }
    )


def texts_of(query: object) -> list[str]:
    """The texts that a query needs the text tower for."""
    parts = query.parts if isinstance(query, Mixture) else [(query, 1.0)]
    return [part for part, _ in parts if isinstance(part, str)]


def _hit(hit: Hit, better: Hit | None) -> dict[str, Any]:
    shown = caption(hit)
    return {
        "product_id": hit.product_id,
        "score": hit.score,
        "rank": hit.rank,
        "cluster": hit.cluster,
        "duplicates": hit.duplicates,
        "looks_like": None if better is None else better.product_id,
        "caption": {"title": shown.title, "category": shown.category},
        "fields": hit.fields,
    }


def _named(product_id: str) -> str:
    """An id in a sentence: not more of it than a person reads."""
    short = visible(product_id[:_LONGEST_ID])
    return f"'{short}'" if len(product_id) <= _LONGEST_ID else f"'{short}…'"
