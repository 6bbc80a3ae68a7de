"""The nearest products of one opened release: probing, filters, ties, diversity, and the page that was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.errors import QueryError
from pipeline.query.encoder import Encoder, Vector
from pipeline.query.filter_values import is_storable
from pipeline.query.filters import Node, expression
from pipeline.query.recent import Recent
from pipeline.query.request import HYBRID_WINDOW, Request
from pipeline.query.rerank import distinct, rerank
from pipeline.query.results import Hits
from pipeline.records import Hit

if TYPE_CHECKING:
    from pipeline.store.releases import Release

RARE_ROWS = 5_000
"""A filter that at most so many products pass is rare: all partitions are read."""

_RARE_REFINE = 20

_AMPLE = 3
"""Partitions are of unlike size: those that are probed should hold so many times what is asked for, or all are read."""

_MAX_TIES = 100_000
_MAX_WORD_TIES = 3_000  # a common word alone ties thousands
_RANK_CONSTANT = 60
_CACHED_FILTERS = 256
_IDS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Pinned:
    """One release, opened: table handles stay on its versions."""

    release: Release
    products: Any
    images: Any
    schema: pa.Schema
    encoder: Encoder
    text_columns: tuple[str, ...] = ()
    """Those of title and description that have a full-text index."""
    passing: Recent[Node, int] = field(default_factory=lambda: Recent(_CACHED_FILTERS))
    """How many products pass a filter, counted no further than `RARE_ROWS` and one."""


def nearest(pinned: Pinned, vector: Vector, words: str, request: Request) -> Hits:
    """Candidates, without duplicates and in their new order where that is asked for, and of that the asked page."""
    end = request.offset + request.k
    wanted = end if request.diversify is None else min(max(request.diversify.candidates, end), request.window)
    found, duplicates = _distinct(pinned, vector, words, request, wanted)
    order, clusters = list(range(len(found))), dict[int, int | None]()
    if request.diversify is not None:
        result = rerank(_rows(found["image_vector"]), request.diversify, found["_score"].to_pylist())
        order, clusters = list(result.order), dict(enumerate(result.clusters))
    places = order[request.offset : end]
    page = found.take(pa.array(places, pa.int64()))
    ids, scores = page["product_id"].to_pylist(), page["_score"].to_pylist()
    fields = page.select(list(request.columns)).to_pylist() if request.columns else [{} for _ in ids]
    hits = [
        Hit(
            product_id,
            max(-1.0, min(1.0, score)),
            rank,
            values,
            clusters.get(place),
            tuple(duplicates.get(place, ())),
        )
        for rank, (place, product_id, score, values) in enumerate(
            zip(places, ids, scores, fields, strict=True), request.offset + 1
        )
    ]

    def vectors() -> list[Vector | None]:
        return _rows(page["image_vector"]) if "image_vector" in page.column_names else image_vectors(pinned, ids)

    return Hits(hits, vectors=vectors, places=None if request.diversify is None else places)


def image_vectors(pinned: Pinned, product_ids: Sequence[str]) -> list[Vector | None]:
    """Image vectors (D,) of products, in their order; None where one has no image."""
    known: dict[str, Vector | None] = {}
    for found in rows_of(pinned.products, product_ids, ["product_id", "image_vector"]):
        known |= zip(found["product_id"].to_pylist(), _rows(found["image_vector"]), strict=True)
    return [known[product_id] for product_id in product_ids]


def rows_of(table: Any, product_ids: Iterable[str], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of a table's rows of these products, some hundred products at a time; ids that no table holds have none.

    Args:
        table: LanceDB's handle of `products` or `images`, on its version.
        product_ids: in any order.
        columns: which are read.
    """
    wanted = sorted(product_id for product_id in set(product_ids) if is_storable(product_id))
    for at in range(0, len(wanted), _IDS_AT_ONCE):
        filter_ = expression(("in", "product_id", tuple(wanted[at : at + _IDS_AT_ONCE])))
        yield table.search().where(filter_).select(list(columns)).limit(None).to_arrow()


def _distinct(
    pinned: Pinned, vector: Vector, words: str, request: Request, wanted: int
) -> tuple[pa.Table, dict[int, list[str]]]:
    """The best `wanted` candidates, and by place the products that were left out for it as its duplicates."""
    if request.collapse is None:
        return _candidates(pinned, vector, words, request, wanted), {}
    limit = 2 * wanted
    while True:
        found = _candidates(pinned, vector, words, request, min(limit, request.window))
        kept, left_out = distinct(_rows(found["image_vector"]), request.collapse)
        if len(kept) >= wanted or len(found) < limit or limit >= request.window:
            break
        limit *= 2
    ids = found["product_id"].to_pylist()
    duplicates = {place: [ids[other] for other in left_out.get(at, ())] for place, at in enumerate(kept[:wanted])}
    return found.take(pa.array(kept[:wanted], pa.int64())), duplicates


def _rows(vectors: pa.ChunkedArray) -> list[Vector | None]:
    """Rows (D,) of a vector column, None where it is null."""
    column = vectors.combine_chunks()
    matrix = column.values.to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)[
        column.offset : column.offset + len(column)
    ]
    return [row if valid else None for row, valid in zip(matrix, column.is_valid().to_pylist(), strict=True)]


