"""Products of an opened release by their keys, and what their columns hold: kinds, commonest values, ranges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.query.filter_values import family_of
from pipeline.query.nearest import Pinned, rows_of

COMMONEST = 200
"""So many values of a text column are named, the commonest ones."""

_MOST_VALUES = 5_000  # a column of more different texts is no category
_NO_FILTERS = {"text_sha256", "images_sha256", "partition"}
_FREE_TEXT = {"product_id", "title", "description"}
_RANGED = {"integer", "float", "decimal", "date", "timestamp"}


@dataclass(frozen=True, slots=True)
class Facet:
    """A column that a person may filter by.

    Attributes:
        kind: `text`, `bool`, `integer`, `float`, `decimal`, `date` or `timestamp`.
        values: of a text column with few different ones: the commonest, with how many products have each.
        distinct: how many different values there are; None where they were not counted.
        low: the least value of a column that has an order; None where it holds nothing.
        high: the greatest.
    """

    name: str
    kind: str
    values: tuple[tuple[str, int], ...] = ()
    distinct: int | None = None
    low: object = None
    high: object = None


def read_products(pinned: Pinned, product_ids: Iterable[str], columns: Sequence[str]) -> dict[str, dict[str, object]]:
    """Columns of products, by product_id."""
    asked = list(dict.fromkeys(["product_id", *columns]))
    return {
        row["product_id"]: {name: row[name] for name in columns}
        for rows in rows_of(pinned.products, product_ids, asked)
        for row in rows.to_pylist()
    }


def read_facets(pinned: Pinned) -> list[Facet]:
    """One pass over the columns that have values to offer; a text column stops being counted once it has too many."""
    kinds = {column.name: family_of(column.type) for column in pinned.schema if column.name not in _NO_FILTERS}
    tallies = {name: _Tally(kind) for name, kind in kinds.items() if kind in _RANGED}
    tallies |= {name: _Tally(kind) for name, kind in kinds.items() if kind == "text" and name not in _FREE_TEXT}
    if tallies:
        for batch in pinned.products.search().select(list(tallies)).limit(None).to_batches():
            for name, tally in tallies.items():
                tally.add(batch.column(name))
    return [tallies[name].facet(name) if name in tallies else Facet(name, kind) for name, kind in kinds.items() if kind]


@dataclass(slots=True)
class _Tally:
    """What was seen of one column."""

    kind: str
    counts: Counter[str] | None = field(default_factory=Counter)
    low: Any = None
    high: Any = None

    def add(self, column: pa.Array) -> None:
        if self.kind == "text":
            self._count(column)
            return
        ends = pc.min_max(column).as_py()
        if ends["min"] is not None and ends["min"] == ends["min"]:  # not NaN
            self.low = ends["min"] if self.low is None else min(self.low, ends["min"])
            self.high = ends["max"] if self.high is None else max(self.high, ends["max"])

    def _count(self, column: pa.Array) -> None:
        if self.counts is None:
            return
        for pair in pc.value_counts(column.drop_null()).to_pylist():
            self.counts[pair["values"]] += pair["counts"]
        if len(self.counts) > _MOST_VALUES:
            self.counts = None

    def facet(self, name: str) -> Facet:
        if self.kind != "text":
            return Facet(name, self.kind, low=self.low, high=self.high)
        if self.counts is None:
            return Facet(name, self.kind)
        commonest = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:COMMONEST]
        return Facet(name, self.kind, tuple(commonest), len(self.counts))
