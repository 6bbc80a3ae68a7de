"""Filters against a plain Python oracle with SQL's three-valued logic, on a real table."""

from __future__ import annotations

import itertools
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from hostile_strings import HOSTILE, NO_TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from query_tables import CARRIED, facts, random_db

from pipeline.errors import QueryError
from pipeline.query.filter_sql import sql
from pipeline.query.filters import expression, parse_where
from pipeline.store.schemas import products_schema

COUNT = 60
SCHEMA = products_schema(16, CARRIED)
FACTS = facts(COUNT)


@cache
def table():
    return lancedb.connect(random_db(Path(mkdtemp()), COUNT)).open_table("products")


def passing(filter_, of=table):
    query = of().search() if filter_ is None else of().search().where(filter_)
    return sorted(query.select(["product_id"]).limit(1000).to_arrow()["product_id"].to_pylist())


def found(where):
    """What passes; the same as an expression and as SQL, where it can be both."""
    node = parse_where(where, SCHEMA)
    ids = passing(None if node is None else expression(node))
    assert node is None or passing(sql(node)) == ids
    return ids


def test_whole_numbers_beyond_signed_ones(tmp_path):
    top = 2**64
    numbers = pa.array([top - 1, top - 2, 2**63, 5, None], pa.uint64())
    rows = pa.table({"product_id": list("01234"), "u": numbers})
    made = lancedb.connect(tmp_path).create_table("t", rows)
    for where, expected in (
        ({"u": top - 1}, "0"), ({"u": {"ge": top - 2}}, "01"), ({"u": {"lt": 2**63}}, "3"),
        ({"u": {"in": [top - 2, 5]}}, "13"),
        ({"u": {"between": [2**63, top - 2]}}, "12"), ({"u": {"gt": top}}, ""),
    ):  # fmt: skip
        node = parse_where(where, rows.schema)
        for filter_ in (expression(node), sql(node)):
            assert passing(filter_, lambda: made) == list(expected), where


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
        "contains": lambda: value in have,  # of a text or of a list
        "between": lambda: value[0] <= have <= value[1],
    }
    return tests[operator]()


def expected(where):
    rows = ({name: values[i] for name, values in FACTS.items()} for i in range(COUNT))
    return sorted(row["product_id"] for row in rows if truth(where, row) is True)


VALUES = {
    "title": st.sampled_from([title for title in FACTS["title"][:8] if title is not None] + HOSTILE[:40]),
    "broad_category": st.sampled_from(["dress", "top", "hat"]),
    "Shop name": st.sampled_from(["shop 0", "shop 3", "'"]),
    "price": st.one_of(st.integers(-30, 80), st.sampled_from([-20.0, 1.0, 2.5, 1e300])),
    "weight": st.sampled_from([float(np.float32(value)) for value in (0.1, 2.3, 5.9, -1.0)]),
    "stock": st.one_of(st.integers(-12, 55), st.sampled_from([2.5, -2.5, 7.0, 2**70, -(2**63)])),
    "listed": st.dates(date(2025, 12, 25), date(2026, 3, 1)),
    "changed": st.datetimes(datetime(2026, 1, 1), datetime(2026, 1, 4), timezones=st.just(UTC)),
    "cost": st.sampled_from([Decimal("2.5"), Decimal("0"), Decimal("100"), Decimal("2.25"), Decimal("-0.123456")]),
    "seen": st.datetimes(datetime(2026, 1, 1), datetime(2026, 1, 6), timezones=st.just(UTC)),
}
LISTS = {
    "tags": st.sampled_from(["a", "silk", "a, silk", "it's 100% silk_", "[a]", *HOSTILE[:20]]),
    "sizes": st.integers(35, 41),
}


@st.composite
def conditions(draw):
    name = draw(st.sampled_from([*VALUES, "on_sale", *LISTS]))
    if draw(st.integers(0, 7)) == 0:
        return {name: {"is_null": draw(st.booleans())}}
    if name in LISTS:
        return {name: {"contains": draw(LISTS[name])}}
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


