"""What a caller asks of a search, checked before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import pyarrow as pa

from pipeline.errors import QueryError
from pipeline.query.filter_values import shown
from pipeline.query.filters import Node, Where, parse_where
from pipeline.query.rerank import Diversify, is_distance
from pipeline.shown import visible

VECTOR_MODES = ("text", "image", "avg")
"""A mode searches the column `<mode>_vector`: query to description, to pictures, to their average."""

MODES = (*VECTOR_MODES, "hybrid")
"""`hybrid` fuses `avg` with a full-text search of title and description by reciprocal rank."""

HYBRID_WINDOW = 200
"""How deep both lists of a hybrid search are read, whatever the page: so pages agree with each other."""

MAX_WINDOW = 10_000
"""The most hits that offset + k may reach."""

_HIDDEN = {"product_id", "text_sha256", "images_sha256", "partition"}


@dataclass(frozen=True, slots=True)
class Request:
    """A checked query, all but its vector."""

    mode: str
    k: int
    offset: int
    columns: tuple[str, ...]
    where: Node | None
    exact: bool
    diversify: Diversify | None
    collapse: float | None = None

    @property
    def vector_mode(self) -> str:
        """The mode whose vectors are compared."""
        return "avg" if self.mode == "hybrid" else self.mode

    @property
    def window(self) -> int:
        """How many candidates there can be at most."""
        return HYBRID_WINDOW if self.mode == "hybrid" else MAX_WINDOW


def check(
    schema: pa.Schema,
    mode: str,
    k: int,
    offset: int,
    columns: Sequence[str] | None,
    where: Where | None,
    exact: bool,
    diversify: Diversify | None,
    collapse_duplicates: float | None = None,
) -> Request:
    """Check the options of a search against the columns of `products`.

    Raises:
        QueryError: an option has no defined answer; the sentence says what would.
    """
    if mode not in MODES:
        raise QueryError(f"No mode {shown(mode)}; there are {', '.join(MODES)}.")
    places: tuple[tuple[str, Any, int], ...] = (("k", k, 1), ("offset", offset, 0))
    for name, value, low in places:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
            raise QueryError(f"{name} is a whole number from {low}, not {shown(value)}.")
    window = HYBRID_WINDOW if mode == "hybrid" else MAX_WINDOW
    if offset + k > window:
        raise QueryError(f"offset + k is {shown(offset + k)}; {mode} results reach to {window}.")
    if diversify is not None and not isinstance(diversify, Diversify):
        raise QueryError(f"`diversify` takes a Diversify, not a {type(diversify).__name__}.")
    collapse = collapse_duplicates
    if collapse is not None and not is_distance(collapse):
        raise QueryError(f"collapse_duplicates is a cosine distance from 0 to 2, not {shown(collapse)}.")
    condition = None if where is None else parse_where(where, schema)
    return Request(mode, int(k), int(offset), _columns(schema, columns), condition, bool(exact), diversify, collapse)


def _columns(schema: pa.Schema, columns: Sequence[str] | None) -> tuple[str, ...]:
    if columns is None:
        return tuple(
            column.name
            for column in schema
            if column.name not in _HIDDEN and not pa.types.is_fixed_size_list(column.type)
        )
    if isinstance(columns, str) or not isinstance(columns, Iterable):
        raise QueryError("`columns` takes a list of column names.")
    chosen = list(columns)
    for name in chosen:
        if not isinstance(name, str) or name not in schema.names:
            raise QueryError(f"No column {shown(name)}; there are {visible(', '.join(schema.names))}.")
    return tuple(dict.fromkeys(chosen))
