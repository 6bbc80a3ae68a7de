"""The demo catalog: drawn products as Parquet partitions, with the flaws that real catalogs have."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.catalog.demo_products import CATALOG_SEED, product, stream
from pipeline.catalog.demo_words import catalog_listing
from pipeline.records import Reason

PHOTO_PX = 256
_JPEG_QUALITY = 88
_CHUNK = 100
_FLAWS = {
    Reason.IMAGE_TRUNCATED: 0.004,
    Reason.IMAGE_NOT_AN_IMAGE: 0.003,
    Reason.IMAGE_EMPTY: 0.002,
    Reason.IMAGE_NULL: 0.002,
    Reason.TEXT_EMPTY: 0.002,
    Reason.MISSING_ID: 0.002,
    Reason.DUPLICATE_ID: 0.002,
    Reason.NO_TEXT_AND_NO_IMAGE: 0.002,
}
"""Share of products that bring along each flaw: an image more, a row more, or a blank text in place of theirs."""

SCHEMA = pa.schema(
    [
        pa.field("product_id", pa.string()),
        pa.field("title", pa.string()),
        pa.field("description", pa.string()),
        pa.field("broad_category", pa.string()),
        pa.field("fine_category", pa.string()),
        pa.field("price", pa.float64()),
        pa.field("size", pa.string()),
        pa.field("images", pa.list_(pa.binary())),
    ]
)


@dataclass(frozen=True)
class DemoManifest:
    """What was written, to be compared with what a backfill counts.

    Attributes:
        products: with at least one good input.
        rows: of the files, bad ones included.
        texts: text inputs, blank ones included.
        images: image inputs, bad and null ones included.
        bad: how many inputs and rows are bad, by the reason with which a backfill rejects them.
    """

    products: int
    rows: int
    texts: int
    images: int
    bad: Mapping[str, int]


def write_demo_catalog(
    folder: str | Path,
    *,
    products: int = 2000,
    seed: int = CATALOG_SEED,
    start: int = 0,
    partition_products: int = 500,
    has_flaws: bool = True,
    workers: int = 1,
) -> DemoManifest:
    """Draw products `start` to `start + products` of a seed, one row each, into `part-NNNNN.parquet` files.

    A product's row is a pure function of the seed and its index: the same whatever the range, the partitions and the
    number of workers. One partition is held in memory at a time.

    Args:
        folder: made if it is not there.
        products: how many.
        seed: of the endless catalog.
        start: index of the first product.
        partition_products: products per file.
        has_flaws: whether some products bring bad images and rows along.
        workers: processes that draw; 1 draws in this one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    chunks = [(seed, i, min(i + _CHUNK, start + products), has_flaws) for i in range(start, start + products, _CHUNK)]
    rows: list[dict[str, Any]] = []
    number = held = 0
    for drawn, flaws in _drawn(chunks, workers):
        rows += drawn
        held += _CHUNK
        bad.update(flaws)
        if held >= partition_products:
            _write(folder, number, rows, counts)
            rows, number, held = [], number + 1, 0
    if rows:
        _write(folder, number, rows, counts)
    return DemoManifest(products, counts["rows"], counts["texts"], counts["images"], dict(bad))


def demo_rows(seed: int, index: int, *, has_flaws: bool = True) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one product, bad ones that it brings along included, and the reasons a backfill will give."""
    item = product(seed, index)
    words = catalog_listing(seed, item)
    row: dict[str, Any] = {
        "product_id": item.product_id,
        "title": words.title,
        "description": words.description,
        "broad_category": item.broad,
        "fine_category": item.fine,
        "price": item.price,
        "size": item.size,
        "images": [demo_photo(seed, index, ordinal) for ordinal in range(item.n_images)],
    }
    rows, reasons = [row], []
    rng = stream(seed, index, "flaws")
    for reason, share in _FLAWS.items():
        if not has_flaws or rng.random() >= share:
            continue
        reasons.append(str(reason))
        empty = dict.fromkeys(SCHEMA.names)
        if reason == Reason.IMAGE_TRUNCATED:
            row["images"].append(row["images"][0][: len(row["images"][0]) // 2])
        elif reason == Reason.IMAGE_NOT_AN_IMAGE:
            row["images"].append(b"<html><title>404 Not Found</title></html>")
        elif reason == Reason.IMAGE_EMPTY:
            row["images"].append(b"")
        elif reason == Reason.IMAGE_NULL:
            row["images"].append(None)
        elif reason == Reason.TEXT_EMPTY:
            row |= {"title": " ", "description": None}
        elif reason == Reason.MISSING_ID:
            rows.append({**row, "product_id": None, "images": []})
        elif reason == Reason.DUPLICATE_ID:
            rows.append({**row, "images": row["images"][:1]})
        else:
            rows.append({**empty, "product_id": f"{item.product_id}-void", "images": []})
    return rows, reasons


def demo_photo(seed: int, index: int, ordinal: int) -> bytes:
    """One photo of a product, JPEG, 256 x 256 pixels."""
    from pipeline.catalog.demo_garments import draw_photo

    buffer = io.BytesIO()
    draw_photo(product(seed, index), seed, ordinal, PHOTO_PX).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _drawn(chunks: list[tuple[int, int, int, bool]], workers: int) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """The chunks' rows in order."""
    if workers <= 1:
        yield from map(_draw_chunk, chunks)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(_draw_chunk, chunks)


def _draw_chunk(chunk: tuple[int, int, int, bool]) -> tuple[list[dict[str, Any]], list[str]]:
    seed, first, stop, has_flaws = chunk
    drawn = [demo_rows(seed, index, has_flaws=has_flaws) for index in range(first, stop)]
    return [row for rows, _ in drawn for row in rows], [reason for _, reasons in drawn for reason in reasons]


def _write(folder: Path, number: int, rows: list[dict[str, Any]], counts: Counter[str]) -> None:
    """Write one partition, and count its inputs: those of rows that a backfill reads."""
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / f"part-{number:05d}.parquet", row_group_size=100)
    seen: set[str] = set()
    counts["rows"] += len(rows)
    for row in rows:
        if row["product_id"] is None or row["product_id"] in seen:
            continue
        seen.add(row["product_id"])
        counts["texts"] += row["title"] is not None or row["description"] is not None
        counts["images"] += len(row["images"])
