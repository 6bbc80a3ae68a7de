"""Values of a filter, as what their columns compare with; or refused in a sentence."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from pipeline.errors import QueryError
from pipeline.query.filter_sql import LEAST_UNSIGNED, arrow_name
from pipeline.shown import visible

MAX_CHARACTERS = 20_000
_SHOWN = 80
_NANOSECONDS = (datetime(1677, 9, 22), datetime(2262, 4, 11))  # all that a column in nanoseconds can hold


def shown(value: object) -> str:
    """A value of a caller as a sentence may quote it: on one line, and short."""
    value = value[: _SHOWN + 1] if isinstance(value, str | bytes) else value
    try:
        text = visible(repr(value))
    except Exception:  # an int of 5,000 digits has no repr, nor has many an object of somebody's own
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def kind(value: object) -> str:
    """What sort of thing a caller gave."""
    return "nothing" if value is None else f"a {type(value).__name__}"


def converted_value(name: str, type_: pa.DataType, value: object) -> object:
    """Convert a value to what its column compares with, or refuse it."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None:
        raise QueryError(f"Null does not compare with {name!r}; use {{{name!r}: {{'is_null': True}}}}.")
    converted = _convert(type_, value)
    if converted is None:
        wanted = _WANTED.get(family_of(type_))
        if wanted is None:
            some = "only `contains` and `is_null`" if holds_values(type_) else "only `is_null`"
            raise QueryError(f"{name!r} is {type_}: {some} can filter by it.")
        raise QueryError(f"{name!r} is compared with {wanted}, not {shown(value)}.")
    return converted


def list_element(name: str, type_: pa.DataType, value: object) -> object:
    """Convert a value to one that a list of this type can hold, or refuse it."""
    converted = converted_value(name, type_, value)
    try:
        is_one = pa.scalar(converted, type_).as_py() == converted
    except (pa.ArrowException, ValueError, OverflowError):
        is_one = False
    if not is_one:
        raise QueryError(f"{name!r} is a list of {type_}, which cannot hold {shown(value)}.")
    return converted


def holds_values(type_: pa.DataType) -> bool:
    """Whether it is a list that `contains` can look into: of plain values, not of lists or structs."""
    return bool(pt.is_list(type_) or pt.is_large_list(type_)) and bool(arrow_name(type_.value_type))


_WANTED = {
    "text": f"a text of at most {MAX_CHARACTERS:,} characters",
    "bool": "True or False",
    "integer": "a finite number",
    "float": "a finite number",
    "decimal": "a finite number",
    "date": "a date or an ISO date",
    "timestamp": "a datetime or an ISO datetime",
}


def is_text(type_: pa.DataType) -> bool:
    """Whether it holds texts, plain or as a dictionary."""
    value_type = type_.value_type if pt.is_dictionary(type_) else type_
    return bool(pt.is_string(value_type) or pt.is_large_string(value_type))


def family_of(type_: pa.DataType) -> str:
    """What a column compares with: text, bool, integer, float, decimal, date, timestamp; empty: with nothing."""
    tests = {
        "text": is_text,
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
        return value if is_storable(value) and len(str(value)) <= MAX_CHARACTERS else None
    if family == "bool":
        return value if isinstance(value, bool) else None
    if family in ("integer", "float", "decimal"):
        return _number(type_, family, value)
    if family in ("date", "timestamp"):
        return _moment(type_, family, value)
    return None


def is_storable(value: object) -> bool:
    """Whether it is a text that a table can hold: without halves of surrogate pairs."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _number(type_: pa.DataType, family: str, value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    try:
        if not math.isfinite(value):
            return None
    except (OverflowError, ValueError):  # 10**400 is no float, nor is a signalling NaN
        return None
    if family == "decimal":
        try:
            return Decimal(str(value)).quantize(Decimal(1).scaleb(-max(type_.scale, 6))).normalize() + 0
        except InvalidOperation:
            return None
    if family == "integer":
        if value == int(value):
            high = 2**64 if pt.is_uint64(type_) else LEAST_UNSIGNED
            return int(value) if -(2**63) <= value < high else float(value)
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
    try:
        value = value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
    except OverflowError:  # within a day of the year 1 or 9999
        return None
    if type_.unit == "ns":  # beyond, LanceDB's answer would be empty
        low, high = (bound.replace(tzinfo=UTC) for bound in _NANOSECONDS)
        value = min(max(value, low), high)
    return value if type_.tz is not None else value.replace(tzinfo=None)
