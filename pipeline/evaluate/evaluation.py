"""The published experiment on any release: precision and its kin by mode, how sure they are, what diversity costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from pipeline.catalog.fashion200k import BROAD
from pipeline.evaluate import measures
from pipeline.evaluate.answers import DEPTH, Answers, Relevance, Settings, Told, answer, timed
from pipeline.evaluate.diversity import diversity, read_images
from pipeline.evaluate.products import Products
from pipeline.evaluate.queries import RECIPES, Query
from pipeline.evaluate.results import (
    CUTOFFS,
    LEVELS,
    MEASURES,
    CategoryFigure,
    Comparison,
    Evaluation,
    Example,
    Figure,
)
from pipeline.evaluate.statistics import bootstrap, holm, paired
from pipeline.query import Diversify, Searcher
from pipeline.store.tables import Database


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
            totals, there = relevance.totals[asked], relevance.totals_of(ranking.compared)[asked]
            for (measure, k), column, interval in zip(columns, values.T, bootstrap(values, seed=seed), strict=True):
                floor = measures.floor(
                    measure, totals, ranking.candidates[asked], k,
                    ideal=relevance.ideal[asked], mean_gain=relevance.mean_gain[asked], found=there,
                )  # fmt: skip
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


def measured(measure: str, gains: measures.Floats, relevance: Relevance, k: int) -> measures.Floats:
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


EXAMPLES = 6
_EXAMPLE_HITS = 10


def evaluate(
    searcher: Searcher,
    settings: Settings,
    *,
    queries: Callable[[Products], Sequence[Query]] | None = None,
    tell: Told = lambda line: None,
) -> tuple[Evaluation, pa.Table]:
    """Run both experiments on a release.

    Args:
        searcher: on the release, which it stays on.
        settings: what is asked.
        queries: makes the queries of the products, in the place of the recipe.
        tell: told lines of progress.

    Returns:
        What came out, and a row for each query.

    Raises:
        QueryError: there are no queries, or nothing says what is relevant to them.
    """
    searcher = searcher.held()
    answers = answer(searcher, settings, queries=queries, tell=tell)
    with timed(answers.seconds, "measures"):
        measured_figures = figures(answers, seed=settings.seed)
        compared = comparisons(answers, seed=settings.seed)
    with timed(answers.seconds, "diversity"):
        tell("diversity")
        images = read_images(Database(searcher.db), searcher.release.versions["products"], answers)
        orders = diversity(answers, images, seed=settings.seed)
    with timed(answers.seconds, "examples"):
        shown = examples(searcher, answers)
    evaluation = Evaluation(
        facts=_facts(searcher, settings, answers),
        notes=_notes(settings, answers),
        figures=measured_figures,
        comparisons=compared,
        categories=categories(answers),
        diversity=orders,
        examples=shown,
        is_fashion200k=is_fashion200k(answers.products),
        seconds=answers.seconds,
    )
    return evaluation, per_query(answers)


def is_fashion200k(products: Products) -> bool:
    """Whether the categories are those of Fashion200k, so that the published figures compare."""
    broad, fine = products.levels["broad"].names, products.levels["fine"].names
    return broad == tuple(sorted(BROAD.values())) and "dresses/casual_and_day_dresses" in fine


def examples(searcher: Searcher, answers: Answers) -> list[Example]:
    """Queries from the worst to the best by average, with their hits in each mode and diversified."""
    level = "judged" if "judged" in answers.relevance else list(answers.relevance)[-1]
    relevance = answers.relevance[level]
    values = measures.precision(answers.gains(level, "avg"), CUTOFFS[0])
    order = sorted(np.flatnonzero(relevance.asked).tolist(), key=lambda number: (values[number], number))
    chosen = np.unique(np.linspace(0, len(order) - 1, min(EXAMPLES, len(order))).round().astype(int))
    return [_example(searcher, answers, relevance, order[place]) for place in chosen.tolist()]


def _example(searcher: Searcher, answers: Answers, relevance: Relevance, number: int) -> Example:
    query = answers.queries[number]
    own = int(answers.left_out[number])
    where = None if own < 0 else {"product_id": {"ne": answers.products.ids[own].as_py()}}
    rows = []
    for label, mode, diversify in (
        ("query to description", "text", None), ("query to image", "image", None), ("query to average", "avg", None),
        ("query to description, different pictures first", "text", Diversify()),
    ):  # fmt: skip
        hits = searcher.search(
            answers.vectors[number], mode=mode, k=_EXAMPLE_HITS, exact=True, where=where, diversify=diversify
        )
        rows.append((label, hits))
    shown = answers.products.places(list(dict.fromkeys(hit.product_id for _, hits in rows for hit in hits)))
    gains = relevance.gains_of(np.broadcast_to(shown, (len(answers.queries), len(shown))))[number]
    relevant = frozenset(answers.products.ids[place].as_py() for place in shown[gains > 0].tolist())
    return Example(query.text, query.asked, rows, relevant)


def _facts(searcher: Searcher, settings: Settings, answers: Answers) -> dict[str, str]:
    release, queries = searcher.release, answers.queries
    is_drawn = queries[0].recipe != "file"
    fine = {
        "category": "the catalog's fine_category",
        "type": "the type that a product's title or description names",
    }
    return {
        "release": f"{release.release}, of {release.created_at:%Y-%m-%d}",
        "model": f"{release.model} ({release.model_id[:12]})",
        "average": f"{release.average_text_weight:g} text, {1 - release.average_text_weight:g} image",
        "products": f"{len(answers.products):,}"
        + "".join(f", {int(ranking.candidates.max()):,} with {mode}" for mode, ranking in answers.rankings.items()),
        "queries": f"{len(queries):,}" + (f", seed {settings.seed}" if is_drawn else ", from a file"),
        "recipe": f"{settings.recipe}: {RECIPES[settings.recipe]}" if is_drawn else "the file's own",
        "fine is": f"{fine[settings.fine]}, {len(answers.products.levels['fine'].names)} of them",
        "search": "exact" + (", and through the index" if settings.through_index else ""),
    }


def _notes(settings: Settings, answers: Answers) -> list[str]:
    """What a reader has to know beside the numbers."""
    queries, notes = answers.queries, []
    own = sum(query.is_own_text_only for query in queries)
    drawn = sum(query.source is not None for query in queries)
    if drawn:
        kept = "may be among its hits" if settings.keeps_source else "is left out of its hits"
        notes.append(
            f"{drawn:,} queries were drawn from a product, which {kept}; of {own:,} no other product's text holds all "
            "the words."
        )
    if settings.recipe not in ("broad", "fine") and queries[0].recipe != "file" and len(queries) < settings.queries:
        notes.append(f"The catalog gave {len(queries):,} different queries; {settings.queries:,} were asked for.")
    for level in ("broad", "fine"):
        if level not in answers.relevance:
            notes.append(f"No query asks for a {level} category, so {level} was not measured.")
        elif lacking := int((answers.products.levels[level].codes < 0).sum()):
            notes.append(f"{lacking:,} products have no {level} category: they are never relevant.")
    for level, relevance in answers.relevance.items():
        if left := int((~relevance.asked).sum()):
            notes.append(f"{left:,} queries have nothing relevant at the level {level}, and are not counted there.")
    return notes
