"""Queries to rankings in three modes, and which hits are relevant: what is to be measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.errors import QueryError
from pipeline.evaluate import measures
from pipeline.evaluate.exact import Ranking, exact_search
from pipeline.evaluate.products import Products, read_blocks, read_products
from pipeline.evaluate.queries import Query, draw_queries
from pipeline.query import Searcher
from pipeline.query.request import VECTOR_MODES
from pipeline.store.tables import Database

DEPTH = 100
"""So many hits are looked at: the largest k of the published table."""

Told = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        recipe: of the queries, one of `queries.RECIPES`.
        queries: how many.
        seed: of the draw and of the bootstrap.
        fine: how fine is defined, one of `products.FINE`.
        keeps_source: whether the product that a query was drawn from may be among its hits.
        through_index: answer through the release's vector index as well.
    """

    recipe: str = "article"
    queries: int = 1000
    seed: int = 0
    fine: str = "category"
    keeps_source: bool = False
    through_index: bool = False


@dataclass(frozen=True)
class Relevance:
    """What is relevant to each query at one level.

    Attributes:
        asked: bool (Q,), whether the level is asked of the query at all.
        totals: int64 (Q,), how many products are relevant.
        ideal: float64 (Q, depth), gains of the best possible ranking.
        mean_gain: float64 (Q,), of the relevant products.
        groups: int32 (Q,), the category, or -1; queries of one group are one for macro means.
        names: of the groups.
    """

    asked: npt.NDArray[np.bool_]
    totals: npt.NDArray[np.int64]
    ideal: npt.NDArray[np.float64]
    mean_gain: npt.NDArray[np.float64]
    groups: npt.NDArray[np.int32]
    names: tuple[str, ...]
    gains_of: Callable[[npt.NDArray[np.int32]], npt.NDArray[np.float64]] = field(repr=False)
    """int32 (Q, n) places of hits, -1 for none, to float64 (Q, n) gains."""
    totals_of: Callable[[npt.NDArray[np.int32]], npt.NDArray[np.int64]] = field(repr=False)
    """int32 (n,) places of candidates to int64 (Q,), how many of them are relevant."""


@dataclass(frozen=True)
class Answers:
    """Queries and what came back, before anything is measured.

    Attributes:
        products: of the release.
        queries: in order.
        vectors: float32 (Q, D), unit vectors of the queries.
        left_out: int32 (Q,), place of the product that is no candidate, or -1.
        rankings: by mode, exact.
        indexed: by mode int32 (Q, depth), places through the index; empty where that was not asked.
        relevance: by level, in the order of `LEVELS`.
        seconds: by step.
    """

    products: Products
    queries: Sequence[Query]
    vectors: npt.NDArray[np.float32]
    left_out: npt.NDArray[np.int32]
    rankings: Mapping[str, Ranking]
    indexed: Mapping[str, npt.NDArray[np.int32]]
    relevance: Mapping[str, Relevance]
    seconds: dict[str, float]

    def gains(self, level: str, mode: str) -> npt.NDArray[np.float64]:
        """float64 (Q, depth), of the exact ranking."""
        return self.relevance[level].gains_of(self.rankings[mode].places)


def answer(
    searcher: Searcher,
    settings: Settings,
    *,
    queries: Callable[[Products], Sequence[Query]] | None = None,
    tell: Told = lambda line: None,
) -> Answers:
    """Draw the queries, embed them, and search exactly in all modes.

    Args:
        searcher: on the release.
        settings: what is asked.
        queries: makes the queries of the products, in the place of the recipe.
        tell: told lines of progress.

    Raises:
        QueryError: there are no queries, or nothing says what is relevant to them.
    """
    seconds: dict[str, float] = {}
    db, version = Database(searcher.db), searcher.release.versions["products"]
    with timed(seconds, "read products"):
        products = read_products(db, version, fine=settings.fine)
    with timed(seconds, "draw queries"):
        drawn = (
            draw_queries(products, settings.recipe, count=settings.queries, seed=settings.seed)
            if queries is None
            else queries(products)
        )
    tell(f"{len(products):,} products, {len(drawn):,} queries")
    with timed(seconds, "embed queries"):
        vectors = np.stack(searcher.encode([query.text for query in drawn]))
    sources = products.places([query.source or "" for query in drawn])
    left_out = np.full(len(drawn), -1, np.int32) if settings.keeps_source else sources
    with timed(seconds, "exact search"):
        rankings = exact_search(
            read_blocks(db, version, products, VECTOR_MODES),
            vectors,
            modes=VECTOR_MODES,
            k=DEPTH,
            left_out=left_out,
            progress=_progress(tell, len(products)),
        )
    indexed = {}
    if settings.through_index:
        for mode in VECTOR_MODES:
            with timed(seconds, f"index, {mode}"):
                indexed[mode] = _through_index(searcher, products, vectors, left_out, mode)
            tell(f"through the index: {mode}")
    return Answers(
        products, drawn, vectors, left_out, rankings, indexed, relevance_of(drawn, products, left_out), seconds
    )


