from __future__ import annotations

import json
import time
from pathlib import Path

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pytest
from query_tables import make_db, unit

from pipeline.store import indices
from pipeline.store.folding import MOST_SEGMENTS, fold_indices
from pipeline.store.indices import build_indices, k_means

DIM = 24


def clustered(folder, count, *, gap=0.8, seed=0, texts=True):
    """Overlapping clusters, with texts and images on two sides of a gap."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(count // 40, 2), DIM))[rng.integers(0, max(count // 40, 2), count)]
    away = gap * unit(rng.normal(size=(1, DIM))) * np.sqrt(DIM)
    text = unit(centres + rng.normal(size=(count, DIM)) + away)
    image = unit(centres + rng.normal(size=(count, DIM)) - away)
    has_image = rng.random(count) > 0.05
    return make_db(folder, text=text, image=image, has_text=np.full(count, texts), has_image=has_image | (not texts))


def names(db, table):
    return {(index.columns[0], index.index_type) for index in lancedb.connect(db).open_table(table).list_indices()}


def test_few_rows_are_searched_exactly_and_indexed_at_once(tmp_path):
    db = clustered(tmp_path, 200)
    started = time.perf_counter()
    built = build_indices(db)
    assert time.perf_counter() - started < 5  # 0.1 s alone
    assert {mode: index["kind"] for mode, index in built.items()} == dict.fromkeys(("text", "image", "avg"), "exact")
    assert built["text"]["rows"] == built["avg"]["rows"] == 200 > built["image"]["rows"]
    assert json.loads(json.dumps(built)) == built
    assert names(db, "products") == {
        ("product_id", "BTree"),
        ("text_sha256", "BTree"),
        ("title", "FTS"),
        ("description", "FTS"),
        ("broad_category", "Bitmap"),
        ("fine_category", "Bitmap"),
    }
    assert names(db, "images") == {("product_id", "BTree"), ("sha256", "BTree")}


def test_many_rows_get_an_index_that_reaches_its_recall(tmp_path):
    db = clustered(tmp_path, 4000)
    built = build_indices(db, min_rows=1000)
    for mode, index in built.items():
        assert index["kind"] == "ivf_sq"
        assert index["partitions"] == 16
        assert index["recall_at_10"] >= 0.99 or index["probes"] == 16
        statistics = lance.dataset(f"{db}/products.lance").stats.index_stats(f"{mode}_vector_idx")
        assert [part["num_partitions"] for part in statistics["indices"]] == [16]
        assert statistics["num_unindexed_rows"] == 0
    again = build_indices(db, min_rows=1000)
    assert again == built
    assert len(lancedb.connect(db).open_table("products").list_indices()) == 9


def test_an_index_leaves_when_the_rows_have_left(tmp_path):
    db = clustered(tmp_path, 1200)
    build_indices(db, min_rows=1000)
    lance.dataset(f"{db}/products.lance").delete("product_id >= 'p00100'")
    assert build_indices(db, min_rows=1000)["avg"]["kind"] == "exact"
    assert not any(kind == "IvfSq" for _, kind in names(db, "products"))


def test_measured_recall_is_the_recall_against_exact_search(tmp_path):
    """One probe of sixteen must be measured as what it is."""
    db = clustered(tmp_path, 3000)
    build_indices(db, min_rows=1000)
    table = lancedb.connect(db).open_table("products")
    one, all_ = (indices.probe_index(table, "image", partitions=n, min_recall=0) for n in (1, 16))
    assert one[0] == 1
    rows = table.to_arrow()
    texts = np.array([row for row in rows["text_vector"].to_pylist() if row], np.float32)
    shares = []
    for query in texts[:100]:
        search = table.search(query, vector_column_name="image_vector").distance_type("cosine").limit(10)
        exact = set(search.bypass_vector_index().to_arrow()["product_id"].to_pylist())
        search = table.search(query, vector_column_name="image_vector").distance_type("cosine").limit(10)
        shares.append(len(exact & set(search.nprobes(1).refine_factor(2).to_arrow()["product_id"].to_pylist())) / 10)
    assert one[2] == pytest.approx(np.mean(shares), abs=0.1)
    assert one[2] < all_[2]


def test_a_catalog_without_texts_is_measured_with_its_images(tmp_path):
    built = build_indices(clustered(tmp_path, 1500, texts=False), min_rows=1000)
    assert (built["text"]["kind"], built["text"]["rows"]) == ("exact", 0)
    assert built["image"]["kind"] == "ivf_sq"
    assert built["image"]["recall_at_10"] >= 0.99 or built["image"]["probes"] == 16


def test_centroids_are_units_and_none_is_lost():
    rng = np.random.default_rng(0)
    points = unit(np.repeat(rng.normal(size=(5, 8)), 20, axis=0))
    centroids = k_means(points, 7, rng)
    assert centroids.shape == (7, 8)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    assert ((points @ centroids.T).max(axis=1) > 0.999).sum() >= 60


def add_rows(db, count, seed):
    """More products of the same kind, as fragments that no index knows."""
    other = clustered(Path(db).parent / f"more-{seed}", count, seed=seed)
    rows = lance.dataset(f"{other}/products.lance").to_table()
    ids = pa.array([f"more-{seed}-{i}" for i in range(count)])
    rows = rows.set_column(rows.schema.get_field_index("product_id"), rows.schema.field("product_id"), ids)
    lance.write_dataset(rows, f"{db}/products.lance", mode="append")


def segments(db, name="avg_vector_idx"):
    statistics = lance.dataset(f"{db}/products.lance").stats.index_stats(name)
    assert statistics["num_unindexed_rows"] == 0
    return [part.get("num_partitions") for part in statistics["indices"]]


def test_new_rows_are_folded_in_until_it_is_time_to_build_anew(tmp_path):
    db = clustered(tmp_path / "db", 4000)
    index = build_indices(db, min_rows=1000)
    add_rows(db, 60, 1)
    folded = fold_indices(db, index, min_rows=1000)
    assert segments(db) == [16, 16]
    assert len(segments(db, "product_id_idx")) == 2
    assert (folded["avg"]["rows"], folded["avg"]["folded"], folded["avg"]["unmeasured"]) == (4060, 60, 60)
    assert folded["avg"]["recall_at_10"] == index["avg"]["recall_at_10"], "measured before, and still near enough"
    assert fold_indices(db, folded, min_rows=1000) == folded, "nothing new"
    add_rows(db, 200, 2)
    measured = fold_indices(db, folded, min_rows=1000)
    assert (measured["avg"]["folded"], measured["avg"]["unmeasured"]) == (260, 0)
    assert measured["avg"]["recall_at_10"] >= 0.99
    add_rows(db, 900, 3)
    anew = fold_indices(db, measured, min_rows=1000)
    assert segments(db) == [16]
    assert (anew["avg"]["folded"], anew["avg"]["rows"]) == (0, 5160)


def test_an_index_of_too_many_segments_is_built_anew(tmp_path):
    db = clustered(tmp_path / "db", 2000)
    index = build_indices(db, min_rows=1000)
    lengths = []
    for seed in range(1, MOST_SEGMENTS + 1):
        add_rows(db, 5, seed)
        index = fold_indices(db, index, min_rows=1000)
        lengths.append(len(segments(db)))
    assert lengths == [*range(2, MOST_SEGMENTS + 1), 1]
    assert len(segments(db, "product_id_idx")) <= MOST_SEGMENTS