@cache
def hostile_table():
    """A product for each hostile text, which is its title and one of its tags."""
    rows = {"product_id": [f"h{i:03d}" for i in range(len(HOSTILE))], "title": HOSTILE}
    types = [
        pa.field("product_id", pa.string()),
        pa.field("title", pa.string()),
        pa.field("tags", pa.list_(pa.string())),
    ]
    data = pa.table({**rows, "tags": [["a", text] for text in HOSTILE]}, pa.schema(types))
    return lancedb.connect(mkdtemp()).create_table("products", data)


POSITIONS = {
    **{operator: (operator, lambda text: text) for operator in ("eq", "ne", "lt", "le", "gt", "ge", "contains")},
    "in": ("in", lambda text: ["no such", text]),
    "between": ("between", lambda text: [text, text + "\U0010ffff"]),
}


@pytest.mark.parametrize("position", POSITIONS)
def test_no_text_changes_the_meaning(position):
    """Each as the value of each operator, alone, beside another condition, and in SQL; the oracle is plain Python."""
    assert len(HOSTILE) >= 100
    schema = hostile_table().schema
    operator, value = POSITIONS[position]
    rows = [{"product_id": f"h{i:03d}", "title": title} for i, title in enumerate(HOSTILE)]
    for text in HOSTILE:
        where = {"not": {"title": {operator: value(text)}}} if operator == "ne" else {"title": {operator: value(text)}}
        node = parse_where(where, schema)
        truths = [row["product_id"] for row in rows if truth(where, row) is True]
        assert passing(expression(node), hostile_table) == truths, text
        both = ("and", node, ("has", "tags", text, pa.string()))
        own = [row["product_id"] for row in rows if truth(where, row) is True and text in ("a", row["title"])]
        assert passing(expression(both), hostile_table) == own, text


def test_no_text_in_a_list_changes_the_meaning():
    for i, text in enumerate(HOSTILE):
        where = {"tags": {"contains": text}, "title": {"ne": "no such"}}
        assert passing(expression(parse_where(where, hostile_table().schema)), hostile_table) == [f"h{i:03d}"], text


REFUSED = [
    *[lambda text, name=name: {name: text} for name in ("price", "stock", "weight", "on_sale", "cost", "sizes")],
    *[lambda text, name=name: {name: {"in": [text]}} for name in ("stock", "cost")],
    *[lambda text, name=name: {name: {"between": [text, text]}} for name in ("price", "stock")],
    *[lambda text, name=name: {name: {"is_null": text}} for name in ("price", "tags", "title")],
    lambda text: {"sizes": {"contains": text}},
    lambda text: {"title": {"in": text}},
    lambda text: {"tags": {"in": [text]}},
    lambda text: {"and": text},
    lambda text: {"or": [text]},
    lambda text: {"not": text},
    lambda text: {f"{text} ": 3},
    lambda text: {"and": [{f"{text} ": {"eq": 3}}]},
    lambda text: {"not": {f"title{text} ": {"is_null": True}}},
    lambda text: {"title": {f"{text} ": "red"}},
    lambda text: {"title": {f"eq{text} ": "red"}},
    lambda text: {f"or{text} ": [{"price": 3}]},
]


@pytest.mark.parametrize("text", [*HOSTILE, *NO_TEXTS], ids=lambda text: repr(text[:12]))
def test_where_no_text_belongs_it_is_refused_in_a_sentence(text):
    for position in REFUSED:
        with pytest.raises(QueryError) as error:
            parse_where(position(text), SCHEMA)
        assert_is_a_sentence(error)
    if text not in ("2026-01-01",):
        for where in ({"listed": text}, {"changed": {"lt": text}}, {"seen": {"in": [text]}}):
            with pytest.raises(QueryError, match="ISO date") as error:
                parse_where(where, SCHEMA)
            assert_is_a_sentence(error)


