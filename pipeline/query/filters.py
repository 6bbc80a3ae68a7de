"""Typed filters: a mapping of columns and conditions, checked against the schema, then built as a LanceDB expression.

    {"broad_category": "dress", "price": {"ge": 20, "lt": 100}}             both must hold
    {"or": [{"brand": {"in": ["A", "B"]}}, {"not": {"title": {"contains": "silk"}}}]}
    {"price": {"between": [20, 100]}, "season": {"is_null": False}}         both ends included

No string is ever formatted into a query. As in SQL, a comparison with a null is neither true nor false, also under
`not` and `ne`: say `is_null` where products without a value are meant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from pipeline.errors import QueryError

Where = Mapping[str, object]
Node = tuple[Any, ...]
"""A checked filter, hashable: ("and" | "or", node, ...), ("not", node) or (operator, column, value)."""

OPERATORS = ("eq", "ne", "lt", "le", "gt", "ge", "in", "contains", "between", "is_null")
MAX_CONDITIONS = 500
MAX_DEPTH = 16
MAX_VALUES = 10_000
_LARGEST = float(np.finfo("f8").max)


def parse_where(where: Where, schema: pa.Schema) -> Node | None:
    """Check a filter against the columns and their types.

    Returns:
        The filter with each value converted to its column's type, or None where there is no condition.

    Raises:
        QueryError: an unknown column or operator, or a value that the column cannot hold.
    """
    if not isinstance(where, Mapping):
        raise QueryError(f"`where` is a mapping of columns to conditions, not {_kind(where)}.")
    node = _group(where, schema, depth=0) if where else None
    if node is not None and _count(node) > MAX_CONDITIONS:
        raise QueryError(f"A filter has at most {MAX_CONDITIONS} conditions; use `in` for long lists of values.")
    return node


def expression(node: Node) -> Any:
    """The `lancedb.expr.Expr` of a checked filter."""
    from lancedb import expr

    operator, *rest = node
    if operator in ("and", "or"):
        return _balanced(operator, [expression(child) for child in rest])
    if operator == "not":
        return ~expression(rest[0])
    column, value = expr.col(rest[0]), rest[1]
    if operator == "is_null":
        # LanceDB's expressions have no IS NULL; concat skips nulls, and a column equals itself unless it is null.
        empty = expr.func("concat", (column == column).cast("string"), expr.lit("")) == expr.lit("")
        return empty if value else ~empty
    if operator == "in":
        return column.isin([expr.lit(one) for one in value])
    if operator == "contains":
        return column.contains(expr.lit(value))
    literal = expr.lit(value)
    comparisons = {"eq": "eq", "ne": "ne", "lt": "lt", "le": "lte", "gt": "gt", "ge": "gte"}
    return getattr(column, comparisons[operator])(literal)


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
                raise QueryError(f"`not` takes one mapping of columns to conditions, not {_kind(condition)}.")
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
        raise QueryError(f"No column {name!r} to filter by; there are {', '.join(known)}.")
    type_ = schema.field(name).type
    if not isinstance(condition, Mapping):
        return [("eq", name, _value(name, type_, condition))]
    if not condition:
        raise QueryError(f"The condition on {name!r} is empty; operators are {', '.join(OPERATORS)}.")
    nodes: list[Node] = []
    for operator, value in condition.items():
        nodes.extend(_condition(name, type_, operator, value))
    return nodes


def _condition(name: str, type_: pa.DataType, operator: object, value: object) -> list[Node]:
    if operator not in OPERATORS:
        raise QueryError(f"No operator {operator!r} (on {name!r}); there are {', '.join(OPERATORS)}.")
    if operator == "is_null":
        if not isinstance(value, bool):
            raise QueryError(f"`is_null` on {name!r} takes True or False, not {value!r}.")
        return [("is_null", name, value)]
    if operator in ("in", "between"):
        values = [_value(name, type_, one) for one in _values(name, operator, value)]
        if operator == "in":
            return [("in", name, tuple(values))]
        if len(values) != 2:
            raise QueryError(f"`between` on {name!r} takes two values, got {len(values)}.")
        return [("ge", name, values[0]), ("le", name, values[1])]
    if operator == "contains" and not _is_text(type_):
        raise QueryError(f"`contains` needs a text column, and {name!r} is {type_}.")
    if operator in ("lt", "le", "gt", "ge") and pt.is_boolean(type_):
        raise QueryError(f"`{operator}` has no meaning on {name!r}, which is true or false.")
    return [(operator, name, _value(name, type_, value))]


def _values(name: str, operator: object, value: object) -> list[object]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise QueryError(f"`{operator}` on {name!r} takes a list of values, not {_kind(value)}.")
    values = list(value)
    if len(values) > MAX_VALUES:
        raise QueryError(f"`{operator}` on {name!r} takes at most {MAX_VALUES} values, got {len(values)}.")
    return values


def _value(name: str, type_: pa.DataType, value: object) -> object:
    """Convert a value to what its column compares with, or refuse it."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None:
        raise QueryError(f"Null does not compare with {name!r}; use {{{name!r}: {{'is_null': True}}}}.")
    converted = _convert(type_, value)
    if converted is None:
        wanted = _WANTED.get(family_of(type_))
        if wanted is None:
            raise QueryError(f"{name!r} is {type_}: only `is_null` can filter by it.")
        raise QueryError(f"{name!r} is compared with {wanted}, not {value!r}.")
    return converted


