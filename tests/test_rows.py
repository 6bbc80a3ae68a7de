from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_catalog import Item, items, jpeg, write_images, write_products

from pipeline.catalog.partitions import Catalog, open_catalog
from pipeline.config import CatalogConfig, ColumnsConfig
from pipeline.records import Reason
from pipeline.run.rows import plan_rows


def _open(folder: Path) -> Catalog:
    return open_catalog(str(folder), CatalogConfig(), ColumnsConfig())


def test_a_clean_catalog_needs_no_row_plan(tmp_path: Path) -> None:
    plan = plan_rows(_open(write_products(tmp_path, [items(4), items(3, seed=1)])))
    assert plan.rows == {}
    assert plan.products == 7
    assert plan.total_rows == 7


def test_the_first_row_of_an_id_wins_across_files(tmp_path: Path) -> None:
    a, b = items(3), items(3)
    catalog = _open(write_products(tmp_path, [a, [*b[:1], Item("new", "t")]]))
    plan = plan_rows(catalog)
    (later,) = plan.rows
    assert later == catalog.partitions[1].name
    assert set(plan.rows[later].rejected) == {0}
    reason, detail = plan.rows[later].rejected[0]
    assert reason == Reason.DUPLICATE_ID
    assert catalog.partitions[0].name in detail
    assert plan.products == 4


def test_a_later_row_of_the_image_shape_is_one_more_image_or_a_conflict(tmp_path: Path) -> None:
    rows = [
        {"product_id": "a", "title": "one", "description": None, "images": jpeg(0), "image_ordinal": 0},
        {"product_id": "a", "title": "one", "description": None, "images": jpeg(1), "image_ordinal": 1},
        {"product_id": "a", "title": "two", "description": None, "images": jpeg(2), "image_ordinal": 2},
        {"product_id": "a", "title": None, "description": None, "images": jpeg(3), "image_ordinal": 3},
        {"product_id": "a", "title": "one", "description": None, "images": jpeg(4), "image_ordinal": 1},
        {"product_id": "a", "title": "one", "description": "more", "images": jpeg(5), "image_ordinal": 4},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    catalog = _open(tmp_path)
    (plan,) = plan_rows(catalog).rows.values()
    assert plan.followers.tolist() == [1, 3]
    assert {row: reason for row, (reason, _) in plan.rejected.items()} == dict.fromkeys(
        (2, 4, 5), Reason.CONFLICTING_ROW
    )
    assert "title differ" in plan.rejected[2][1]
    assert "image_ordinal 1" in plan.rejected[4][1]


@pytest.mark.parametrize("limit", [1, 4, 7, 100])
def test_a_limit_takes_whole_products_from_the_front(tmp_path: Path, limit: int) -> None:
    catalog = _open(write_images(tmp_path, items(7, images=3), files=3, seed=5))
    plan = plan_rows(catalog, limit=limit)
    ids = {p.name: pq.read_table(p.path).column("product_id").to_pylist() for p in catalog.partitions}
    kept = set(list(dict.fromkeys(i for p in catalog.partitions for i in ids[p.name]))[:limit])
    assert plan.products == len(kept) == min(limit, 7)
    for partition in catalog.partitions:
        skipped = plan.rows_of(partition.name).skipped.tolist()
        assert {i for row, i in enumerate(ids[partition.name]) if row not in skipped} <= kept
        assert all(ids[partition.name][row] not in kept for row in skipped)
        assert (partition.name in plan.pending) == (len(skipped) < partition.rows)


def test_any_shuffle_settles_every_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 40, 300).astype(str)
    for number, part in enumerate(np.array_split(ids, 5)):
        titles = [f"of {i}" for i in part]
        pq.write_table(
            pa.table({"product_id": part, "title": titles, "images": [[b"x"]] * len(part)}),
            tmp_path / f"{number}.parquet",
        )
    catalog = _open(tmp_path)
    plan = plan_rows(catalog)
    rejected = sum(len(p.rejected) for p in plan.rows.values())
    assert rejected == 300 - len(set(ids))
    assert plan.products == len(set(ids))
