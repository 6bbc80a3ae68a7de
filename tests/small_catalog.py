"""Small catalogs in both shapes, and tables read back in the form in which the design compares them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.store.tables import Database

FIELDS = ("product_id", "title", "description", "broad_category", "fine_category", "price")
PRODUCT_SCHEMA = pa.schema(
    [
        *[pa.field(name, pa.string()) for name in FIELDS[:-1]],
        pa.field("price", pa.float64()),
        pa.field("images", pa.list_(pa.binary())),
    ]
)


@dataclass
class Item:
    """A product as a test writes it."""

    product_id: str | None
    title: str | None = None
    description: str | None = None
    images: Sequence[bytes | str | None] | None = ()
    broad_category: str | None = "tops"
    fine_category: str | None = "shirts"
    price: float | None = 1.0
    more: dict[str, Any] = field(default_factory=dict)


def jpeg(seed: int, size: tuple[int, int] = (40, 48)) -> bytes:
    """A small photograph of nothing, another one for each seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def items(n: int = 10, *, images: int = 2, seed: int = 0) -> list[Item]:
    """Products with different texts and images; none is bad."""
    return [
        Item(
            f"p{seed}-{i:04d}",
            f"title {i} of {seed}",
            f"a wool coat number {i}",
            [jpeg(1000 * seed + 10 * i + j) for j in range(images)],
            price=float(i),
        )
        for i in range(n)
    ]


def write_products(folder: Path, groups: Sequence[Sequence[Item]], schema: pa.Schema = PRODUCT_SCHEMA) -> Path:
    """One row per product; each group is a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, group in enumerate(groups):
        rows = [{name: getattr(item, name, None) for name in schema.names} | item.more for item in group]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"part-{number:05d}.parquet")
    return folder


def write_images(folder: Path, products: Sequence[Item], *, files: int, seed: int, has_ordinal: bool = True) -> Path:
    """The same products as one row per image, shuffled over files."""
    rows = [
        {name: getattr(item, name) for name in FIELDS} | {"images": image, "image_ordinal": ordinal}
        for item in products
        for ordinal, image in enumerate(item.images or (None,))
    ]
    for row in rows:
        if row["images"] is None:
            row["image_ordinal"] = None
    np.random.default_rng(seed).shuffle(rows)  # type: ignore[arg-type]
    schema = pa.schema([*list(PRODUCT_SCHEMA)[:-1], pa.field("images", pa.binary())])
    if has_ordinal:
        schema = schema.append(pa.field("image_ordinal", pa.int64()))
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        table = pa.Table.from_pylist(rows[number::files], schema=schema)
        pq.write_table(table, folder / f"part-{number:05d}.parquet", row_group_size=7)
    return folder


def table(db: str | Path, name: str, version: int | None = None) -> pa.Table:
    """A table of a folder or URI at a version, sorted by its key."""
    found = Database(str(db)).dataset(name, version).to_table()
    keys = {"products": ["product_id"], "images": ["image_id"], "rejects": ["product_id", "input", "reason"]}
    return found.sort_by([(key, "ascending") for key in keys.get(name, [found.schema.names[0]])])


def assert_equal_tables(
    one: str | Path,
    other: str | Path,
    versions: Mapping[str, int] | None = None,
    other_versions: Mapping[str, int] | None = None,
) -> None:
    """The design's "equal tables": run-dependent columns left out, vectors within 1e-6, all else exact.

    Args:
        one: a database.
        other: another one.
        versions: of the first one's tables; None: the latest.
        other_versions: of the other's.
    """
    left_out = {
        "products": {"partition"},
        "images": set(),
        "rejects": {"partition", "row", "run_id", "attempts", "detail"},
    }
    for name, out in left_out.items():
        a, b = table(one, name, (versions or {}).get(name)), table(other, name, (other_versions or {}).get(name))
        columns = [column for column in a.schema.names if column not in out]
        assert columns == [column for column in b.schema.names if column not in out]
        assert a.num_rows == b.num_rows, name
        for column in columns:
            if column == "vector" or column.endswith("_vector"):
                assert_close(a.column(column), b.column(column), 1e-6)
            else:
                assert a.column(column).to_pylist() == b.column(column).to_pylist(), (name, column)


def assert_close(a: pa.ChunkedArray, b: pa.ChunkedArray, tolerance: float) -> None:
    """Two vector columns with the same nulls and nearly the same numbers."""
    x, y = a.combine_chunks(), b.combine_chunks()
    assert x.is_null().equals(y.is_null())
    if len(x.flatten()):
        assert float(np.abs(x.flatten().to_numpy() - y.flatten().to_numpy()).max()) <= tolerance


def vectors(column: pa.ChunkedArray) -> np.ndarray:
    """float64 (N, D); NaN rows for nulls."""
    return np.array([[np.nan] * column.type.list_size if v is None else v for v in column.to_pylist()])