def _candidates(pinned: Pinned, vector: Vector, words: str, request: Request, limit: int) -> pa.Table:
    """The best `limit` products by (score, product_id), with `_score`, the asked columns and what a rerank needs."""
    needs_images = request.diversify is not None or request.collapse is not None
    columns = list(dict.fromkeys(["product_id", *request.columns, *(["image_vector"] if needs_images else [])]))
    if request.mode != "hybrid":
        found = _by_vector(pinned, vector, request, columns, limit)
        scores = pa.array(1.0 - found["_distance"].to_numpy().astype(np.float64))
        return found.drop_columns("_distance").append_column("_score", scores)
    by_vector = _by_vector(pinned, vector, request, ["product_id"], HYBRID_WINDOW)["product_id"].to_pylist()
    fused = reciprocal_rank([by_vector, _by_words(pinned, words, request)])[:limit]
    filter_ = expression(("in", "product_id", tuple(product_id for product_id, _ in fused)))
    found = pinned.products.search().where(filter_).select(columns).limit(None).to_arrow()
    places = {product_id: place for place, product_id in enumerate(found["product_id"].to_pylist())}
    found = found.take(pa.array([places[product_id] for product_id, _ in fused], pa.int64()))
    return found.append_column("_score", pa.array([score for _, score in fused], pa.float64()))


def reciprocal_rank(lists: Sequence[Sequence[str]]) -> list[tuple[str, float]]:
    """Fuse ranked lists: each adds 1 / (60 + rank) to its members' scores (Cormack, Clarke and Buettcher, SIGIR 2009).

    Returns:
        Members and scores, best first; equal ones by name.
    """
    scores: dict[str, float] = {}
    for ranked in lists:
        for rank, member in enumerate(ranked, 1):
            scores[member] = scores.get(member, 0.0) + 1.0 / (_RANK_CONSTANT + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def _by_words(pinned: Pinned, words: str, request: Request) -> list[str]:
    """Products whose title or description holds a word, best first by BM25; equal ones by key."""
    from lancedb.query import MultiMatchQuery

    columns = pinned.text_columns
    if not columns:
        raise QueryError(
            f"Release {pinned.release.release} has no full-text index, which `hybrid` needs: the next release that "
            "changes products will have one."
        )
    fetch = HYBRID_WINDOW + 1
    while True:
        query = pinned.products.search(MultiMatchQuery(words, list(columns)), query_type="fts")
        query = query if request.where is None else query.where(expression(request.where))
        found = query.select(["product_id", "_score"]).limit(fetch).to_arrow()
        found = found.sort_by([("_score", "descending"), ("product_id", "ascending")])
        scores = found["_score"].to_numpy()
        if len(found) < fetch or scores[-1] < scores[HYBRID_WINDOW - 1] or fetch > _MAX_WORD_TIES:
            ids: list[str] = found["product_id"].slice(0, HYBRID_WINDOW).to_pylist()
            return ids
        fetch *= 4


def _by_vector(pinned: Pinned, vector: Vector, request: Request, columns: Sequence[str], limit: int) -> pa.Table:
    """The nearest `limit` products by (distance, product_id), with `_distance`.

    One more than asked is fetched: where it ties with the last one, more are, until the tie is whole. Else which of
    the equal products are on a page would be chance.
    """
    filter_ = None if request.where is None else expression(request.where)
    count = None if request.where is None else passing(pinned, request.where, filter_)
    fetch = limit + 1
    while True:
        query, _ = vector_query(pinned, vector, request, filter_, count, fetch)
        found = query.select([*columns, "_distance"]).limit(fetch).to_arrow()
        found = found.sort_by([("_distance", "ascending"), ("product_id", "ascending")])
        distances = found["_distance"].to_numpy()
        if len(found) < fetch or distances[-1] > distances[limit - 1] or fetch > _MAX_TIES:
            return found.slice(0, limit)
        fetch *= 4


@dataclass(frozen=True, slots=True)
class Probing:
    """How much of the index a query reads; no probes: nothing of it, every vector is compared."""

    probes: int = 0
    refine: int = 0


def vector_query(
    pinned: Pinned, vector: Vector, request: Request, filter_: Any, count: int | None, limit: int
) -> tuple[Any, Probing]:
    """LanceDB's query for the nearest `limit`, without columns.

    With a filter, partitions beyond the probed ones are read where those do not fill `limit`. A rare filter reads all
    of them and scores enough candidates again that nothing is missed: still 30 times faster than without the index.

    Args:
        pinned: the opened release.
        vector: float32 (D,) of unit length.
        request: its mode, and whether it is exact.
        filter_: LanceDB's expression, or None.
        count: how many products pass it, at most one more than `RARE_ROWS`.
        limit: how many are to be found.
    """
    query = pinned.products.search(vector, vector_column_name=f"{request.vector_mode}_vector").distance_type("cosine")
    index = pinned.release.index.get(request.vector_mode)
    if request.exact or index is None or index["kind"] == "exact":
        query, how = query.bypass_vector_index(), Probing()
    elif count is None:
        how = Probing(index["probes"], index["refine"])
        query = query.nprobes(how.probes).refine_factor(how.refine)
        if limit * _AMPLE > index["rows"] * how.probes / index["partitions"]:  # the probed partitions may hold too few
            query = query.maximum_nprobes(0)
    else:
        how = Probing(index["probes"], index["refine"])
        if count <= RARE_ROWS:
            how = Probing(index["partitions"], max(how.refine, min(-(-count // limit), _RARE_REFINE)))
        query = query.minimum_nprobes(how.probes).maximum_nprobes(0).refine_factor(how.refine)
    return query if filter_ is None else query.where(filter_), how


def passing(pinned: Pinned, node: Node, filter_: Any) -> int:
    """How many products pass a filter, counted no further than needed and remembered for the release."""
    known = pinned.passing.get(node)
    if known is None:
        scan = pinned.products.search().where(filter_).select(["product_id"]).limit(RARE_ROWS + 1)
        known = len(scan.to_arrow())
        pinned.passing.put(node, known)
    return known
