"""The gate before a release: both releases answer the same queries over the products that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import Config, GateConfig
from pipeline.errors import QueryError, ReleaseRefused
from pipeline.evaluate import measures
from pipeline.evaluate.answers import Relevance, relevance_of
from pipeline.evaluate.exact import Ranking, exact_search
from pipeline.evaluate.frozen import encoder_of, frozen_queries
from pipeline.evaluate.products import Products, read_blocks, read_products
from pipeline.evaluate.results import Interval
from pipeline.evaluate.statistics import holm, non_inferiority
from pipeline.query.request import VECTOR_MODES
from pipeline.store.releases import Release
from pipeline.store.tables import Database

Vectors = npt.NDArray[np.float32]

K = 10
"""The gate looks at the first page."""

SIGNIFICANCE = 0.05

_NAMED = 3


@dataclass(frozen=True, slots=True)
class CategoryChange:
    """Precision@10 of one category's queries in both releases."""

    category: str
    queries: int
    base: float
    new: float


@dataclass(frozen=True, slots=True)
class GateLine:
    """One mode at one level.

    Attributes:
        base: mean precision@10 of the base release.
        new: of the new one.
        difference: new less base.
        p_holm: of being worse by the margin or more, corrected for all lines.
        is_passed: whether it is shown not to be.
        worst: the categories that lost the most, those that lost nothing left out.
    """

    mode: str
    level: str
    base: float
    new: float
    difference: Interval
    p_holm: float
    is_passed: bool
    worst: Sequence[CategoryChange]

    def sentence(self, margin: float) -> str:
        """What is wrong with it."""
        lost = f"{self.mode} mode, {self.level} precision@{K} {self.base:.4f} to {self.new:.4f}"
        if self.difference.mean > -margin:
            return f"{lost}, too few queries to tell that it lost less than {margin:g} (p = {self.p_holm:.3f})"
        worst = ", ".join(f"{c.category} {c.base:.2f} to {c.new:.2f}" for c in self.worst[:_NAMED])
        return f"{lost}, {self.difference.mean:+.4f}" + (f" (worst: {worst})" if worst else "")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate found.

    Attributes:
        base: number of the release that is compared with.
        queries: how many both answered.
        common: products that are in both, over which they are compared.
        added: products that only the new one has.
        gone: products that only the base has.
        added_hits: by mode the share of the new release's first hits that are new products: reported, not gated.
        lines: every mode and level.
    """

    base: int
    margin: float
    queries: int
    common: int
    added: int
    gone: int
    added_hits: Mapping[str, float]
    lines: Sequence[GateLine]

    @property
    def is_passed(self) -> bool:
        """Whether every line is."""
        return all(line.is_passed for line in self.lines)

    @property
    def sentence(self) -> str:
        """The verdict, in words."""
        if self.is_passed:
            return (
                f"search is not worse than in release {self.base}: {self.queries:,} queries over {self.common:,} "
                f"common products, precision@{K} within {self.margin:g} in every mode and level"
            )
        failing = sorted((line for line in self.lines if not line.is_passed), key=lambda line: line.difference.mean)
        failed = "; ".join(line.sentence(self.margin) for line in failing)
        return (
            f"search is worse than in release {self.base}, or cannot be shown not to be, by {self.queries:,} queries "
            f"over {self.common:,} common products; at most {self.margin:g} may be lost: {failed}"
        )

    def as_json(self) -> dict[str, Any]:
        """For a release's checks and `--json`."""
        return {**asdict(self), "is_passed": self.is_passed}


def gate(config: Config, base: Release, new: Release) -> Mapping[str, Any]:
    """Stand before a release: the base's frozen queries, answered by both.

    Args:
        config: of the run; `release.gate` says how strict.
        base: the release that readers have.
        new: what is to be released; its tables are committed, its row is not written.

    Returns:
        What was found, to be kept among the release's checks.

    Raises:
        ReleaseRefused: a mode is worse, or cannot be shown not to be; the sentence names mode, level and categories.
    """
    try:
        verdict = compare(Database(config.db), base, new, config.release.gate)
    except QueryError as error:
        raise ReleaseRefused(
            f"whether search got worse cannot be told: {error} Nothing was released, and what was staged is kept; "
            "release.gate=false releases without asking"
        ) from error
    if verdict.is_passed:
        return verdict.as_json()
    raise ReleaseRefused(
        f"{verdict.sentence}. Nothing was released, and what was staged is kept. To release it all the same, allow for "
        "more with release.gate.margin, or leave the gate open with release.gate=false"
    )


