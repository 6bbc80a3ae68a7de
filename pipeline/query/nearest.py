"""The nearest products of one opened release: probing, filters, ties, diversity, and the page that was asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.query.encoder import Encoder, Vector
from pipeline.query.filters import Node, expression
from pipeline.query.request import Request
from pipeline.query.rerank import rerank
from pipeline.records import Hit

if TYPE_CHECKING:
    from pipeline.store.releases import Release

_RARE_ROWS = 5_000
"""A filter that at most so many products pass is rare: all partitions are read."""

_RARE_REFINE = 20

_MAX_TIES = 100_000
_CACHED_FILTERS = 256


@dataclass(frozen=True, slots=True)
class Pinned:
    """One release, opened: table handles stay on its versions."""

    release: Release
    products: Any
    images: Any
    schema: pa.Schema
    encoder: Encoder
    passing: OrderedDict[Node, int] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)


def nearest(pinned: Pinned, vector: Vector, request: Request) -> list[Hit]:
    """Candidates, in their new order where they are diversified, and of that the asked page."""
    end = request.offset + request.k
    if request.diversify is None:
        page = _candidates(pinned, vector, request, end).slice(request.offset)
        return _hits(page, request, [None] * len(page))
    found = _candidates(pinned, vector, request, max(request.diversify.candidates, end))
    result = rerank(_rows(found["image_vector"]), request.diversify)
    order = list(result.order[request.offset : end])
    return _hits(found.take(pa.array(order, pa.int64())), request, [result.clusters[at] for at in order])


def _hits(page: pa.Table, request: Request, clusters: Sequence[int | None]) -> list[Hit]:
    ids, distances = page["product_id"].to_pylist(), page["_distance"].to_pylist()
    fields = page.select(list(request.columns)).to_pylist() if request.columns else [{} for _ in ids]
    return [
        Hit(product_id, max(-1.0, min(1.0, 1.0 - distance)), rank, values, cluster)
        for rank, (product_id, distance, values, cluster) in enumerate(
            zip(ids, distances, fields, clusters, strict=True), request.offset + 1
        )
    ]


def _rows(vectors: pa.ChunkedArray) -> list[Vector | None]:
    """Rows (D,) of a vector column, None where it is null."""
    column = vectors.combine_chunks()
    matrix = column.values.to_numpy().reshape(-1, column.type.list_size)[column.offset : column.offset + len(column)]
    return [row if valid else None for row, valid in zip(matrix, column.is_valid().to_pylist(), strict=True)]


def _candidates(pinned: Pinned, vector: Vector, request: Request, limit: int) -> pa.Table:
    """The best `limit` products by (distance, product_id).

    One more than asked is fetched: where it ties with the last one, more are, until the tie is whole. Else which of
    the equal products are on a page would be chance.
    """
    columns = list(dict.fromkeys(["product_id", *request.columns, *(["image_vector"] if request.diversify else [])]))
    filter_ = None if request.where is None else expression(request.where)
    passing = None if request.where is None else _passing(pinned, request.where, filter_)
    fetch = limit + 1
    while True:
        query = pinned.products.search(vector, vector_column_name=f"{request.mode}_vector").distance_type("cosine")
        query = _probing(query, pinned.release.index.get(request.mode), request.exact, passing, fetch)
        query = query if filter_ is None else query.where(filter_)
        found = query.select([*columns, "_distance"]).limit(fetch).to_arrow()
        found = found.sort_by([("_distance", "ascending"), ("product_id", "ascending")])
        distances = found["_distance"].to_numpy()
        if len(found) < fetch or distances[-1] > distances[limit - 1] or fetch > _MAX_TIES:
            return found.slice(0, limit)
        fetch *= 4


def _probing(query: Any, index: Mapping[str, Any] | None, exact: bool, passing: int | None, limit: int) -> Any:
    """How much of the index a query reads.

    With a filter, partitions beyond the probed ones are read where those do not fill `limit`. A rare filter reads all
    of them and scores enough candidates again that nothing is missed: still 30 times faster than without the index.
    """
    if exact or index is None or index["kind"] == "exact":
        return query.bypass_vector_index()
    if passing is None:
        return query.nprobes(index["probes"]).refine_factor(index["refine"])
    if passing > _RARE_ROWS:
        return query.minimum_nprobes(index["probes"]).maximum_nprobes(0).refine_factor(index["refine"])
    refine = max(index["refine"], min(-(-passing // limit), _RARE_REFINE))
    return query.minimum_nprobes(index["partitions"]).maximum_nprobes(0).refine_factor(refine)


def _passing(pinned: Pinned, node: Node, filter_: Any) -> int:
    """How many products pass a filter, counted no further than needed and remembered for the release."""
    with pinned.lock:
        known = pinned.passing.get(node)
    if known is None:
        scan = pinned.products.search().where(filter_).select(["product_id"]).limit(_RARE_ROWS + 1)
        known = len(scan.to_arrow())
        with pinned.lock:
            pinned.passing[node] = known
            while len(pinned.passing) > _CACHED_FILTERS:
                pinned.passing.popitem(last=False)
    return known