def assert_is_a_sentence(error):
    said = str(error.value)
    assert said.isprintable()
    assert said.endswith(".")
    assert len(said) < 800


@pytest.mark.parametrize("text", NO_TEXTS, ids=repr)
def test_what_is_no_text_is_refused(text):
    for where in (
        {"title": text},
        {"title": {"in": ["a", text]}},
        {"title": {"contains": text}},
        {"tags": {"contains": text}},
    ):
        with pytest.raises(QueryError, match="a text of at most 20,000 characters") as error:
            parse_where(where, SCHEMA)
        assert_is_a_sentence(error)


def test_columns_of_any_name_are_taken_by_their_names():
    names = [
        text
        for text in HOSTILE
        if text.strip("_ \n") and text[0] != "_" and not set("`.\x00") & set(text) and len(text) < 100
    ]
    assert len(names) >= 100
    names = names[::3]
    data = pa.table(
        {"product_id": ["a", "b", "c"], "tags": [["x"], [], None], **{name: ["v", "w", None] for name in names}}
    )
    named = lancedb.connect(mkdtemp()).create_table("products", data)
    for name in names:
        if name not in ("and", "or", "not"):
            node = parse_where({name: "v"}, data.schema)
            assert passing(expression(node), lambda: named) == passing(sql(node), lambda: named) == ["a"], name
            node = parse_where({name: {"is_null": True}}, data.schema)
            assert passing(expression(node), lambda: named) == passing(sql(node), lambda: named) == ["c"], name


LISTED = {
    "texts": (pa.list_(pa.string()), ["a", "b"], "c"),
    "large": (pa.large_list(pa.large_string()), ["a", "b"], "c"),
    "int8": (pa.list_(pa.int8()), [1, -128], 5),
    "int64": (pa.list_(pa.int64()), [2**63 - 1, -(2**63)], 0),
    "uint64": (pa.list_(pa.uint64()), [0, 2**62], 1),
    "half": (pa.list_(pa.float16()), [1.5, 2.0], 3.0),
    "single": (pa.list_(pa.float32()), [19.99, -0.5], 20.0),
    "double": (pa.list_(pa.float64()), [19.99, 1e300], 0.1),
    "flags": (pa.list_(pa.bool_()), [True, True], False),
    "costs": (pa.list_(pa.decimal128(10, 2)), [Decimal("2.50"), Decimal("-0.01")], Decimal("2.51")),
    "wide": (pa.list_(pa.decimal256(50, 2)), [Decimal("2.50"), Decimal("0")], 3),
    "dates": (pa.list_(pa.date32()), [date(2026, 1, 1), date(1, 1, 1)], "2026-01-02"),
    "dates64": (pa.list_(pa.date64()), [date(2026, 1, 1), date(2025, 1, 1)], "2026-01-02"),
    "seconds": (pa.list_(pa.timestamp("s")), [datetime(2026, 1, 1, 5), datetime(2026, 1, 2)], "2026-01-01T06:00"),
    "zoned": (
        pa.list_(pa.timestamp("ms", tz="Europe/Berlin")),
        [datetime(2026, 1, 1, 5, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)],
        "2026-01-01T05:00+01:00",
    ),
    "nanos": (
        pa.list_(pa.timestamp("ns", tz="UTC")),
        [datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)],
        datetime(2026, 1, 3),
    ),
}