def compare(
    db: Database, base: Release, new: Release, settings: GateConfig, *, tell: Callable[[str], None] = lambda line: None
) -> Verdict:
    """Both releases answer the base's queries; a query's relevant products are those that the base says.

    Args:
        db: the database.
        base: its queries and categories count.
        new: released or not.
        settings: the margin, and which queries where none are frozen yet.
        tell: told lines of progress.

    Raises:
        QueryError: a model is not at hand, or the base has no categories.
    """
    frozen = frozen_queries(db, base, settings)
    tell(f"{len(frozen.queries):,} frozen queries of release {base.release}")
    vectors = frozen.vectors
    if new.model_id != frozen.model_id:
        vectors = np.stack(encoder_of(new, db).encode([query.text for query in frozen.queries]))
    old_products = read_products(db, base.versions["products"])
    new_products = read_products(db, new.versions["products"])
    common = old_products.subset(new_products.places(old_products.ids) >= 0)
    left_out = common.places([query.source or "" for query in frozen.queries])
    relevance = relevance_of(frozen.queries, common, left_out)

    def ranked(release: Release, units: Vectors) -> dict[str, Ranking]:
        tell(f"{len(common):,} common products in {'the base' if release is base else 'the new release'}")
        blocks = read_blocks(db, release.versions["products"], common, VECTOR_MODES)
        return exact_search(blocks, units, modes=VECTOR_MODES, k=K, left_out=left_out)

    before, after = ranked(base, frozen.vectors), ranked(new, vectors)
    return Verdict(
        base=base.release,
        margin=settings.margin,
        queries=len(frozen.queries),
        common=len(common),
        added=len(new_products) - len(common),
        gone=len(old_products) - len(common),
        added_hits=_added_hits(db, new, new_products, common, vectors),
        lines=_lines(before, after, relevance, settings.margin),
    )


def _lines(
    base: Mapping[str, Ranking], new: Mapping[str, Ranking], relevance: Mapping[str, Relevance], margin: float
) -> list[GateLine]:
    found = []
    for level, relevant in relevance.items():
        asked = relevant.asked
        for mode in VECTOR_MODES:
            before, after = (
                measures.precision(relevant.gains_of(ranking[mode].places)[asked], K) for ranking in (base, new)
            )
            worst = _worst(before, after, relevant)
            found.append((mode, level, before, after, worst, non_inferiority(after, before, margin=margin)))
    corrected = holm([test.p for *_, test in found])
    return [
        GateLine(
            mode,
            level,
            float(before.mean()),
            float(after.mean()),
            test.difference,
            p_holm,
            p_holm <= SIGNIFICANCE,
            worst,
        )
        for (mode, level, before, after, worst, test), p_holm in zip(found, corrected, strict=True)
    ]


def _worst(before: measures.Floats, after: measures.Floats, relevant: Relevance) -> list[CategoryChange]:
    """The categories that lost, the most first."""
    groups = relevant.groups[relevant.asked]
    changes = [
        CategoryChange(relevant.names[code], int(own.sum()), float(before[own].mean()), float(after[own].mean()))
        for code in np.unique(groups).tolist()
        for own in [groups == code]
    ]
    return sorted((c for c in changes if c.new < c.base), key=lambda c: (c.new - c.base, c.category))


def _added_hits(db: Database, new: Release, products: Products, common: Products, vectors: Vectors) -> dict[str, float]:
    """By mode how many of the first hits among all products of the new release are new ones."""
    is_new = common.places(products.ids) < 0
    if not is_new.any():
        return dict.fromkeys(VECTOR_MODES, 0.0)
    blocks = read_blocks(db, new.versions["products"], products, VECTOR_MODES)
    found = exact_search(blocks, vectors, modes=VECTOR_MODES, k=K)
    return {mode: float(is_new[r.places[r.places >= 0]].mean()) for mode, r in found.items()}
