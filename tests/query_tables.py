"""A small released database for the tests of search: real Lance tables with drawn vectors and real JPEG thumbnails."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pipeline.store.schemas import images_schema, products_schema, rejects_schema, releases_schema

DIM = 16
CARRIED = [
    pa.field("price", pa.float64()),
    pa.field("weight", pa.float32()),
    pa.field("stock", pa.int64()),
    pa.field("on_sale", pa.bool_()),
    pa.field("listed", pa.date32()),
    pa.field("changed", pa.timestamp("us", tz="UTC")),
    pa.field("cost", pa.decimal128(10, 2)),
    pa.field("Shop name", pa.string()),
    pa.field("tags", pa.list_(pa.string())),
    pa.field("sizes", pa.list_(pa.int32())),
    pa.field("seen", pa.timestamp("ms", tz="Europe/Berlin")),
]
PINNED = ("products", "images", "rejects")
EXACT = {
    mode: {"kind": "exact", "rows": 0, "partitions": 0, "probes": 0, "refine": 2} for mode in ("text", "image", "avg")
}


_TAGS: list[list[str | None]] = [["a"], [], ["silk", "it's 100% silk_"], [None, "a"], ["x' OR '1'='1", "a, silk"]]


def unit(rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def column(rows: npt.NDArray[np.float32], present: npt.NDArray[np.bool_]) -> pa.Array:
    """A vector column with nulls."""
    values = pa.array(rows.astype(np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(values, rows.shape[1], mask=pa.array(~present))


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (90, 120)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "JPEG")
    return out.getvalue()


def facts(count: int) -> dict[str, list[Any]]:
    """Plain columns with nulls in them, as lists."""
    titles = ["red dress", "blue dress", "it's 100% silk_", None, "a \\ b", 'O\'Neill "coat"', "", "x' OR '1'='1"]
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return {
        "product_id": [f"p{i:05d}" for i in range(count)],
        "title": [titles[i % 8] for i in range(count)],
        "description": [f"description {i}" for i in range(count)],
        "broad_category": [("dress", "top", "skirt")[i % 3] for i in range(count)],
        "fine_category": [f"fine {i % 7}" for i in range(count)],
        "price": [None if i % 5 == 0 else i * 1.5 - 20 for i in range(count)],
        "weight": [None if i % 6 == 0 else float(np.float32(i / 10)) for i in range(count)],
        "stock": [None if i % 4 == 0 else i - 10 for i in range(count)],
        "on_sale": [None if i % 7 == 0 else i % 2 == 0 for i in range(count)],
        "listed": [None if i % 9 == 0 else date(2026, 1, 1) + timedelta(days=i) for i in range(count)],
        "changed": [None if i % 8 == 0 else start + timedelta(hours=i) for i in range(count)],
        "cost": [None if i % 3 == 0 else Decimal(i) / 4 for i in range(count)],
        "Shop name": [None if i % 2 else f"shop {i % 5}" for i in range(count)],
        "tags": [None if i % 3 == 0 else _TAGS[i % 5] for i in range(count)],
        "sizes": [None if i % 7 == 0 else [*range(36, 36 + i % 4)] for i in range(count)],
        "seen": [None if i % 5 == 0 else start + timedelta(hours=2 * i) for i in range(count)],
    }


def make_db(
    folder: Path,
    *,
    text: npt.NDArray[np.float32],
    image: npt.NDArray[np.float32],
    has_text: npt.NDArray[np.bool_] | None = None,
    has_image: npt.NDArray[np.bool_] | None = None,
    columns: Mapping[str, list[Any]] | None = None,
) -> str:
    """Write products, images and rejects; `release` makes them visible."""
    count, dim = text.shape
    has_text = np.ones(count, bool) if has_text is None else has_text
    has_image = np.ones(count, bool) if has_image is None else has_image
    average = unit(np.where(has_text[:, None], text, 0) + np.where(has_image[:, None], image, 0) + 1e-9)
    plain = {**facts(count), **(columns or {})}
    schema = products_schema(dim, CARRIED)
    products = pa.table(
        {
            **plain,
            "text_vector": column(text, has_text),
            "image_vector": column(image, has_image),
            "avg_vector": column(average, has_text | has_image),
            "n_images": has_image.astype(np.int32),
            "has_text": has_text,
            "text_sha256": [f"{i:064x}" for i in range(count)],
            "images_sha256": [[f"{i:064x}"] for i in range(count)],
            "partition": ["part"] * count,
        },
        schema=schema,
    )
    pictured = np.flatnonzero(has_image)
    images = [
        {
            "image_id": f"{plain['product_id'][i]}/{ordinal}",
            "product_id": plain["product_id"][i],
            "ordinal": ordinal,
            "sha256": f"{i:064x}",
            "vector": image[i].tolist(),
            "width_px": 90,
            "height_px": 120,
            "thumbnail": jpeg((int(i) * 7 % 256, 200 if ordinal else 20, 90)),
        }
        for i in pictured
        for ordinal in (1, 0)
    ]
    lance.write_dataset(products, str(folder / "products.lance"))
    lance.write_dataset(pa.Table.from_pylist(images, images_schema(dim)), str(folder / "images.lance"))
    lance.write_dataset(rejects_schema().empty_table(), str(folder / "rejects.lance"))
    return str(folder)


def release(
    db: str,
    number: int = 1,
    *,
    index: Mapping[str, Any] | None = None,
    model: str = "demo",
    model_id: str = "a model",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a release row that pins the latest versions."""
    versions = {f"{name}_version": lance.dataset(f"{db}/{name}.lance").version for name in PINNED}
    row = {
        "release": number,
        "parent": number - 1 or None,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        **versions,
        "model": model,
        "model_id": model_id,
        "fingerprint": "a fingerprint",
        "model_settings": json.dumps(settings or {}),
        "average_text_weight": 0.5,
        "index": json.dumps(index or EXACT),
        "counts": "{}",
        "checks": "{}",
        "schema_version": 1,
    }
    lance.write_dataset(
        pa.Table.from_pylist([row], releases_schema()),
        f"{db}/releases.lance",
        mode="append" if number > 1 else "create",
    )


def random_db(folder: Path, count: int = 60, *, dim: int = DIM, seed: int = 0, **options: Any) -> str:
    """A released database of drawn vectors; some products without text, some without images."""
    rng = np.random.default_rng(seed)
    has_text, has_image = rng.random(count) > 0.1, rng.random(count) > 0.1
    has_text |= ~has_image
    text, image = unit(rng.normal(size=(count, dim))), unit(rng.normal(size=(count, dim)))
    db = make_db(folder, text=text, image=image, has_text=has_text, has_image=has_image)
    release(db, **options)
    return db
