"""Typed filters: a mapping of columns and conditions, checked against the schema, then built as a LanceDB expression.

    {"broad_category": "dress", "price": {"ge": 20, "lt": 100}}             both must hold
    {"or": [{"brand": {"in": ["A", "B"]}}, {"not": {"title": {"contains": "silk"}}}]}
    {"price": {"between": [20, 100]}, "season": {"is_null": False}}         both ends included
    {"tags": {"contains": "silk"}}                                          a list column holds this very value

No text of a caller is ever formatted into a query as it is. As in SQL, a comparison with a null is neither true nor
false, also under `not` and `ne`: say `is_null` where products without a value are meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from pipeline.errors import QueryError
from pipeline.query.filter_sql import LEAST_UNSIGNED, needs_sql, sql
from pipeline.query.filter_values import (
    converted_value,
    holds_values,
    is_text,
    kind,
    list_element,
    shown,
)
from pipeline.shown import visible

Where = Mapping[str, object]
Node = tuple[Any, ...]
"""A checked filter, hashable: ("and" | "or", node, ...), ("not", node), (operator, column, value), or for a list
("has", column, value, type of its values)."""

OPERATORS = ("eq", "ne", "lt", "le", "gt", "ge", "in", "contains", "between", "is_null")
MAX_CONDITIONS = 500
MAX_DEPTH = 16
MAX_VALUES = 10_000


def parse_where(where: Where, schema: pa.Schema) -> Node | None:
    """Check a filter against the columns and their types.

    Returns:
        The filter with each value converted to its column's type, or None where there is no condition.

    Raises:
        QueryError: an unknown column or operator, or a value that the column cannot hold.
    """
    if not isinstance(where, Mapping):
        raise QueryError(f"`where` is a mapping of columns to conditions, not {kind(where)}.")
    node = _group(where, schema, depth=0) if where else None
    if node is not None and _count(node) > MAX_CONDITIONS:
        raise QueryError(f"A filter has at most {MAX_CONDITIONS} conditions; use `in` for long lists of values.")
    return node


def expression(node: Node) -> Any:
    """What LanceDB's `where` takes for a checked filter: an `Expr`, or where a list is looked into, SQL."""
    return sql(node) if needs_sql(node) else _expression(node)


def _expression(node: Node) -> Any:
    from lancedb import expr

    operator, *rest = node
    if operator in ("and", "or"):
        return _balanced(operator, [_expression(child) for child in rest])
    if operator == "not":
        return ~_expression(rest[0])
    column, value = expr.col(rest[0]), rest[1]
    if operator == "is_null":
        # LanceDB's expressions have no IS NULL; concat skips nulls, and a column equals itself unless it is null.
        empty = expr.func("concat", (column == column).cast("string"), expr.lit("")) == expr.lit("")
        return empty if value else ~empty
    if operator == "in":
        return column.isin([_literal(one) for one in value])
    if operator == "contains":
        return column.contains(expr.lit(value))
    comparisons = {"eq": "eq", "ne": "ne", "lt": "lt", "le": "lte", "gt": "gt", "ge": "gte"}
    return getattr(column, comparisons[operator])(_literal(value))


def _literal(value: object) -> Any:
    from lancedb import expr

    if isinstance(value, int) and value >= LEAST_UNSIGNED:
        return expr.lit(str(value)).cast(pa.uint64())  # a literal is a signed number of 64 bits
    literal = expr.lit(value)
    if isinstance(value, datetime) and value.tzinfo is not None:
        return literal.cast(pa.timestamp("us", "UTC"))  # else it is taken for local time of the column's zone
    return literal


def filterable(schema: pa.Schema) -> list[str]:
    """The columns that a filter may name: all but the vectors."""
    return [field.name for field in schema if not pt.is_fixed_size_list(field.type)]


def _balanced(operator: str, parts: list[Any]) -> Any:
    """Join expressions pairwise, so that many conditions make a shallow tree."""
    while len(parts) > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [
            pair[0] if len(pair) == 1 else pair[0] & pair[1] if operator == "and" else pair[0] | pair[1]
            for pair in pairs
        ]
    return parts[0]


