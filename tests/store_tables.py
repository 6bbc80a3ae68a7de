"""Small tables that pass verification, committed and released as a run does it, without a model or Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.store.commits import replace_all, replace_rows
from pipeline.store.indices import build_indices
from pipeline.store.releases import Release, newest_release, now, publish
from pipeline.store.schemas import (
    TABLES,
    catalog_rows_schema,
    images_schema,
    partitions_schema,
    products_schema,
    rejects_schema,
)
from pipeline.store.tables import Database, write_rows
from pipeline.store.verify import verify

DIM = 8
SCHEMAS = {
    "products": products_schema(DIM),
    "images": images_schema(DIM),
    "rejects": rejects_schema(),
    "partitions": partitions_schema(),
    "catalog_rows": catalog_rows_schema(),
}


def vectors(count: int, seed: int) -> np.ndarray:
    """float32 (count, DIM), unit L2 norm."""
    rows = np.random.default_rng(seed).normal(size=(count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def rows(ids: Sequence[str], *, seed: int = 0, title: str = "a coat") -> dict[str, pa.Table]:
    """Rows of the three tables: each product has a text and two images, and the first one a rejected third image."""
    texts, pictures = vectors(len(ids), seed), vectors(2 * len(ids), seed + 1)
    products, images = [], []
    for i, name in enumerate(ids):
        mine = pictures[2 * i : 2 * i + 2]
        image = mine.mean(axis=0) / np.linalg.norm(mine.mean(axis=0))
        average = (texts[i] + image) / np.linalg.norm(texts[i] + image)
        hashed = [f"{seed:032x}{2 * i + j:032x}" for j in range(2)]
        products.append(
            {"product_id": name, "title": title, "broad_category": "tops", "n_images": 2, "has_text": True,
             "text_vector": texts[i].tolist(), "image_vector": image.tolist(), "avg_vector": average.tolist(),
             "text_sha256": f"{seed:032x}{i:032x}", "images_sha256": hashed, "partition": "part"}
        )  # fmt: skip
        images += [
            {"image_id": f"{name}/{j}", "product_id": name, "ordinal": j, "sha256": hashed[j],
             "vector": mine[j].tolist(), "width_px": 10, "height_px": 10, "thumbnail": b"jpeg"}
            for j in range(2)
        ]  # fmt: skip
    reject = {"product_id": ids[0], "row": 0, "input": "image/2", "reason": "image_null", "partition": "part",
              "run_id": "r", "attempts": 1}  # fmt: skip
    counts = {"products": len(ids), "texts": len(ids), "images": 3 * len(ids), "rejected": 1, "rejected_rows": 0}
    partition = {"partition": "part", "digest": "d", "settings": "s", "rows": len(ids), "run_id": "r"} | counts
    catalog = [{"product_id": name, "partition": "part", "row": i, "digest": bytes(16)} for i, name in enumerate(ids)]
    tables = {"products": products, "images": images, "rejects": [reject], "partitions": [partition],
              "catalog_rows": catalog}  # fmt: skip
    return {name: pa.Table.from_pylist(tables[name], SCHEMAS[name]) for name in TABLES}


def write(db: Database, run_id: str, tables: Mapping[str, pa.Table], *, is_whole: bool = False) -> dict[str, int]:
    """Commit rows; returns the rows each table has to have."""
    expected = {}
    for name in TABLES:
        fragments = write_rows(db, name, SCHEMAS[name], tables[name], is_whole=is_whole)
        if is_whole:
            expected[name] = replace_all(db, name, SCHEMAS[name], fragments, run_id=run_id)
        else:
            keys = {"product_id": tables["products"]["product_id"].combine_chunks()}
            if name == "partitions":
                keys = {"partition": pa.array(["part"])}
            expected[name] = replace_rows(db, name, keys, fragments, run_id=run_id)
    return expected


def publish_latest(db: Database, run_id: str, index: Mapping[str, Any], checks: Mapping[str, Any]) -> Release:
    """A release of the latest versions."""
    parent = newest_release(db)
    number = parent.release if parent else None
    versions = {table: db.latest_version(table) for table in TABLES}
    release = Release(
        (number or 0) + 1, number, now(), versions, "demo", "m", "f", 0.5, index, {"products": 1}, checks
    )  # fmt: skip
    return publish(db, release, run_id=run_id)


def load(db: Database, run_id: str, ids: Sequence[str], *, seed: int = 0, title: str = "a coat", min_rows: int = 5000):
    """A whole run: commit, index, verify, publish."""
    tables = rows(ids, seed=seed, title=title)
    expected = write(db, run_id, tables, is_whole=newest_release(db) is None)
    index = build_indices(db.uri, min_rows=min_rows)
    checks = verify(db, index, expected_rows=expected)
    return publish_latest(db, run_id, index, checks)


def contents(db: Database, versions: Mapping[str, int] | None = None) -> dict[str, pa.Table]:
    """Every table, sorted by its key."""
    keys = {"products": "product_id", "images": "image_id", "rejects": "product_id", "partitions": "partition",
            "catalog_rows": "product_id"}  # fmt: skip
    return {
        name: db.dataset(name, versions[name] if versions else None).to_table().sort_by(keys[name]) for name in TABLES
    }
