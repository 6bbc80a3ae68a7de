"""The experiment: queries to rankings in three modes, and what they are worth by each measure and level."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import QueryError
from pipeline.evaluate import measures
from pipeline.evaluate.exact import Ranking, exact_search
from pipeline.evaluate.products import Products, read_blocks, read_products
from pipeline.evaluate.queries import Query, draw_queries
from pipeline.evaluate.results import CUTOFFS, LEVELS, MEASURES, CategoryFigure, Comparison, Figure
from pipeline.evaluate.statistics import bootstrap, holm, paired
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
        groups: int32 (Q,), the category, or -1; queries of one group are one for macro means.
        names: of the groups.
    """

    asked: npt.NDArray[np.bool_]
    totals: npt.NDArray[np.int64]
    ideal: npt.NDArray[np.float64]
    groups: npt.NDArray[np.int32]
    names: tuple[str, ...]
    gains_of: Callable[[npt.NDArray[np.int32]], npt.NDArray[np.float64]] = field(repr=False)
    """int32 (Q, n) places of hits, -1 for none, to float64 (Q, n) gains."""


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
    with _timed(seconds, "read products"):
        products = read_products(db, version, fine=settings.fine)
    with _timed(seconds, "draw queries"):
        drawn = (
            draw_queries(products, settings.recipe, count=settings.queries, seed=settings.seed)
            if queries is None
            else queries(products)
        )
    tell(f"{len(products):,} products, {len(drawn):,} queries")
    with _timed(seconds, "embed queries"):
        vectors = np.stack(searcher.encode([query.text for query in drawn]))
    sources = products.places([query.source or "" for query in drawn])
    left_out = np.full(len(drawn), -1, np.int32) if settings.keeps_source else sources
    with _timed(seconds, "exact search"):
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
            with _timed(seconds, f"index, {mode}"):
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
    totals = np.where(codes >= 0, np.append(labels.sizes, 0)[codes], 0)
    is_own = (left_out >= 0) & (codes >= 0)
    is_own[is_own] = labels.codes[left_out[is_own]] == codes[is_own]
    totals = totals - is_own

    def gains_of(places: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        is_hit = (places >= 0) & (codes[:, None] >= 0)
        gains: npt.NDArray[np.float64] = (is_hit & (labels.codes[places] == codes[:, None])).astype(np.float64)
        return gains

    ideal = measures.binary_ideal(totals, DEPTH)
    return Relevance((codes >= 0) & (totals > 0), totals, ideal, codes, labels.names, gains_of)


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

    names = tuple(query.query_id for query in queries)
    return Relevance(totals > 0, totals, ideal, np.arange(len(queries), dtype=np.int32), names, gains_of)


def figures(answers: Answers, *, seed: int) -> list[Figure]:
    """Every level, mode, measure and k."""
    found = []
    for level, relevance in answers.relevance.items():
        asked = relevance.asked
        for mode, ranking in answers.rankings.items():
            gains = relevance.gains_of(ranking.places)[asked]
            columns = [(measure, k) for measure in MEASURES for k in (CUTOFFS if measure != "mrr" else (DEPTH,))]
            values = np.stack([measured(measure, gains, relevance, k) for measure, k in columns], axis=1)
            through = answers.indexed.get(mode)
            indexed = None if through is None else relevance.gains_of(through)[asked]
            totals = relevance.totals[asked]
            for (measure, k), column, interval in zip(columns, values.T, bootstrap(values, seed=seed), strict=True):
                floor = measures.floor(measure, totals, ranking.candidates[asked], k, relevance.ideal[asked])
                found.append(
                    Figure(
                        level, mode, measure, k, interval,
                        macro=measures.macro(column, relevance.groups[asked]),
                        ceiling=float(measures.ceiling(measure, totals, k).mean()),
                        floor=float(floor.mean()),
                        index=None if indexed is None else float(measured(measure, indexed, relevance, k).mean()),
                    )
                )  # fmt: skip
    return found


def measured(measure: str, gains: npt.NDArray[np.float64], relevance: Relevance, k: int) -> npt.NDArray[np.float64]:
    """One measure (Q',) of gains (Q', depth), those of the queries that are asked at the level."""
    asked = relevance.asked
    if measure == "precision":
        return measures.precision(gains, k)
    if measure == "recall":
        return measures.recall(gains, relevance.totals[asked], k)
    if measure == "ndcg":
        return measures.ndcg(gains, relevance.ideal[asked], k)
    return measures.reciprocal_rank(gains)


def comparisons(answers: Answers, *, seed: int) -> list[Comparison]:
    """Each two modes by precision@k, every level and k; all p-values corrected together."""
    pairs = [("avg", "text"), ("avg", "image"), ("text", "image")]
    found = []
    for level, relevance in answers.relevance.items():
        gains = {mode: answers.gains(level, mode)[relevance.asked] for mode in answers.rankings}
        for k in CUTOFFS:
            values = {mode: measures.precision(gain, k) for mode, gain in gains.items()}
            for first, second in pairs:
                found.append((level, k, first, second, *paired(values[first], values[second], seed=seed)))
    corrected = holm([p for *_, p in found])
    return [Comparison(*row, p_holm) for row, p_holm in zip(found, corrected, strict=True)]


def categories(answers: Answers) -> list[CategoryFigure]:
    """Precision@10 by category, those first whose worst mode is the worst."""
    found = []
    for level, relevance in answers.relevance.items():
        if level not in answers.products.levels:
            continue
        sizes = answers.products.levels[level].sizes
        values = {mode: measures.precision(answers.gains(level, mode), CUTOFFS[0]) for mode in answers.rankings}
        for code in np.unique(relevance.groups[relevance.asked]):
            is_its = relevance.asked & (relevance.groups == code)
            precision = {mode: float(column[is_its].mean()) for mode, column in values.items()}
            name = relevance.names[code]
            found.append(CategoryFigure(level, name, int(is_its.sum()), int(sizes[code]), precision))
    order = {level: place for place, level in enumerate(LEVELS)}
    return sorted(found, key=lambda f: (order[f.level], min(f.precision.values()), f.category))


def per_query(answers: Answers) -> pa.Table:
    """A row for each query: what it asks, its measures by level, mode and k, and its first hits by mode."""
    queries, products = answers.queries, answers.products
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(query, name) for query in queries], kind)
        for name, kind in (
            ("query_id", pa.string()), ("text", pa.string()), ("recipe", pa.string()), ("broad", pa.string()),
            ("fine", pa.string()), ("source", pa.string()), ("is_own_text_only", pa.bool_()),
        )
    }  # fmt: skip
    for level, relevance in answers.relevance.items():
        columns[f"{level}_relevant"] = pa.array(np.where(relevance.asked, relevance.totals, 0))
        for mode in answers.rankings:
            gains = answers.gains(level, mode)[relevance.asked]
            for measure in MEASURES:
                for k in CUTOFFS if measure != "mrr" else (DEPTH,):
                    values = np.full(len(queries), np.nan)
                    values[relevance.asked] = measured(measure, gains, relevance, k)
                    name = f"{level}_{mode}_{measure}" + (f"_{k}" if measure != "mrr" else "")
                    columns[name] = pa.array(values, mask=~relevance.asked)
    ids = np.array([*products.ids.to_pylist(), None], object)
    for mode, ranking in answers.rankings.items():
        hits = [[one for one in row if one is not None] for row in ids[ranking.places].tolist()]
        columns[f"{mode}_hits"] = pa.array(hits, pa.list_(pa.string()))
        scores = [row[np.isfinite(row)] for row in ranking.scores]
        columns[f"{mode}_scores"] = pa.array(scores, pa.list_(pa.float32()))
    return pa.table(columns)


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
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[step] = time.monotonic() - start
