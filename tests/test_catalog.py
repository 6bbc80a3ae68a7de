from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_catalog import Item, items, write_images, write_products

from pipeline.catalog.partitions import open_catalog
from pipeline.catalog.products import RowPlan, assemble_text, read_products
from pipeline.config import CatalogConfig, ColumnsConfig
from pipeline.errors import CatalogError
from pipeline.records import Product, Reason

COLUMNS, AUTO = ColumnsConfig(), CatalogConfig()


@pytest.mark.parametrize(
    ("title", "description", "text"),
    [
        ("Dress", "Red and long", "Dress. Red and long"),
        ("Dress.", "Red", "Dress. Red"),
        (" Dress ", "Red\n", "Dress. Red"),
        ("Dress", None, "Dress"),
        (None, "Red", "Red"),
        ("Dress", "Dress", "Dress"),
        ("", "Red", "Red"),
        ("Dress", "  ", "Dress"),
        (None, None, None),
        ("", None, ""),
        (" ", "\t", ""),
    ],
)
def test_text_is_assembled(title: str | None, description: str | None, text: str | None) -> None:
    assert assemble_text(title, description) == text


@given(st.none() | st.text(), st.none() | st.text())
def test_text_is_null_only_for_null(title: str | None, description: str | None) -> None:
    text = assemble_text(title, description)
    assert (text is None) == (title is None and description is None)
    if text:
        assert text == text.strip()
        assert ".. " not in text or any(".." in part for part in (title, description) if part)


def _read(folder: Path, **kwargs: object) -> list[Product]:
    catalog = open_catalog(str(folder), AUTO, COLUMNS)
    found = [read_products(catalog, partition, RowPlan(), **kwargs) for partition in catalog.partitions]  # type: ignore[arg-type]
    return [product for batches in found for products, _ in batches for product in products]


def test_both_shapes_are_found(tmp_path: Path) -> None:
    products = items(5)
    by_product = open_catalog(str(write_products(tmp_path / "a", [products])), AUTO, COLUMNS)
    by_image = open_catalog(str(write_images(tmp_path / "b", products, files=2, seed=0)), AUTO, COLUMNS)
    assert (by_product.shape, by_image.shape) == ("product", "image")
    assert by_product.has_ordinals
    assert by_image.has_ordinals
    assert [p.rows for p in by_image.partitions] == [5, 5]


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
def test_rows_are_read_in_order_whatever_the_batch(tmp_path: Path, batch_rows: int) -> None:
    folder = write_products(tmp_path, [items(7), items(4, seed=1)])
    products = _read(folder, batch_rows=batch_rows)
    assert [p.product_id for p in products] == [i.product_id for i in items(7) + items(4, seed=1)]
    assert [p.row for p in products] == [*range(7), *range(4)]
    assert [len(p.images) for p in products] == [2] * 11
    assert products[3].metadata["title"] == "title 3 of 0"


def test_a_large_file_is_cut_at_row_groups(tmp_path: Path) -> None:
    table = pa.table({"product_id": [str(i) for i in range(100)], "title": ["x" * i for i in range(100)]})
    pq.write_table(table, tmp_path / "all.parquet", row_group_size=10)
    whole = open_catalog(str(tmp_path), AUTO, COLUMNS).partitions
    cut = open_catalog(str(tmp_path), CatalogConfig(partition_bytes=600), COLUMNS).partitions
    assert len(whole) == 1
    assert len(cut) > 3
    assert cut[1].name.startswith(f"{tmp_path}/all.parquet#")
    assert [p.first_row for p in cut] == [sum(p.rows for p in cut[:i]) for i in range(len(cut))]
    catalog = open_catalog(str(tmp_path), CatalogConfig(partition_bytes=600), COLUMNS)
    rows = [p.row for part in cut for products, _ in read_products(catalog, part, RowPlan()) for p in products]
    assert rows == list(range(100))


def test_integer_ids_become_decimal_digits(tmp_path: Path) -> None:
    pq.write_table(pa.table({"product_id": [7, 1234567890123], "title": ["a", "b"]}), tmp_path / "a.parquet")
    assert [p.product_id for p in _read(tmp_path)] == ["7", "1234567890123"]


def test_columns_are_mapped(tmp_path: Path) -> None:
    pq.write_table(pa.table({"sku": ["a"], "name": ["Hat"], "cost": [3]}), tmp_path / "a.parquet")
    columns = ColumnsConfig(product_id="sku", title="name", carried=("cost",))
    catalog = open_catalog(str(tmp_path), AUTO, columns)
    ((products, rejects),) = read_products(catalog, catalog.partitions[0], RowPlan())
    assert not rejects
    assert products[0].metadata == {
        "title": "Hat", "description": None, "broad_category": None, "fine_category": None, "cost": 3,
    }  # fmt: skip