def test_lists_of_every_type_contain_what_is_in_them():
    """Rows: both values, the first, null, none, a null and the second, a null alone."""
    data = {"product_id": ["0", "1", "2", "3", "4", "5"]}
    types = {name: type_ for name, (type_, _, _) in LISTED.items()}
    for name, (_, (first, second), _) in LISTED.items():
        data[name] = [[first, second], [first], None, [], [None, second], [None]]
    schema = pa.schema([pa.field("product_id", pa.string()), *[pa.field(*item) for item in types.items()]])
    lists = lancedb.connect(mkdtemp()).create_table("products", pa.table(data, schema))

    def ids(where):
        return "".join(passing(expression(parse_where(where, schema)), lambda: lists))

    for name, (_, (first, second), other) in LISTED.items():
        expected = "014" if first == second else "01"
        assert ids({name: {"contains": first}}) == expected, name
        assert ids({name: {"contains": second}}) == ("014" if first == second else "04"), name
        assert ids({name: {"contains": other}}) == "", name
        assert ids({"not": {name: {"contains": first}}}) == "".join(i for i in "01345" if i not in expected), name
        assert ids({name: {"is_null": True}}) == "2", name
        assert ids({"not": {name: {"is_null": True}}, "product_id": {"gt": "1"}}) == "345", name


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ({"int8": {"contains": 1000}}, "list of int8, which cannot hold 1000"),
        ({"int8": {"contains": 1.5}}, "cannot hold 1.5"),
        ({"int8": {"contains": True}}, "finite number"),
        ({"uint64": {"contains": -1}}, "cannot hold -1"),
        ({"costs": {"contains": 2.501}}, "cannot hold 2.501"),
        ({"seconds": {"contains": "2026-01-01T00:00:00.5"}}, "cannot hold"),
        ({"texts": {"contains": None}}, "is_null"),
        ({"texts": {"contains": ["a"]}}, "a text"),
        ({"texts": {"eq": "a"}}, "only `contains` and `is_null`"),
        ({"texts": {"in": ["a"]}}, "only `contains` and `is_null`"),
        ({"made": {"contains": "a"}}, "texts or lists, and 'made' is struct<place: string>"),
        ({"made": "a"}, "only `is_null` can filter by it"),
        ({"made.place": "a"}, "No column 'made.place'"),
        ({"map": {"contains": "a"}}, "texts or lists, and 'map' is map<string, string>"),
        ({"map": {"a": "a"}}, "No operator 'a'"),
        ({"nested": {"contains": "a"}}, "texts or lists, and 'nested' is list"),
        ({"q`t": "a"}, "backtick"),
    ],
)
def test_lists_structs_and_maps_that_are_asked_wrongly(where, sentence):
    types = {name: type_ for name, (type_, _, _) in LISTED.items()}
    types["made"] = pa.struct([("place", pa.string())])
    types["map"] = pa.map_(pa.string(), pa.string())
    types["nested"] = pa.list_(pa.list_(pa.string()))
    types["q`t"] = pa.string()
    with pytest.raises(QueryError, match=sentence) as error:
        parse_where(where, pa.schema(list(types.items())))
    assert_is_a_sentence(error)


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
        ({"price": {"contains": "3"}}, "texts or lists"),
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
        ({"tags": "a"}, "only `contains` and `is_null`"),
        ({"stock": 10**400}, "finite number"),
        ({"stock": 10**5000}, "finite number, not a int"),
        ({"stock": Decimal("sNaN")}, "finite number"),
        ({"stock": {"in": itertools.count()}}, "at most 10000"),
        ({"seen": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=9)))}, "ISO datetime"),
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
    where = {"tags": {"contains": "a"}, "stock": {"ge": 0}}
    for level in range(15):
        where = {"not": where, "stock": {"ge": -5}} if level % 2 else {"or": [where, {"on_sale": True}]}
    assert found(where) == expected(where)
    for _ in range(16):
        where = {"not": where}
    with pytest.raises(QueryError, match="levels deep"):
        parse_where(where, SCHEMA)


@pytest.mark.parametrize("position", ["tags", "title"])
def test_ten_thousand_values_and_five_hundred_conditions_in_sql(position):
    lists = {"or": [{"tags": {"contains": f"x'{i}"}} for i in range(499)] + [{"tags": {"contains": "silk"}}]}
    values = {"title": {"in": [f"x'{i}" for i in range(9_999)] + ["red dress"]}, "tags": {"contains": "a"}}
    where = {"tags": lists, "title": values}[position]
    assert found(where) == expected(where) != []
