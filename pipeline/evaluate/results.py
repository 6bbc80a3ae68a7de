"""What an evaluation says: figures, comparisons, categories, diversity and examples, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.records import Hit

LEVELS = ("broad", "fine", "judged")
"""What a hit is relevant by: its broad category, its fine one, or a person's judgement of it."""

CUTOFFS = (10, 20, 50, 100)
"""The k of the published table."""

MEASURES = ("precision", "recall", "ndcg", "mrr")


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over queries, with the bounds of its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One measure of one mode.

    Attributes:
        level: one of `LEVELS`.
        mode: `text`, `image` or `avg`.
        measure: one of `MEASURES`, each from 0 to 1.
        k: how many hits it looks at; 100 for `mrr`.
        micro: the mean over queries, each of which counts the same.
        macro: the mean over the categories that are asked for of the means of their queries.
        ceiling: the mean of what an oracle would reach, which ranks every relevant product first.
        floor: the mean of what a random order is expected to reach.
        index: `micro` through the release's vector index in place of exact search; None where that was not asked.
    """

    level: str
    mode: str
    measure: str
    k: int
    micro: Interval
    macro: float
    ceiling: float
    floor: float
    index: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two modes on the same queries: a paired test of their precision@k.

    Attributes:
        difference: first less second, the mean over queries.
        p: two-sided, of the paired test.
        p_holm: corrected for all comparisons of the evaluation.
    """

    level: str
    k: int
    first: str
    second: str
    difference: Interval
    p: float
    p_holm: float


@dataclass(frozen=True, slots=True)
class CategoryFigure:
    """One category's queries.

    Attributes:
        queries: how many ask for it.
        products: how many products it has.
        precision: mean precision@10 by mode.
    """

    level: str
    category: str
    queries: int
    products: int
    precision: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class DiversityFigure:
    """One way of ordering the candidates, means over queries.

    Attributes:
        method: `text`, `avg`, `kmeans-3`, `kmeans-5`, `kmeans-8` or `mmr`; the last four reorder the best
            `candidates` of `text`.
        distance: mean cosine distance, 0 to 2, between the images of two of the first 10.
        near_duplicates_5: hits of the first 5 whose image is within 0.02 of a better one's.
        near_duplicates_10: of the first 10.
        fine_categories: how many the first 10 cover; None where the catalog has none.
        colours: how many colour words the texts of the first 10 name.
        precision: precision@10 by level.
        kept: by level, precision@10 as a share of the precision of all `candidates` of `text`: what a reordering
            leaves of it.
        milliseconds: median time that the reordering takes a query; None for the orders as they come.
    """

    method: str
    distance: Interval
    near_duplicates_5: Interval
    near_duplicates_10: Interval
    fine_categories: Interval | None
    colours: Interval
    precision: Mapping[str, Interval]
    kept: Mapping[str, Interval]
    milliseconds: float | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One query and what came back.

    Attributes:
        text: the query.
        asked: what it asks for, such as `dresses › midi dress`.
        rows: label and hits of each result list, best first.
        relevant: product_ids of shown hits that are relevant at the finest level.
    """

    text: str
    asked: str
    rows: Sequence[tuple[str, Sequence[Hit]]]
    relevant: frozenset[str]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All of it.

    Attributes:
        facts: what was evaluated, as text by name and in the order to be shown: database, release, model, products,
            queries, recipe, seed, definition of fine, how many queries only their own product's text matches ...
        notes: sentences that a reader has to know, such as which level could not be measured and why.
        figures: every level, mode, measure and k.
        comparisons: of modes.
        categories: worst first, by the worst mode's precision.
        diversity: of the orders.
        examples: to look at.
        is_fashion200k: whether the categories are those of Fashion200k, so that the published figures compare.
    """

    facts: Mapping[str, str]
    notes: Sequence[str]
    figures: Sequence[Figure]
    comparisons: Sequence[Comparison]
    categories: Sequence[CategoryFigure]
    diversity: Sequence[DiversityFigure]
    examples: Sequence[Example]
    is_fashion200k: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def levels(self) -> tuple[str, ...]:
        """Those that were measured."""
        measured = {figure.level for figure in self.figures}
        return tuple(level for level in LEVELS if level in measured)

    @property
    def modes(self) -> tuple[str, ...]:
        """In the order of the figures."""
        return tuple(dict.fromkeys(figure.mode for figure in self.figures))

    def figure(self, level: str, mode: str, measure: str, k: int) -> Figure:
        """One of them.

        Raises:
            KeyError: it was not measured.
        """
        for figure in self.figures:
            if (figure.level, figure.mode, figure.measure, figure.k) == (level, mode, measure, k):
                return figure
        raise KeyError((level, mode, measure, k))


PUBLISHED: Mapping[tuple[str, str, int], float] = {
    ("broad", "text", 10): 0.9026, ("broad", "image", 10): 0.7614, ("broad", "avg", 10): 0.9230,
    ("broad", "text", 20): 0.9150, ("broad", "image", 20): 0.7523, ("broad", "avg", 20): 0.9229,
    ("broad", "text", 50): 0.9134, ("broad", "image", 50): 0.7418, ("broad", "avg", 50): 0.9226,
    ("broad", "text", 100): 0.9092, ("broad", "image", 100): 0.7258, ("broad", "avg", 100): 0.9150,
    ("fine", "text", 10): 0.2314, ("fine", "image", 10): 0.2037, ("fine", "avg", 10): 0.2711,
    ("fine", "text", 20): 0.2316, ("fine", "image", 20): 0.1964, ("fine", "avg", 20): 0.2631,
    ("fine", "text", 50): 0.2254, ("fine", "image", 50): 0.1750, ("fine", "avg", 50): 0.2390,
    ("fine", "text", 100): 0.2139, ("fine", "image", 100): 0.1675, ("fine", "avg", 100): 0.2286,
}  # fmt: skip
"""Precision@k that the article reports for jina-clip-v1 on Fashion200k, by (level, mode, k): 1,000 random queries."""