def test_where_a_catalog_may_lie(tmp_path: Path) -> None:
    for day in ("day=1", "day=2"):
        write_products(tmp_path / day, [items(2)])
    (tmp_path / "_delta_log").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "_delta_log" / "checkpoint.parquet")
    (tmp_path / "README.txt").write_text("no data")

    def names(uri: str) -> list[str]:
        return [str(Path(p.name).relative_to(tmp_path)) for p in open_catalog(uri, AUTO, COLUMNS).partitions]

    assert names(str(tmp_path)) == ["day=1/part-00000.parquet", "day=2/part-00000.parquet"]
    assert names(f"{tmp_path}/day=2/*") == ["day=2/part-00000.parquet"]
    assert names(f"{tmp_path}/day=[2]") == ["day=2/part-00000.parquet"]
    assert names(f"{tmp_path}/**/part-*.parquet") == names(str(tmp_path))
    assert names(f"{tmp_path}/day=1/part-00000.parquet") == ["day=1/part-00000.parquet"]
    assert len(open_catalog(f"file://{tmp_path}", AUTO, COLUMNS).partitions) == 2


def _table(**columns: object) -> pa.Table:
    return pa.table({"product_id": ["a"], "title": ["t"], **columns})


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ([pa.table({"id": ["a"], "title": ["t"]})], "has no column 'product_id'"),
        (
            [pa.table({"product_id": [1.5], "title": ["t"]})],
            "'product_id' for product_id is double; expected string or",
        ),
        ([_table(images=[1])], "'images' for images is int64; expected binary or string"),
        ([pa.table({"product_id": ["a"], "title": [3]})], "'title' for title is int64; expected string"),
        ([pa.table({"product_id": ["a"]})], "neither a text column"),
        ([_table(), _table().set_column(0, "product_id", pa.array([1]))], "product ids are string in"),
        ([_table(images=[b"x"]), _table(images=[[b"x"]])], "one row per image and"),
        ([_table(description=["d"]), _table()], "has no column for description"),
        ([_table().slice(0, 0)], "has no rows"),
    ],
)
def test_a_wrong_schema_is_refused_by_name(tmp_path: Path, tables: list[pa.Table], said: str) -> None:
    for number, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"{number}.parquet")
    with pytest.raises(CatalogError) as caught:
        open_catalog(str(tmp_path), AUTO, COLUMNS)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_catalog_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="holds no Parquet file"):
        open_catalog(str(tmp_path), AUTO, COLUMNS)
    with pytest.raises(CatalogError, match="does not exist"):
        open_catalog(str(tmp_path / "nowhere"), AUTO, COLUMNS)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(CatalogError, match=r"a\.parquet is not a readable Parquet file"):
        open_catalog(str(tmp_path), AUTO, COLUMNS)
    with pytest.raises(CatalogError, match="cannot be listed"):
        open_catalog("nosuch://bucket/prefix", AUTO, COLUMNS)


def test_a_named_column_that_is_missing_is_refused(tmp_path: Path) -> None:
    pq.write_table(_table(), tmp_path / "a.parquet")
    with pytest.raises(CatalogError, match="has no column 'cost' named in"):
        open_catalog(str(tmp_path), AUTO, ColumnsConfig(carried=("cost",)))
    with pytest.raises(CatalogError, match="has no column 'photo' for images"):
        open_catalog(str(tmp_path), AUTO, ColumnsConfig(images="photo"))


@pytest.mark.parametrize("name", ["a.b", "a`b", "and", "not"])
def test_carried_columns_that_no_table_or_filter_can_name(tmp_path, name):
    pq.write_table(pa.table({"product_id": ["1"], "title": ["a"], name: [1]}), tmp_path / "a.parquet")
    with pytest.raises(CatalogError, match=r"columns\.carried has a name that"):
        open_catalog(str(tmp_path), AUTO, ColumnsConfig(carried=(name,)))


def damage(path: Path, row_group: int, column: int) -> None:
    """Overwrite the pages of one column chunk."""
    chunk = pq.ParquetFile(path).metadata.row_group(row_group).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(bytes(data))


def test_a_damaged_page_ends_its_partition_and_says_so(tmp_path: Path) -> None:
    table = pa.table({"product_id": [str(i) for i in range(30)], "title": [f"title {i}" for i in range(30)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    damage(tmp_path / "a.parquet", row_group=1, column=1)
    catalog = open_catalog(str(tmp_path), AUTO, COLUMNS)
    batches = list(read_products(catalog, catalog.partitions[0], RowPlan(), batch_rows=5))
    assert [p.row for products, _ in batches for p in products] == list(range(10))
    (reject,) = [reject for _, found in batches for reject in found]
    assert (reject.reason, reject.row) == (Reason.PARTITION_UNREADABLE, 10)
    assert "rows 10 to 29" in reject.detail


def test_rows_that_are_no_products(tmp_path: Path) -> None:
    bad = [Item(None, "t"), Item("  ", "t"), Item("ok", "t")]
    catalog = open_catalog(str(write_products(tmp_path, [bad])), AUTO, COLUMNS)
    ((products, rejects),) = read_products(catalog, catalog.partitions[0], RowPlan())
    assert [p.product_id for p in products] == ["ok"]
    assert [(r.row, r.reason) for r in rejects] == [(0, Reason.MISSING_ID), (1, Reason.MISSING_ID)]
