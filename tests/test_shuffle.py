"""Rows dealt out to buckets: all of them, each once, whole products together, however small the pieces are."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import S3Server
from small_catalog import Item, assert_equal_tables, items, jpeg, write_images, write_products

from pipeline.config import load_config
from pipeline.errors import RunError
from pipeline.records import Product, Reason, Rejected
from pipeline.run import load, shuffle
from pipeline.run.backfill import backfill
from pipeline.run.partition import Staged
from pipeline.run.reduce import Reduction, reduce_products
from pipeline.run.scan import METADATA
from pipeline.run.shuffle import Dealt, bucket_count, deal, read_bucket, read_staged_rows
from pipeline.run.staging import EmbeddedInput, SeenRow, StagedWriter, staged_schema
from pipeline.store.tables import Database

DIM = 4

FILES = st.lists(
    st.lists(st.tuples(st.sampled_from("abcdefghij"), st.sampled_from(["vector", "reject", "seen"])), max_size=12),
    min_size=1,
    max_size=4,
)


def write(folder: Path, number: int, rows: list[tuple[str, str]]) -> Staged:
    """A staged file with inputs, rejects and seen rows of some products, and one row that has no id."""
    path = folder / f"{number}.parquet"
    rng = np.random.default_rng(number)
    with StagedWriter(str(path), staged_schema(DIM, []), []) as writer:
        for row, (product_id, kind) in enumerate(rows):
            vector = rng.normal(size=DIM).astype(np.float32)
            place = (product_id, row, "image", row)
            writer.write(
                [],
                [EmbeddedInput(*place, f"{row:064x}", vector)] if kind == "vector" else [],
                [Rejected(*place[:2], "image", Reason.IMAGE_CORRUPT, "d", row)] if kind == "reject" else [],
                [SeenRow(product_id, row, b"x" * 16)] if kind == "seen" else [],
            )
        writer.write([], [], [Rejected(None, 99, "row", Reason.MISSING_ID, "d")])
    return Staged(str(path), f"part {number}")


def bucket_from(files: list[Dealt], bucket: int) -> pa.Table:
    return read_bucket([(file.path, file.pieces[:, bucket]) for file in files])


def plain(rows: pa.Table) -> Counter[str]:
    """Rows as they can be counted."""
    return Counter(map(repr, rows.to_pylist()))


@settings(max_examples=60, deadline=None)
@given(FILES, st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 300, 10**6]))
def test_every_row_is_in_the_one_bucket_of_its_product(
    tmp_path_factory: pytest.TempPathFactory, files: list[Any], buckets: int, groups: int, handful: int
) -> None:
    folder = tmp_path_factory.mktemp("deal")
    sources = [write(folder, number, rows) for number, rows in enumerate(files)]
    before = shuffle._DEALT_BYTES, shuffle._LEAST_PIECE_BYTES
    shuffle._DEALT_BYTES = shuffle._LEAST_PIECE_BYTES = handful
    try:
        dealt = [deal(sources[at::groups], [], buckets, str(folder)) for at in range(groups)]
    finally:
        shuffle._DEALT_BYTES, shuffle._LEAST_PIECE_BYTES = before
    found = [bucket_from(dealt, bucket) for bucket in range(buckets)]
    assert sum(map(plain, found), Counter()) == plain(read_staged_rows(sources, []))
    assert sum(rows.num_rows for rows in found) == sum(kind != "seen" for rows in files for _, kind in rows)
    ids = [set(rows.column("product_id").to_pylist()) if rows.num_rows else set() for rows in found]
    assert sum(map(len, ids)) == len(set().union(*ids))
    shutil.rmtree(folder)


def test_carried_categories_may_differ_from_file_to_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "_DEALT_BYTES", 1)
    monkeypatch.setattr(shuffle, "_LEAST_PIECE_BYTES", 1)
    carried = (pa.field("brand", pa.dictionary(pa.int32(), pa.string())),)
    sources = []
    for number in range(3):
        path = str(tmp_path / f"{number}.parquet")
        product_id, vector = f"p{number}", np.full(DIM, 0.5, np.float32)
        metadata = dict.fromkeys(METADATA) | {"brand": f"brand {number}"}
        with StagedWriter(path, staged_schema(DIM, carried), carried) as writer:
            writer.write(
                [Product(product_id, 0, True, "t", (), metadata)],
                [EmbeddedInput(product_id, 0, "text", None, "ab", vector)],
                [],
            )
        sources.append(Staged(path, path))
    dealt = deal(sources, carried, 2, str(tmp_path))
    assert len(dealt.pieces) == 3
    how = Reduction(DIM, carried, 0.5, has_ordinals=True)
    found = [
        row for bucket in range(2) for row in reduce_products(bucket_from([dealt], bucket), how).products.to_pylist()
    ]
    assert {row["product_id"]: row["brand"] for row in found} == {
        f"p{number}": f"brand {number}" for number in range(3)
    }


def test_pieces_on_a_store(s3: S3Server, tmp_path: Path) -> None:
    s3.make_bucket("dealt")
    sources = [write(tmp_path, number, [(name, "vector") for name in "abcdef"]) for number in range(2)]
    dealt = deal(sources, [], 3, "s3://dealt/staging")
    found = [bucket_from([dealt], bucket) for bucket in range(3)]
    assert sum(map(plain, found), Counter()) == plain(read_staged_rows(sources, []))


def test_buckets_grow_in_number_and_not_in_size() -> None:
    assert bucket_count(0, 768) == bucket_count(10_000, 768) == 1
    per_bucket = [inputs / bucket_count(inputs, 768) for inputs in (10**6, 10**7, 10**8)]
    assert max(per_bucket) < 1.1 * min(per_bucket)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damage_is_an_error_in_a_sentence_and_never_another_product(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    dealt = deal([write(folder, 0, [("a", "vector"), ("b", "vector")])], [], 1, str(folder))
    whole = Path(dealt.path).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :]
    Path(dealt.path).write_bytes(data.draw(st.sampled_from([whole[:at], flipped])))
    with pytest.raises(RunError, match=r"\.arrow, which this run wrote a moment ago, cannot be read"):
        bucket_from([dealt], 0)
    Path(dealt.path).unlink()
    with pytest.raises(RunError, match="cannot be read"):
        bucket_from([dealt], 0)
    shutil.rmtree(folder)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("layout", ["products", "images", "images without ordinal"])
def test_tables_are_the_same_by_however_many_buckets(
    layout: str, tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = [*items(14, images=3), Item("odd", "text", None, [jpeg(1), b"broken"]), Item("empty", None, None, [])]
    if layout == "products":
        catalog = write_products(tmp_path / "catalog", [products[:6], products[6:]])
    else:
        catalog = write_images(tmp_path / "catalog", products, files=3, seed=0, has_ordinal=layout == "images")
    dbs = []
    for name, brief, bucket_bytes, per_task in (("one", 10**6, 10**9, 10**6), ("many", 0, 12_000, 4)):
        monkeypatch.setattr(load, "BRIEF_INPUTS", brief)
        monkeypatch.setattr(shuffle, "_BUCKET_BYTES", bucket_bytes)
        monkeypatch.setattr(shuffle, "_PRODUCTS_PER_TASK", per_task)
        config = load_config(
            None, ["pool.gpus_per_actor=0", "max_reject_share=0.5"], catalog_uri=str(catalog),
            db=str(tmp_path / name), model_name=tiny_model,
        )  # fmt: skip
        report = backfill(config)
        assert report["released"]
        dbs.append(tmp_path / name)
    assert len(Database(str(dbs[0])).dataset("products").get_fragments()) == 1
    assert 2 <= len(Database(str(dbs[1])).dataset("products").get_fragments()) <= 4
    assert_equal_tables(*dbs)
    assert not list((dbs[1] / "_staging").rglob("*.arrow"))
