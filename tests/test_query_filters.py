"""Filters against a plain Python oracle with SQL's three-valued logic, on a real table."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import lancedb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from query_tables import CARRIED, facts, random_db

from pipeline.errors import QueryError
from pipeline.query.filters import expression, parse_where
from pipeline.store.schemas import products_schema

COUNT = 60
SCHEMA = products_schema(16, CARRIED)
FACTS = facts(COUNT)
INJECTIONS = [
    *("' OR '1'='1", "x' OR 1=1 --", "\\' OR '1'='1", "\\", "'", '"', "`", "''", "\\'", "%", "_", "x\x00y", "); DROP"),
    *("' OR title IS NOT NULL OR '", "dress' --", "${x}", "{0}", "%s", "\n' OR 1=1", "/* */", "*", "ｄress", "🧥'"),
]


@cache
def table():
    return lancedb.connect(random_db(Path(mkdtemp()), COUNT)).open_table("products")


def found(where):
    node = parse_where(where, SCHEMA)
    query = table().search()
    if node is not None:
        query = query.where(expression(node))
    return sorted(row["product_id"] for row in query.select(["product_id"]).limit(COUNT).to_list())


def truth(where, row):
    """True, False or None, as SQL has it."""
    results = []
    for name, condition in where.items():
        if name == "and":
            results.append(conjunction([truth(group, row) for group in condition]))
        elif name == "or":
            results.append(negated(conjunction([negated(truth(group, row)) for group in condition])))
        elif name == "not":
            results.append(negated(truth(condition, row)))
        else:
            tests = condition if isinstance(condition, dict) else {"eq": condition}
            results.extend(compare(row[name], operator, value) for operator, value in tests.items())
    return conjunction(results)


def conjunction(results):
    return False if False in results else None if None in results else True


def negated(result):
    return None if result is None else not result


def compare(have, operator, value):
    if operator == "is_null":
        return (have is None) == value
    if operator == "in" and not value:
        return False
    if have is None:
        return None
    tests = {
        "eq": lambda: have == value,
        "ne": lambda: have != value,
        "lt": lambda: have < value,
        "le": lambda: have <= value,
        "gt": lambda: have > value,
        "ge": lambda: have >= value,
        "in": lambda: have in value,
        "contains": lambda: value in have,
        "between": lambda: value[0] <= have <= value[1],
    }
    return tests[operator]()


def expected(where):
    rows = ({name: values[i] for name, values in FACTS.items()} for i in range(COUNT))
    return sorted(row["product_id"] for row in rows if truth(where, row) is True)


VALUES = {
    "title": st.sampled_from([title for title in FACTS["title"][:8] if title is not None] + INJECTIONS),
    "broad_category": st.sampled_from(["dress", "top", "hat"]),
    "Shop name": st.sampled_from(["shop 0", "shop 3", "'"]),
    "price": st.one_of(st.integers(-30, 80), st.sampled_from([-20.0, 1.0, 2.5, 1e300])),
    "weight": st.sampled_from([float(np.float32(value)) for value in (0.1, 2.3, 5.9, -1.0)]),
    "stock": st.one_of(st.integers(-12, 55), st.sampled_from([2.5, -2.5, 7.0, 2**70, -(2**63)])),
    "listed": st.dates(date(2025, 12, 25), date(2026, 3, 1)),
    "changed": st.datetimes(datetime(2026, 1, 1), datetime(2026, 1, 4), timezones=st.just(UTC)),
    "cost": st.sampled_from([Decimal("2.5"), Decimal("0"), Decimal("100"), Decimal("2.25")]),
}


@st.composite
def conditions(draw):
    name = draw(st.sampled_from([*VALUES, "on_sale", "tags"]))
    if name == "tags" or draw(st.integers(0, 7)) == 0:
        return {name: {"is_null": draw(st.booleans())}}
    if name == "on_sale":
        return {name: {draw(st.sampled_from(["eq", "ne"])): draw(st.booleans())}}
    value = VALUES[name]
    operators = ["eq", "ne", "lt", "le", "gt", "ge", "in", "between", *(["contains"] if name == "title" else [])]
    operator = draw(st.sampled_from(operators))
    if operator == "in":
        return {name: {"in": draw(st.lists(value, max_size=4))}}
    if operator == "between":
        return {name: {"between": [draw(value), draw(value)]}}
    return {name: {operator: draw(value)}}


def nested(children):
    lists = st.lists(children, min_size=1, max_size=3)
    return st.one_of(
        lists.map(lambda groups: {"and": groups}),
        lists.map(lambda groups: {"or": groups}),
        children.map(lambda group: {"not": group}),
    )


@given(where=st.recursive(conditions(), nested, max_leaves=6))
@settings(max_examples=200, deadline=None)
def test_a_filter_means_what_it_says(where):
    assert found(where) == expected(where)


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize("operator", ["eq", "in", "contains", "ne"])
def test_no_string_changes_the_meaning(text, operator):
    where = {"title": {operator: [text] if operator == "in" else text}, "broad_category": "dress"}
    assert found(where) == expected(where)


def test_values_are_read_as_their_columns_types():
    assert found({"listed": {"lt": "2026-01-04"}}) == expected({"listed": {"lt": date(2026, 1, 4)}})
    late = datetime(2026, 1, 1, 5, tzinfo=UTC)
    assert found({"changed": {"lt": "2026-01-01T05:00"}}) == expected({"changed": {"lt": late}})
    assert found({"changed": {"lt": "2026-01-01T07:00+02:00"}}) == expected({"changed": {"lt": late}})
    assert found({"weight": 2.3}) == ["p00023"]
    assert found({"stock": np.int32(5)}) == ["p00015"]
    assert found({"cost": 2.75}) == ["p00011"]
    assert found({"changed": {"lt": late + timedelta(days=9), "ge": late}, "stock": {"ge": 0.5}})
    assert found({}) == FACTS["product_id"]


def test_five_hundred_conditions_work_and_more_are_refused():
    assert found({"or": [{"stock": i} for i in range(500)]}) == expected({"stock": {"ge": 0}})
    with pytest.raises(QueryError, match="at most 500"):
        found({"or": [{"stock": i} for i in range(501)]})


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("price < 3", "mapping"),
        ({"colour": "red"}, "No column 'colour'.*price"),
        ({3: "red"}, "No column 3"),
        ({"text_vector": {"is_null": True}}, "No column"),
        ({"price": None}, "is_null"),
        ({"price": "3"}, "finite number"),
        ({"price": True}, "finite number"),
        ({"price": float("nan")}, "finite number"),
        ({"price": {"lt": 10**400}}, "finite number"),
        ({"stock": {"gt": -(10**400)}}, "finite number"),
        ({"price": {"lt": float("inf")}}, "finite number"),
        ({"price": {"le": Decimal("NaN")}}, "finite number"),
        ({"price": {"near": 3}}, "No operator 'near'"),
        ({"price": {}}, "empty"),
        ({"price": {"contains": "3"}}, "text column"),
        ({"price": {"in": 3}}, "list of values"),
        ({"title": {"in": "red"}}, "list of values"),
        ({"title": {"in": [None]}}, "is_null"),
        ({"price": {"between": [1, 2, 3]}}, "two values"),
        ({"price": {"is_null": 1}}, "True or False"),
        ({"title": 3}, "a text"),
        ({"title": "\ud800"}, "a text"),
        ({"title": ["red"]}, "a text"),
        ({"on_sale": 1}, "True or False"),
        ({"on_sale": {"lt": True}}, "no meaning"),
        ({"tags": "a"}, "only `is_null`"),
        ({"listed": "yesterday"}, "ISO date"),
        ({"listed": datetime(2026, 1, 1, 3)}, "ISO date"),
        ({"changed": 3}, "ISO datetime"),
        ({"and": []}, "at least one"),
        ({"or": {"price": 3}}, "list of mappings"),
        ({"not": []}, "one mapping"),
        ({"stock": {"in": range(10_001)}}, "at most 10000"),
    ],
)
def test_what_has_no_meaning_is_refused_in_a_sentence(where, sentence):
    with pytest.raises(QueryError, match=sentence) as error:
        parse_where(where, SCHEMA)
    assert "\n" not in str(error.value)


def test_depth_is_bounded():
    where = {"price": 3}
    for _ in range(30):
        where = {"not": where}
    with pytest.raises(QueryError, match="levels deep"):
        parse_where(where, SCHEMA)
