"""A checked filter as SQL, for what LanceDB's expressions cannot say: that a list holds a value.

They know eight functions, and none for lists; and SQL and expressions do not mix, so the whole filter is written here.

The text is safe by its making, not by escaping: columns are names of the schema between backticks, which parsing has
refused in names; numbers, dates and moments are written out from checked values; and of the texts only letters, digits
and a few harmless marks are ever quoted. Any other text goes in as the hexadecimal digits of its UTF-8.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

LEAST_UNSIGNED = 2**63
"""From here on a whole number fits into uint64 alone."""

_PLAIN = re.compile(r"[A-Za-z0-9 _.,:+-]*", re.ASCII)
_COMPARISONS = {"eq": "=", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NAMES = {
    pa.date32(): "Date32", pa.date64(): "Date64", pa.string(): "Utf8", pa.large_string(): "LargeUtf8",
    pa.bool_(): "Boolean", pa.float16(): "Float16", pa.float32(): "Float32", pa.float64(): "Float64",
}  # fmt: skip
_UNITS = {"s": "Second", "ms": "Millisecond", "us": "Microsecond", "ns": "Nanosecond"}


def needs_sql(node: tuple[Any, ...]) -> bool:
    """Whether a condition on a list is anywhere in a filter."""
    return node[0] == "has" or (node[0] in ("and", "or", "not") and any(needs_sql(child) for child in node[1:]))


def sql(node: tuple[Any, ...], *, is_negated: bool = False) -> str:
    """A checked filter as SQL.

    `not` is moved down to the single conditions, as De Morgan has it, which holds with nulls too; chains stay flat.
    Both keep it shallow: LanceDB's parser takes exponentially long, and then fails, where brackets nest too deep.

    Args:
        node: of `parse_where`.
        is_negated: write down its opposite.
    """
    operator, *rest = node
    if operator == "not":
        return sql(rest[0], is_negated=not is_negated)
    if operator in ("and", "or"):
        joined = operator if not is_negated else "or" if operator == "and" else "and"
        parts = (sql(child, is_negated=is_negated) for child in rest)
        return "(" + f" {joined} ".join(parts) + ")"
    condition = _condition(operator, rest)
    return f"not {condition}" if is_negated else condition


def arrow_name(type_: pa.DataType) -> str:
    """A type as `arrow_cast` calls it; empty for one that no condition on a list is built for."""
    if pt.is_integer(type_):
        return f"{'UInt' if pt.is_unsigned_integer(type_) else 'Int'}{type_.bit_width}"
    if pt.is_decimal(type_):
        return f"Decimal{type_.bit_width}({type_.precision}, {type_.scale})"
    if pt.is_timestamp(type_):
        return f"Timestamp({_UNITS[type_.unit]}, {_zone(type_.tz)})"
    return _NAMES.get(type_, "")


def _condition(operator: str, rest: list[Any]) -> str:
    column = f"`{rest[0]}`"
    if operator == "has":
        return f"array_has({column}, arrow_cast({_literal(rest[1])}, '{arrow_name(rest[2])}'))"
    value = rest[1]
    if operator == "is_null":
        return f"{column} is {'' if value else 'not '}null"
    if operator == "in":
        return f"{column} in ({', '.join(_literal(one) for one in value)})" if value else "false"
    if operator == "contains":
        return f"contains({column}, {_literal(value)})"
    return f"{column} {_COMPARISONS[operator]} {_literal(value)}"


def _zone(zone: object) -> str:
    """Moments of whatever zone are compared as UTC; those without one stay without."""
    return "None" if zone is None else 'Some("UTC")'


def _literal(value: object) -> str:
    """A value of one of the types that `parse_where` gives.

    Numbers are casts and not bare literals, which LanceDB takes only where they are of the column's own type.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"arrow_cast('{value}', '{'Int64' if value < LEAST_UNSIGNED else 'UInt64'}')"
    if isinstance(value, float):
        return f"arrow_cast('{value!r}', 'Float64')"
    if isinstance(value, Decimal):
        digits, scale = len(value.as_tuple().digits), max(0, -int(value.as_tuple().exponent))
        whole = max(1, digits + int(value.as_tuple().exponent))
        return f"arrow_cast('{value:f}', 'Decimal128({min(38, max(digits, whole + scale))}, {scale})')"
    if isinstance(value, datetime):
        micros = (value.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)
        return f"arrow_cast({micros}, 'Timestamp(Microsecond, {_zone(value.tzinfo)})')"
    if isinstance(value, date):
        return f"arrow_cast('{value.isoformat()}', 'Date32')"
    text = str(value)
    return f"'{text}'" if _PLAIN.fullmatch(text) else f"cast(X'{text.encode().hex()}' as string)"