_WANTED = {
    "text": "a text",
    "bool": "True or False",
    "integer": "a finite number",
    "float": "a finite number",
    "decimal": "a finite number",
    "date": "a date or an ISO date",
    "timestamp": "a datetime or an ISO datetime",
}


def _is_text(type_: pa.DataType) -> bool:
    value_type = type_.value_type if pt.is_dictionary(type_) else type_
    return bool(pt.is_string(value_type) or pt.is_large_string(value_type))


def family_of(type_: pa.DataType) -> str:
    """What a column compares with: text, bool, integer, float, decimal, date, timestamp; empty: with nothing."""
    tests = {
        "text": _is_text,
        "bool": pt.is_boolean,
        "integer": pt.is_integer,
        "float": pt.is_floating,
        "decimal": pt.is_decimal,
        "date": pt.is_date,
        "timestamp": pt.is_timestamp,
    }
    return next((name for name, test in tests.items() if test(type_)), "")


def _convert(type_: pa.DataType, value: object) -> object:
    family = family_of(type_)
    if family == "text":
        return value if isinstance(value, str) and _encodable(value) else None
    if family == "bool":
        return value if isinstance(value, bool) else None
    if family in ("integer", "float", "decimal"):
        return _number(type_, family, value)
    if family in ("date", "timestamp"):
        return _moment(type_, family, value)
    return None


def _encodable(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _number(type_: pa.DataType, family: str, value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    if abs(value) > _LARGEST if isinstance(value, int) else not math.isfinite(value):
        return None
    if family == "decimal":
        try:
            return Decimal(str(value)).quantize(Decimal(1).scaleb(-max(type_.scale, 6))).normalize() + 0
        except InvalidOperation:
            return None
    if family == "integer":
        if value == int(value):
            return int(value) if -(2**63) <= value < 2**63 else float(value)
        return float(value)
    number = float(value)
    # The nearest value that the column can hold: 19.99 finds the float32 that was stored for 19.99.
    narrow = np.float32(number) if pt.is_float32(type_) and abs(number) < float(np.finfo("f4").max) else number
    return float(narrow) + 0.0


def _moment(type_: pa.DataType, family: str, value: object) -> object:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        return None
    if family == "date":
        return value.date() if value == datetime(value.year, value.month, value.day) else None
    if type_.tz is None:
        return value.astimezone(UTC).replace(tzinfo=None) if value.tzinfo else value
    return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


def _count(node: Node) -> int:
    return sum(_count(child) for child in node[1:]) if node[0] in ("and", "or", "not") else 1


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
