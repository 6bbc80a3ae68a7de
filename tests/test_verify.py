"""Every check that stands before a release finds its own fault, and nothing else is found."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from store_tables import DIM, SCHEMAS, load, publish_latest, rows, write

from pipeline.errors import ReleaseRefused
from pipeline.store import content as content_module
from pipeline.store.commits import replace_rows
from pipeline.store.indices import build_indices, measure_indices
from pipeline.store.releases import list_releases
from pipeline.store.tables import Database, write_rows
from pipeline.store.verify import verify

IDS = [f"p{number:02d}" for number in range(20)]


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database(str(tmp_path / "db"))


def change(table: pa.Table, name: str, values: dict[int, Any]) -> pa.Table:
    """A table with some rows' values of a column changed."""
    column = table[name].to_pylist()
    for row, value in values.items():
        column[row] = value
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(name), pa.array(column, table.schema.field(name).type))


def check(db: Database, tables: dict[str, pa.Table], **options: Any) -> dict[str, Any]:
    """Write the tables whole, index them, verify them."""
    write(db, "r1", tables, is_whole=True)
    return verify(db, build_indices(db.uri), **options)


UNIT = [1.0] + [0.0] * (DIM - 1)
FAULTS: dict[str, tuple[str, Callable[[dict[str, pa.Table]], dict[str, pa.Table]], str]] = {
    "NaN vector": (
        "products",
        lambda t: change(t["products"], "text_vector", {3: [float("nan"), *UNIT[1:]]}),
        "1 rows of products: text_vector is not a unit vector (p03)",
    ),
    "infinite vector": (
        "products",
        lambda t: change(t["products"], "avg_vector", {4: [float("inf"), *UNIT[1:]]}),
        "1 rows of products: avg_vector is not a unit vector (p04)",
    ),
    "vector of another length": (
        "products",
        lambda t: change(t["products"], "image_vector", {i: [1.002, *UNIT[1:]] for i in range(7)}),
        "7 rows of products: image_vector is not a unit vector (p00, p01, p02)",
    ),
    "zero image vector": (
        "images",
        lambda t: change(t["images"], "vector", {5: [0.0] * DIM}),
        "1 rows of images: vector is not a unit vector (p02/1)",
    ),
    "no average": (
        "products",
        lambda t: change(t["products"], "avg_vector", {3: None}),
        "1 rows of products: no avg_vector (p03)",
    ),
    "no image vector": (
        "images",
        lambda t: change(t["images"], "vector", {0: None}),
        "1 rows of images: no vector (p00/0)",
    ),
    "text without vector": (
        "products",
        lambda t: change(t["products"], "text_vector", {1: None}),
        "1 rows of products: has_text and text_vector disagree (p01)",
    ),
    "vector without text": (
        "products",
        lambda t: change(t["products"], "has_text", {1: False}),
        "1 rows of products: has_text and text_vector disagree (p01)",
    ),
    "text without hash": (
        "products",
        lambda t: change(t["products"], "text_sha256", {1: None}),
        "1 rows of products: has_text and text_sha256 disagree (p01)",
    ),
    "images without vector": (
        "products",
        lambda t: change(t["products"], "image_vector", {1: None}),
        "1 rows of products: n_images and image_vector disagree (p01)",
    ),
    "miscounted images": (
        "products",
        lambda t: change(t["products"], "n_images", {2: 3}),
        "1 products have another n_images than rows in images (p02)",
    ),
    "images without hashes": (
        "products",
        lambda t: change(t["products"], "images_sha256", {2: ["aa"]}),
        "1 rows of products: n_images and images_sha256 disagree (p02)",
    ),
    "duplicate product": (
        "products",
        lambda t: change(t["products"], "product_id", {2: "p01"}),
        "1 rows of products share their product_id (p01)",
    ),
    "duplicate image": (
        "images",
        lambda t: change(change(t["images"], "image_id", {1: "p00/0"}), "ordinal", {1: 0}),
        "1 rows of images share their image_id (p00/0)",
    ),
    "image without product": (
        "images",
        lambda t: change(change(t["images"], "product_id", {4: "zz"}), "image_id", {4: "zz/0"}),
        "1 products of images are not in products (zz)",
    ),
    "image of another name": (
        "images",
        lambda t: change(t["images"], "image_id", {4: "else"}),
        "1 rows of images: image_id is not product_id/ordinal (else)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_rows_is_found(db: Database, fault: str) -> None:
    table, spoil, sentence = FAULTS[fault]
    tables = rows(IDS)
    tables[table] = spoil(tables)
    with pytest.raises(ReleaseRefused, match=re.escape(sentence)) as refused:
        check(db, tables)
    assert "do not pass verification, nothing is released" in str(refused.value)


def test_tables_that_are_right_pass_with_their_figures(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"products": 20, "images": 40, "rejects": 1}
    checks = check(db, rows(IDS), expected_rows=expected)
    assert {name: checks[name] for name in expected} == expected
    assert (checks["distinct_product_ids"], checks["distinct_image_ids"]) == (20, 40)
    assert (checks["images_of_products"], checks["images_without_product"], checks["texts"]) == (40, 0, 20)
    assert checks["vectors"] == {"text_vector": 20, "image_vector": 20, "avg_vector": 20}
    assert checks["content"] == f"{content_module.content_digest(db.dataset('products').to_table()):032x}"
    assert checks["recall_at_10"] == {"text": 1.0, "image": 1.0, "avg": 1.0}
    monkeypatch.setattr(content_module, "_BATCH_ROWS", 3)
    assert verify(db, build_indices(db.uri)) == checks, "batches make no difference"


def test_products_of_one_kind_of_input_pass(db: Database) -> None:
    tables = rows(IDS)
    for name, value in (("image_vector", None), ("n_images", 0), ("images_sha256", [])):
        tables["products"] = change(tables["products"], name, dict.fromkeys(range(20), value))
    tables["images"] = tables["images"].slice(0, 0)
    assert check(db, tables)["images"] == 0


def test_all_faults_are_told_at_once(db: Database) -> None:
    tables = rows(IDS)
    tables["products"] = change(tables["products"], "avg_vector", {3: None})
    tables["images"] = change(tables["images"], "vector", {0: None})
    with pytest.raises(ReleaseRefused) as refused:
        check(db, tables, expected_rows={"products": 21, "images": 40})
    message = str(refused.value)
    assert "products has 20 rows, expected 21" in message
    assert "no avg_vector (p03)" in message
    assert "images: no vector (p00/0)" in message
    assert "images has" not in message


def test_null_keys_and_strange_columns_are_found(db: Database) -> None:
    write(db, "r1", rows(IDS), is_whole=True)
    uri = db.uri_of("images")
    images = rows(IDS)["images"]
    loose = pa.schema([field.with_nullable(True).remove_metadata() for field in images.schema])
    lance.write_dataset(change(images.cast(loose), "sha256", {2: None}), uri, mode="overwrite")
    lance.dataset(db.uri_of("products")).drop_columns(["has_text"])
    lance.dataset(db.uri_of("rejects")).alter_columns({"path": "attempts", "data_type": pa.int64()})
    with pytest.raises(ReleaseRefused) as refused:
        verify(db, {})
    for sentence in ("images.sha256 is null in 1 rows", "products.has_text is missing, expected bool",
                     "rejects.attempts is int64, expected int32"):  # fmt: skip
        assert sentence in str(refused.value)


def damaged(db: Database, pattern: str, damage: Callable[[Path], object]) -> str:
    """The refusal after something happened to one of the files."""
    index = build_indices(db.uri, min_rows=16)
    verify(db, index, min_recall=0)
    damage(max(Path(db.uri).glob(pattern), key=lambda path: path.stat().st_mtime_ns))
    with pytest.raises(ReleaseRefused) as refused:
        verify(db, index, min_recall=0)
    return str(refused.value)


@pytest.mark.parametrize(
    ("pattern", "damage", "sentence"),
    [
        ("products.lance/data/*", Path.unlink, r"products: the data file data/\w+.lance is missing"),
        ("images.lance/data/*", lambda path: path.write_bytes(path.read_bytes()[:-9]),
         r"images: the data file data/\w+.lance has [\d,]+ bytes, not [\d,]+"),
        ("rejects.lance/data/*", lambda path: path.write_bytes(b""), r"rejects: the data file .* has 0 bytes"),
        ("products.lance/_deletions/*", Path.unlink, r"products: the deletion file _deletions/.* is missing"),
        ("products.lance/_indices/*", shutil.rmtree, r"products: the index \w+ in _indices/.*/ has 0 bytes"),
        ("products.lance/_indices/*/auxiliary.idx", Path.unlink, r"the index \w+_vector_idx in _indices/.*/ has"),
    ],
)  # fmt: skip
def test_files_that_are_gone_or_cut_short_are_found(
    db: Database, pattern: str, damage: Callable[[Path], object], sentence: str
) -> None:
    write(db, "r1", rows(IDS), is_whole=True)
    write(db, "r1", rows(IDS[:3], seed=5))
    assert re.search(sentence, damaged(db, pattern, damage))


def indexed(db: Database, count: int = 1500) -> dict[str, dict[str, Any]]:
    write(db, "r1", rows([f"p{number:04d}" for number in range(count)]), is_whole=True)
    return build_indices(db.uri, min_rows=1000)


def test_an_index_that_lacks_rows_is_found(db: Database) -> None:
    index = indexed(db)
    verify(db, index)
    more = rows(["new1", "new2"], seed=7)
    for table in ("products", "images"):
        fragments = write_rows(db, table, SCHEMAS[table], more[table], is_whole=False)
        replace_rows(db, table, {"product_id": pa.array(["x"])}, fragments, run_id="r1")
    with pytest.raises(ReleaseRefused) as refused:
        verify(db, index)
    for sentence in ("the index avg_vector_idx of products lacks 2 rows", "product_id_idx of products lacks 2 rows",
                     "sha256_idx of images lacks 4 rows", "text index was made for 1,500 vectors"):  # fmt: skip
        assert sentence in str(refused.value)


def test_an_index_that_is_not_as_asked_for_is_found(db: Database) -> None:
    index = indexed(db)

    def refusal(**changes: Any) -> str:
        with pytest.raises(ReleaseRefused) as refused:
            verify(db, {**index, "avg": index["avg"] | changes})
        return str(refused.value)

    assert "has [16] partitions, asked for were 32" in refusal(partitions=32)
    assert "the avg index reaches recall@10 0.500 with" in refusal(recall_at_10=0.5)
    assert "the avg index reaches" in refusal(recall_at_10=float("nan"))
    assert "there is an index avg_vector_idx, though avg is to be searched exactly" in refusal(kind="exact")
    lance.dataset(db.uri_of("products")).drop_index("avg_vector_idx")
    lance.dataset(db.uri_of("products")).drop_index("text_sha256_idx")
    message = refusal()
    assert "the index avg_vector_idx is missing" in message
    assert "products.text_sha256 has no index" in message


def test_probes_then_candidates_are_raised_until_the_floor_is_met(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.store import indices

    asked: list[tuple[int, int]] = []

    def recall(*arguments: Any) -> float:
        asked.append(arguments[-2:])
        return 0.98 if arguments[-2:] != (16, 8) else 0.992

    monkeypatch.setattr(indices, "_recall", recall)
    index = indexed(db)
    assert asked[:4] == [(8, 2), (16, 2), (16, 4), (16, 8)]
    assert (index["avg"]["probes"], index["avg"]["refine"], index["avg"]["recall_at_10"]) == (16, 8, 0.992)
    monkeypatch.setattr(indices, "_recall", lambda *_: 0.9)
    assert (build_indices(db.uri, min_rows=1000)["avg"]["refine"]) == 16


def test_indices_are_measured_as_they_were_built(db: Database) -> None:
    index = indexed(db)
    version = db.latest_version("products")
    replace_rows(db, "products", {"product_id": pa.array(["p0000"])}, [], run_id="r1")
    assert measure_indices(db.uri, version) == index
    assert np.isclose(index["image"]["recall_at_10"], 1, atol=0.01)


def test_older_versions_can_be_verified(db: Database) -> None:
    load(db, "r1", IDS)
    checks = list_releases(db)[0].checks
    versions = dict(list_releases(db)[0].versions)
    write(db, "r2", rows(["p00", "q"], seed=4))
    index = measure_indices(db.uri, versions["products"])
    assert verify(db, index, versions=versions) == checks
    publish_latest(db, "r2", index, {})