def _group(where: Where, schema: pa.Schema, depth: int) -> Node:
    if depth > MAX_DEPTH:
        raise QueryError(f"A filter may be nested {MAX_DEPTH} levels deep.")
    nodes: list[Node] = []
    for name, condition in where.items():
        if name in ("and", "or"):
            members = _members(name, condition, schema, depth)
            nodes.append(members[0] if len(members) == 1 else (name, *members))
        elif name == "not":
            if not isinstance(condition, Mapping) or not condition:
                raise QueryError(f"`not` takes one mapping of columns to conditions, not {kind(condition)}.")
            nodes.append(("not", _group(condition, schema, depth + 1)))
        else:
            nodes.extend(_column(name, condition, schema))
    return nodes[0] if len(nodes) == 1 else ("and", *nodes)


def _members(name: str, condition: object, schema: pa.Schema, depth: int) -> list[Node]:
    groups = list(condition) if isinstance(condition, Sequence) and not isinstance(condition, str | bytes) else []
    if not groups or not all(isinstance(group, Mapping) and group for group in groups):
        raise QueryError(f"`{name}` takes a list of mappings with at least one condition each.")
    return [_group(group, schema, depth + 1) for group in groups]


def _column(name: object, condition: object, schema: pa.Schema) -> list[Node]:
    known = filterable(schema)
    if not isinstance(name, str) or name not in known:
        raise QueryError(f"No column {shown(name)} to filter by; there are {visible(', '.join(known))}.")
    if "`" in name:
        raise QueryError(
            f"LanceDB cannot filter by {shown(name)}, whose name holds a backtick: carry it under another one."
        )
    type_ = schema.field(name).type
    if not isinstance(condition, Mapping):
        return [("eq", name, converted_value(name, type_, condition))]
    if not condition:
        raise QueryError(f"The condition on {shown(name)} is empty; operators are {', '.join(OPERATORS)}.")
    nodes: list[Node] = []
    for operator, value in condition.items():
        nodes.extend(_condition(name, type_, operator, value))
    return nodes


def _condition(name: str, type_: pa.DataType, operator: object, value: object) -> list[Node]:
    if operator not in OPERATORS:
        raise QueryError(f"No operator {shown(operator)} (on {shown(name)}); there are {', '.join(OPERATORS)}.")
    if operator == "is_null":
        if not isinstance(value, bool):
            raise QueryError(f"`is_null` on {shown(name)} takes True or False, not {shown(value)}.")
        return [("is_null", name, value)]
    if operator in ("in", "between"):
        values = [converted_value(name, type_, one) for one in _values(name, operator, value)]
        if operator == "in":
            return [("in", name, tuple(values))]
        if len(values) != 2:
            raise QueryError(f"`between` on {shown(name)} takes two values, got {len(values)}.")
        return [("ge", name, values[0]), ("le", name, values[1])]
    if operator == "contains" and holds_values(type_):
        return [("has", name, list_element(name, type_.value_type, value), type_.value_type)]
    if operator == "contains" and not is_text(type_):
        raise QueryError(f"`contains` needs a column of texts or lists, and {shown(name)} is {type_}.")
    if operator in ("lt", "le", "gt", "ge") and pt.is_boolean(type_):
        raise QueryError(f"`{operator}` has no meaning on {shown(name)}, which is true or false.")
    return [(operator, name, converted_value(name, type_, value))]


def _values(name: str, operator: object, value: object) -> list[object]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise QueryError(f"`{operator}` on {shown(name)} takes a list of values, not {kind(value)}.")
    values = list(islice(value, MAX_VALUES + 1))
    if len(values) > MAX_VALUES:
        raise QueryError(f"`{operator}` on {shown(name)} takes at most {MAX_VALUES} values.")
    return values


def _count(node: Node) -> int:
    return sum(_count(child) for child in node[1:]) if node[0] in ("and", "or", "not") else 1