def relevance_of(queries: Sequence[Query], products: Products, left_out: npt.NDArray[np.int32]) -> dict[str, Relevance]:
    """What is relevant at each level that at least one query is asked at.

    Raises:
        QueryError: at none.
    """
    found = {level: _by_category(queries, products, left_out, level) for level in ("broad", "fine")}
    found["judged"] = _by_judgement(queries, products)
    found = {level: relevance for level, relevance in found.items() if relevance.asked.any()}
    if not found:
        raise QueryError("Nothing says what is relevant to any of the queries: the products have no categories.")
    return found


def _by_category(
    queries: Sequence[Query], products: Products, left_out: npt.NDArray[np.int32], level: str
) -> Relevance:
    labels = products.levels[level]
    codes = np.array([labels.code_of.get(getattr(query, level) or "", -1) for query in queries], np.int32)
    is_own = (left_out >= 0) & (codes >= 0)
    is_own[is_own] = labels.codes[left_out[is_own]] == codes[is_own]

    def totals_of(places: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        there = labels.codes[places]
        sizes = np.bincount(there[there >= 0], minlength=len(labels.names) + 1)
        counts: npt.NDArray[np.int64] = np.where(codes >= 0, sizes[codes], 0) - (is_own & np.isin(left_out, places))
        return counts

    totals = totals_of(np.arange(len(products), dtype=np.int32))

    def gains_of(places: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        is_hit = (places >= 0) & (codes[:, None] >= 0)
        gains: npt.NDArray[np.float64] = (is_hit & (labels.codes[places] == codes[:, None])).astype(np.float64)
        return gains

    ideal = measures.binary_ideal(totals, DEPTH)
    return Relevance(
        (codes >= 0) & (totals > 0), totals, ideal, np.ones(len(codes)), codes, labels.names, gains_of, totals_of
    )


def _by_judgement(queries: Sequence[Query], products: Products) -> Relevance:
    grades = [
        {place: float(grade) for place, grade in zip(products.places(list(j)).tolist(), j.values(), strict=True)}
        if (j := query.judged)
        else {}
        for query in queries
    ]
    for known in grades:
        known.pop(-1, None)  # judged, but not in the release
    ideal = np.zeros((len(queries), DEPTH))
    for row, known in zip(ideal, grades, strict=True):
        best = sorted(known.values(), reverse=True)[:DEPTH]
        row[: len(best)] = best
    totals = np.array([sum(grade > 0 for grade in known.values()) for known in grades], np.int64)

    def gains_of(places: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        rows = [[known.get(place, 0.0) for place in row] for row, known in zip(places.tolist(), grades, strict=True)]
        return np.array(rows, np.float64).reshape(places.shape)

    def totals_of(places: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        there = set(places.tolist())
        return np.array([sum(grade > 0 and p in there for p, grade in known.items()) for known in grades], np.int64)

    names = tuple(query.query_id for query in queries)
    mean = np.array([sum(known.values()) for known in grades]) / np.maximum(totals, 1)
    return Relevance(
        totals > 0, totals, ideal, mean, np.arange(len(queries), dtype=np.int32), names, gains_of, totals_of
    )


def _through_index(
    searcher: Searcher,
    products: Products,
    vectors: npt.NDArray[np.float32],
    left_out: npt.NDArray[np.int32],
    mode: str,
) -> npt.NDArray[np.int32]:
    """int32 (Q, depth), places of the hits through the index, -1 where there are fewer."""
    found = np.full((len(vectors), DEPTH), -1, np.int32)
    answers = searcher.search_many(list(vectors), mode=mode, k=DEPTH + 1, columns=[])
    for row, hits, own in zip(found, answers, left_out, strict=True):
        places = products.places([hit.product_id for hit in hits])
        places = places[(places != own) | (own < 0)][:DEPTH]
        row[: len(places)] = places
    return found


def _progress(tell: Told, total: int) -> Callable[[int], None]:
    """Tells about every tenth of the rows."""
    told = 0

    def progress(rows: int) -> None:
        nonlocal told
        if rows * 10 // max(1, total) > told:
            told = rows * 10 // max(1, total)
            tell(f"exact search: {rows:,} of {total:,} products")

    return progress


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Note how long a step takes."""
    start = time.monotonic()
    yield
    seconds[step] = time.monotonic() - start
