"""Anyone's table to a catalog: the same products from CSV, JSONL and Parquet, with what is wrong in each."""

from __future__ import annotations

import contextlib
import csv
import datetime
import gzip
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import import_table
from pipeline.catalog.partitions import open_catalog
from pipeline.catalog.products import RowPlan, read_products
from pipeline.config import CatalogConfig, ColumnsConfig

IMAGES = ("a.jpg", "b.jpg", "deep/c d.jpg", "[e].jpg")


def run(file: Path, out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """The job in this process: exit code and result."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            code = import_table.main([str(file), "--out", str(out), "--json", "--log-level", "error", *more])
        except SystemExit as ended:
            code = int(str(ended.code))
    return code, json.loads(said.getvalue().splitlines()[-1])


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((out / "catalog").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def rejects(out: Path) -> list[tuple[int, str, str | None, str, str]]:
    names = ("row", "kind", "product_id", "input", "reason")
    return [tuple(row[n] for n in names) for row in pq.read_table(out / "_rejects.parquet").to_pylist()]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder of images with a secret beside it, and a link to that."""
    for name in IMAGES:
        (tmp_path / "shop" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shop" / name).write_bytes(name.encode())
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "shop" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    return tmp_path / "shop"


def write(file: Path, table: Sequence[Mapping[str, Any]]) -> Path:
    """The rows in the format that the file's suffix says."""
    names = list(dict.fromkeys(name for row in table for name in row))
    if file.suffix == ".csv":
        with file.open("w", newline="") as text:
            writer = csv.DictWriter(text, names)
            writer.writeheader()
            writer.writerows(table)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        pq.write_table(pa.Table.from_pylist([{n: row.get(n) for n in names} for row in table]), file)
    return file


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_products_and_rejects(shop: Path, tmp_path: Path, suffix: str) -> None:
    table = [
        {"sku": "007", "name": "Red dress", "about": "long", "kind": "dress", "picture": "a.jpg", "colour": "red"},
        {"sku": "8", "name": "Coat, warm", "about": None, "kind": "coat", "picture": "missing.jpg", "colour": "blue"},
        {"sku": "007", "name": "Red dress", "about": None, "kind": None, "picture": "b.jpg", "colour": "other"},
        {"sku": None, "name": "nobody's", "about": None, "kind": None, "picture": "a.jpg", "colour": None},
        {"sku": "007", "name": "Blue dress", "about": None, "kind": None, "picture": "b.jpg", "colour": None},
        {"sku": "9", "name": None, "about": "only\nwords", "kind": None, "picture": None, "colour": None},
        {"sku": "10", "name": "ways out", "about": None, "kind": None, "picture": "../secret.jpg", "colour": "x"},
        {"sku": "10", "name": None, "about": None, "kind": None, "picture": "link.jpg", "colour": "x"},
        {"sku": "10", "name": None, "about": None, "kind": None, "picture": "/etc/passwd", "colour": "x"},
        {"sku": "10", "name": None, "about": None, "kind": "hat", "picture": f"{shop}/deep/c d.jpg", "colour": "x"},
        {"sku": "10", "name": None, "about": None, "kind": None, "picture": "deep/c d.jpg", "colour": "x"},
        {"sku": "11", "name": "far", "about": None, "kind": None, "picture": "https://k:s@h.example/x", "colour": "x"},
        {"sku": "007", "name": None, "about": "long", "kind": None, "picture": "[e].jpg", "colour": None},
    ]  # fmt: skip
    columns = ("--id", "sku", "--title", "name", "--description", "about", "--fine", "kind", "--images", "picture")
    file = write(shop / f"table{suffix}", table)
    code, told = run(file, tmp_path / "out", *columns)
    assert code == 0, told
    first = {"csv": 2, "jsonl": 1, "parquet": 1}[suffix[1:]]
    later = 1 if suffix == ".csv" else 0  # a text of two lines is on two lines of a CSV
    assert sorted(rejects(tmp_path / "out")) == sorted([
        (first + 1, "image", "8", "missing.jpg", "image_not_found"),
        (first + 3, "row", None, "", "missing_id"),
        (first + 4, "row", "007", "", "conflicting_row"),
        (first + 6 + later, "image", "10", "../secret.jpg", "fetch_refused"),
        (first + 7 + later, "image", "10", "link.jpg", "fetch_refused"),
        (first + 8 + later, "image", "10", "/etc/passwd", "fetch_refused"),
        (first + 10 + later, "image", "10", "deep/c d.jpg", "duplicate_image"),
        (first + 11 + later, "image", "11", "https://…@h.example/x", "fetch_refused"),
    ])  # fmt: skip
    none = {"title": None, "description": None, "broad_category": None, "fine_category": None, "colour": None}
    assert rows(tmp_path / "out") == [
        none | {"product_id": "8", "title": "Coat, warm", "fine_category": "coat", "colour": "blue", "images": []},
        none | {"product_id": "9", "description": "only\nwords", "images": []},
        none | {"product_id": "10", "title": "ways out", "fine_category": "hat", "colour": "x",
                "images": [b"deep/c d.jpg"]},
        none | {"product_id": "11", "title": "far", "colour": "x", "images": []},
        none | {"product_id": "007", "title": "Red dress", "description": "long", "fine_category": "dress",
                "colour": "red", "images": [b"a.jpg", b"b.jpg", b"[e].jpg"]},
    ]  # fmt: skip
    assert (told["rows"], told["products"], told["images"]) == (13, 5, 4)
    assert told["image_references"] == told["images"] + told["rejected_images"] == 10
    assert told["rejected_rows"] == 2
    kept = run(file, tmp_path / "out", *columns)[1]
    assert (kept["written"], kept["kept"]) == (0, 1)


@pytest.mark.parametrize(
    ("cell", "options", "images", "reasons"),
    [
        ("a.jpg|b.jpg|", ("--image-separator", "|"), ["a.jpg", "b.jpg"], []),
        ("a.jpg, deep/c d.jpg", ("--image-separator", ","), ["a.jpg", "deep/c d.jpg"], []),
        ('["b.jpg", null, "", 5, "a.jpg"]', (), ["b.jpg", "a.jpg"], ["image_null", "image_empty", "not_text"]),
        ("[e].jpg", (), ["[e].jpg"], []),
        (" a.jpg ", (), ["a.jpg"], []),
        ("a.jpg|b.jpg", (), [], ["image_not_found"]),
        ("deep", (), [], ["image_not_found"]),
        ("a.jpg\\..\\b.jpg", (), [], ["fetch_refused"]),
        ("s3://bucket/a.jpg", (), [], ["fetch_refused"]),
    ],
)
def test_a_cell_of_images(
    shop: Path, tmp_path: Path, cell: str, options: tuple[str, ...], images: list[str], reasons: list[str]
) -> None:
    file = write(tmp_path / "t.csv", [{"product_id": "1", "title": "t", "images": cell}])
    code, told = run(file, tmp_path / "out", "--image-root", str(shop), *options)
    assert code == 0, told
    assert rows(tmp_path / "out")[0]["images"] == [image.encode() for image in images]
    assert sorted(reason for *_, reason in rejects(tmp_path / "out")) == sorted(reasons)
    assert told["image_references"] == len(images) + len(reasons)


def test_references_keep_urls(shop: Path, tmp_path: Path) -> None:
    url = "https://img.shop.example/a.jpg?width=200"
    table = [{"product_id": 1, "images": ["a.jpg", url, "none.jpg", None]}, {"product_id": 2, "images": None}]
    for suffix in (".jsonl", ".parquet"):
        file = write(shop / f"t{suffix}", table)
        out = tmp_path / suffix[1:]
        assert run(file, out, "--image-form", "references")[0] == 0
        assert [row["images"] for row in rows(out)] == [["a.jpg", url], []]
        assert [reason for *_, reason in rejects(out)] == ["image_null", "image_not_found"]
        assert [row["product_id"] for row in rows(out)] == ["1", "2"]


def test_csv_rows_that_are_none(shop: Path, tmp_path: Path) -> None:
    raw = (
        b"\xef\xbb\xbfproduct_id;title;images;price\r\n"
        b"1;one;a.jpg;12.50\r\n"
        b"2;two;a.jpg\r\n"  # line 3
        b"\r\n"
        b"3;thr\xe9e;a.jpg;1\r\n"  # line 5
        b'4;"two\r\nlines ""quoted""";b.jpg;cheap\r\n'
        b"5;five;;NaN\r\n"  # line 8
        b'6;"" x;a.jpg;2\r\n'
        b'7;"never closed;a.jpg;1\r\n'
        b"8;swallowed;a.jpg;1\r\n"
    )
    (shop / "t.csv").write_bytes(raw)
    code, told = run(shop / "t.csv", tmp_path / "out", "--delimiter", ";", "--number", "price")
    assert code == 0, told
    assert [(r["product_id"], r["title"], r["price"], len(r["images"])) for r in rows(tmp_path / "out")] == [
        ("1", "one", 12.5, 1), ("4", 'two\r\nlines "quoted"', None, 1), ("5", "five", None, 0),
    ]  # fmt: skip
    assert rejects(tmp_path / "out") == [
        (3, "row", None, "", "wrong_fields"),
        (5, "row", None, "", "not_utf8"),
        (6, "value", "4", "cheap", "not_a_number"),
        (8, "value", "5", "NaN", "not_a_number"),
        (9, "row", None, "", "row_unreadable"),
        (10, "row", None, "", "row_unreadable"),
    ]
    detail = pq.read_table(tmp_path / "out" / "_rejects.parquet").to_pylist()[-1]["detail"]
    assert "lines 10 to 11" in detail
    packed = shop / "t.csv.gz"
    packed.write_bytes(gzip.compress(raw))
    assert run(packed, tmp_path / "packed", "--delimiter", ";", "--number", "price")[0] == 0
    assert rows(tmp_path / "packed") == rows(tmp_path / "out")


def test_jsonl_lines_that_are_none_and_columns_of_mixed_values(shop: Path, tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"product_id": 1, "title": 501, "n": 1, "x": 1, "m": "a", "f": true, "l": ["p"], "d": {"a": 1}}',
        b'{"product_id": "b", "n": null, "x": 2.5, "m": 5, "f": null, "l": [], "d": [1], "source_title": "mine"}',
        b"{not json",
        b"[1, 2]",
        b"",
        b'{"product_id": "c", "title": "\xff"}',
        b'{"product_id": "c", "title": "\\ud800"}',
        b'{"product_id": true}',
        b'{"product_id": "d", "title": ["a"]}',
        b'{"product_id": "e", "m": 99999999999999999999}',
        b"[" * 100_000,
    ]
    (shop / "t.jsonl").write_bytes(b"\r\n".join(lines))
    code, told = run(shop / "t.jsonl", tmp_path / "out")
    assert code == 0, told
    found = {row["product_id"]: row for row in rows(tmp_path / "out")}
    assert set(found) == {"1", "b", "e"}
    assert found["1"] | {"images": 0} == {
        "product_id": "1", "title": "501", "description": None, "broad_category": None, "fine_category": None,
        "n": 1, "x": 1.0, "m": "a", "f": True, "l": ["p"], "d": '{"a": 1}', "source_title": None, "images": 0,
    }  # fmt: skip
    assert (found["b"]["x"], found["b"]["m"], found["b"]["d"]) == (2.5, "5", "[1]")
    assert found["e"]["m"] == "99999999999999999999"
    assert [(row, reason) for row, *_, reason in rejects(tmp_path / "out")] == [
        (3, "row_unreadable"), (4, "row_unreadable"), (6, "not_utf8"), (7, "not_utf8"), (8, "missing_id"),
        (9, "not_text"), (11, "row_unreadable"),
    ]  # fmt: skip


def test_parquet_columns_are_carried_with_their_types(shop: Path, tmp_path: Path) -> None:
    carried = {
        "at": pa.array([1_500_000_000_123_456_789, None], pa.timestamp("ns", "UTC")),
        "price": pa.array([None, 1], pa.decimal128(10, 2)),
        "day": pa.array([datetime.date(2026, 1, 1), None]),
        "more": pa.array([{"a": [1]}, None], pa.struct([("a", pa.list_(pa.int8()))])),
        "tags": pa.array([["x", None], []], pa.list_(pa.large_string())),
        "images_2": pa.array([b"\x00", None], pa.binary()),
    }
    brand = pa.array(["one", "other"]).dictionary_encode()
    table = pa.table({"product_id": pa.array([1, 2], pa.int32()), "title": brand, "brand": brand, **carried})
    pq.write_table(table, shop / "t.parquet")
    assert run(shop / "t.parquet", tmp_path / "out")[0] == 0
    read = pq.read_table(tmp_path / "out" / "catalog")
    for name, column in carried.items():
        assert read.column(name).combine_chunks().equals(column), name
    assert read.column("brand").to_pylist() == read.column("title").to_pylist() == ["one", "other"]
    catalog = open_catalog(str(tmp_path / "out"), CatalogConfig(), ColumnsConfig(carried=("price", "at")))
    ((good, bad),) = read_products(catalog, catalog.partitions[0], RowPlan())
    assert ([product.text for product in good], bad) == (["one", "other"], [])


def test_partitions_are_bounded_and_changed_tables_written_again(shop: Path, tmp_path: Path) -> None:
    table = [{"product_id": f"{i}", "title": f"t{i}", "images": "a.jpg"} for i in range(7)]
    file, out = write(shop / "t.csv", table), tmp_path / "out"
    _, told = run(file, out, "--partition-products", "3")
    assert [part["products"] for part in told["partitions"]] == [3, 3, 1]
    write(file, table[:2])
    _, told = run(file, out, "--partition-products", "3")
    assert ([part["products"] for part in told["partitions"]], told["written"]) == ([2], 1)
    assert len(list((out / "catalog").iterdir())) == 1
    run(file, tmp_path / "fresh", "--partition-products", "3")
    for name in ("manifest.json", "_rejects.parquet", "catalog/part-00000.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    _, told = run(file, out, "--partition-products", "3", "--image-form", "references")
    assert told["written"] == 1


@pytest.mark.parametrize(
    ("name", "raw", "options", "said"),
    [
        ("none.csv", None, (), "there is no table"),
        ("t.xlsx", b"PK", (), "say what it is with --format"),
        ("t.csv", b"", (), "has no columns"),
        ("t.csv", b"a,a\n1,2\n", (), "'a' twice"),
        ("t.csv", b"sku,title\n1,2\n", (), "no column 'product_id' for product_id; it has sku, title.*--id"),
        ("t.csv", b"product_id\n1\n", ("--broad", "kind"), "no column 'kind' for broad_category.*--broad"),
        ("t.csv", b"product_id\n1\n", ("--number", "price"), "no further column 'price'"),
        ("t.csv", b"product_id\n1\n", ("--image-root", "/nowhere/at/all"), "there is no folder"),
        ("t.csv", b"product_id\n1\n", ("--delimiter", "ab"), "takes one character"),
        ("t.csv.gz", b"product_id\n1\n", (), "cannot be read as csv"),
        ("t.csv.gz", gzip.compress(b"product_id\n" + bytes(range(65, 91)) * 9000)[:-20], (), "cannot be read"),
        ("t.parquet", b"PAR1", (), "cannot be read as parquet"),
        ("t.jsonl", b'{"product_id": 1, "images": 5}\n', (), "should be text, or a list of texts"),
        ("t.jsonl", b"nothing\n", (), "has no columns"),
    ],
)
def test_what_cannot_start_is_one_sentence_and_exit_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    raw: bytes | None,
    options: tuple[str, ...],
    said: str,
) -> None:
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    code, told = run(tmp_path / name, tmp_path / "out", *options)
    assert code == 2
    assert re.search(said, told["error"])
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_a_catalog_already_is_told_so(tmp_path: Path) -> None:
    pq.write_table(pa.table({"product_id": ["1"], "images": [[b"jpeg"]]}), tmp_path / "t.parquet")
    code, told = run(tmp_path / "t.parquet", tmp_path / "out")
    assert (code, "this is a catalog already" in told["error"]) == (2, True)


ROWS = st.lists(
    st.tuples(*(st.sampled_from(cells) for cells in (["1", "2", "3", ""], ["", "t", "u"], ["", *IMAGES, "no"]))),
    min_size=1,
    max_size=12,
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=ROWS, partition=st.integers(1, 3))
def test_every_row_and_every_image_is_in_the_catalog_or_the_rejects(
    shop: Path, tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str, str]], partition: int
) -> None:
    out = tmp_path_factory.mktemp("out") / "o"
    names = ("product_id", "title", "images")
    file = write(shop / "t.csv", [dict(zip(names, row, strict=True)) for row in table])
    code, told = run(file, out, "--partition-products", str(partition))
    found = rows(out)
    left_out = rejects(out)
    bad_rows = {row for row, kind, *_ in left_out if kind == "row"}
    good = [row for number, row in enumerate(table, 2) if number not in bad_rows]
    assert {row["product_id"] for row in found} == {product_id for product_id, *_ in good}
    assert code == (0 if good else 1), told
    images = [(row["product_id"], image.decode()) for row in found for image in row["images"]]
    images += [(product_id, image) for _, kind, product_id, image, _ in left_out if kind == "image"]
    assert sorted(images) == sorted((product_id, image) for product_id, _, image in good if image)
    for row in found:
        said = {title for product_id, title, _ in good if product_id == row["product_id"] and title}
        assert said == ({row["title"]} if row["title"] else set())
