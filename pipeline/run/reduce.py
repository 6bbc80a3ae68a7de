"""A product's vectors to its text, image and average vector: staged rows in, rows of the tables out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.paths import resolve
from pipeline.records import Reason
from pipeline.run.partition import Staged
from pipeline.run.scan import METADATA
from pipeline.run.staging import read_staged
from pipeline.store.schemas import images_schema, products_schema, rejects_schema

_REJECTS = ("product_id", "row", "kind", "ordinal", "sha256", "reason", "detail")
_SMALLEST_NORM = 1e-12
_PRODUCTS_AT_ONCE = 512


@dataclass(frozen=True)
class Reduction:
    """How products are made: what all buckets of a run share."""

    dim: int
    carried: tuple[pa.Field, ...]
    text_weight: float
    has_ordinals: bool


@dataclass(frozen=True)
class Reduced:
    """What a bucket gives.

    Attributes:
        products: rows of the products table, sorted by product_id.
        ids: every product id that the bucket holds, those without a usable input included.
        empty: (product_id, partition, row) of products without a single input.
        ordinals: partition, row and ordinal of images that their hash puts in place; None where the catalog does.
    """

    products: pa.Table
    ids: pa.Array
    empty: list[tuple[str, str, int]]
    ordinals: pa.Table | None


def reduce_products(rows: pa.Table, how: Reduction) -> Reduced:
    """Average each product's unit vectors.

    image_vector = unit(mean of the product's unit image vectors); avg_vector = unit(w * text_vector + (1 - w) *
    image_vector). A product with one modality has null for the other, and its average is the vector it has. Sums are
    taken in float64 in the order of the ordinals, so that the same inputs give the same bits.

    Args:
        rows: of whole products, from `shuffle.read_bucket` or `read_staged_rows`, in any order.
        how: dimension, weights and carried columns.
    """
    schema = products_schema(how.dim, how.carried)
    if not rows.num_rows:
        return Reduced(schema.empty_table(), pa.array([], pa.string()), [], None)
    ids = pc.unique(rows.column("product_id")).sort()
    codes = pc.index_in(rows.column("product_id"), ids).to_numpy().astype(np.int64)
    is_row, is_text, is_image = (pc.equal(rows.column("kind"), kind).to_numpy() for kind in ("row", "text", "image"))
    is_good = pc.is_null(rows.column("reason")).to_numpy()
    texts = np.flatnonzero(is_text & is_good)
    images, ordinals = _order_images(rows, codes, np.flatnonzero(is_image), is_good, how.has_ordinals)
    text_vectors, image_vectors, average = _average_all(rows, texts, images, codes, len(ids), how)
    meta = _first_of(np.flatnonzero(is_row & is_good), codes, len(ids))
    taken = rows.take(pa.array(meta, mask=meta < 0))
    sha256 = rows.column("sha256")
    text_of = _first_of(texts, codes, len(ids))
    counts = np.bincount(codes[images], minlength=len(ids))
    image_hashes = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32()), sha256.take(pa.array(images)).combine_chunks()
    )
    columns: dict[str, Any] = {
        "product_id": ids,
        **{name: taken.column(name) for name in METADATA},
        **{field.name: taken.column(f"carried.{field.name}") for field in how.carried},
        "text_vector": text_vectors,
        "image_vector": image_vectors,
        "avg_vector": average,
        "n_images": pa.array(counts, pa.int32()),
        "has_text": text_vectors.is_valid(),
        "text_sha256": sha256.take(pa.array(text_of, mask=text_of < 0)),
        "images_sha256": image_hashes,
        "partition": taken.column("partition"),
    }
    products = pa.Table.from_arrays(
        [_flat(columns[name]).cast(schema.field(name).type) for name in schema.names], schema=schema
    )
    n_inputs = np.bincount(codes[~is_row], minlength=len(ids))
    has_bad_row = np.bincount(codes[is_row & ~is_good], minlength=len(ids)) > 0
    no_input = np.flatnonzero((n_inputs == 0) & (meta >= 0) & ~has_bad_row)
    empty = [
        (ids[i].as_py(), taken.column("partition")[i].as_py(), taken.column("row")[i].as_py())
        for i in no_input.tolist()
    ]
    return Reduced(products.filter(pa.array((text_of >= 0) | (counts > 0))), ids, empty, ordinals)


def average_vectors(products: pa.RecordBatch, how: Reduction) -> pa.Array:
    """The averages of released products, anew from their text and image vectors: fixed_size_list<float32>[D].

    The vectors are read back as float32, so an average may differ from a fresh one in the last bit.
    """

    def matrix(name: str) -> tuple[np.ndarray, np.ndarray]:
        column = products.column(name)
        has_vector = np.asarray(column.is_valid().to_numpy(zero_copy_only=False), dtype=bool)
        vectors = np.zeros((len(column), how.dim))
        vectors[has_vector] = column.drop_null().flatten().to_numpy().reshape(-1, how.dim)
        return vectors, has_vector

    return _vectors(*_average(*matrix("text_vector"), *matrix("image_vector"), how.text_weight))


def image_rows(source: Staged, dim: int, ordinals: Mapping[int, int] | None) -> Iterator[pa.RecordBatch]:
    """Rows of the images table from a staged file; `ordinals` by row where the catalog gives none."""
    schema = images_schema(dim)
    columns = [
        "kind",
        "product_id",
        "row",
        "ordinal",
        "sha256",
        "vector",
        "width_px",
        "height_px",
        "thumbnail",
        "reason",
    ]
    for batch in read_staged(source.path, columns):
        is_image = pc.and_(pc.equal(batch.column("kind"), "image"), pc.is_null(batch.column("reason")))
        rows = pa.Table.from_batches([batch]).filter(is_image)
        if not rows.num_rows:
            continue
        places = rows.column("ordinal")
        if ordinals is not None:
            places = pa.chunked_array([pa.array([ordinals[row] for row in rows.column("row").to_pylist()], pa.int32())])
        image_ids = pc.binary_join_element_wise(rows.column("product_id"), places.cast(pa.string()), "/")
        rows = rows.drop_columns(["ordinal"]).append_column("ordinal", places).append_column("image_id", image_ids)
        yield from rows.select(schema.names).cast(schema).combine_chunks().to_batches()


def reject_rows(source: Staged, ordinals: Mapping[int, int] | None, run_id: str) -> pa.Table:
    """Rows of the rejects table from a staged file; an image without a place yet is `image/?`."""
    schema = rejects_schema()
    found: list[dict[str, Any]] = []
    for batch in read_staged(source.path, _REJECTS):
        for row in batch.filter(pc.is_valid(batch.column("reason"))).to_pylist():
            kind, ordinal = row.pop("kind"), row.pop("ordinal")
            if kind == "image" and ordinals is not None:
                ordinal = ordinals.get(row["row"], ordinal)
            name = kind if kind != "image" else f"image/{'?' if ordinal is None else ordinal}"
            row |= {"input": name, "attempts": source.attempt}
            found.append({**row, "partition": source.partition, "run_id": run_id})
    return pa.Table.from_pylist(found, schema=schema)


def empty_product_rejects(empty: Sequence[tuple[str, str, int]], run_id: str) -> pa.Table:
    """Rows of the rejects table for products that have neither text nor image."""
    rows = [
        {
            "product_id": product_id, "row": row, "input": "row", "reason": str(Reason.NO_TEXT_AND_NO_IMAGE),
            "detail": "title and description are null and there is no image", "partition": partition,
            "sha256": None, "run_id": run_id, "attempts": 1,
        }
        for product_id, partition, row in empty
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=rejects_schema())


def write_table(path: str, table: pa.Table) -> None:
    """Write a small table of a run's own as Parquet."""
    filesystem, inside = resolve(path)
    with filesystem.open_output_stream(inside) as sink:
        pq.write_table(table, sink)


def _order_images(
    rows: pa.Table, codes: np.ndarray, images: np.ndarray, is_good: np.ndarray, has_ordinals: bool
) -> tuple[np.ndarray, pa.Table | None]:
    """Indices of the good images by product and place; and the places, where the hash decides them."""
    if has_ordinals:
        ordinals = rows.column("ordinal").take(pa.array(images)).to_numpy()
        images = images[np.lexsort((ordinals, codes[images]))]
        return images[is_good[images]], None
    hashes = rows.column("sha256").take(pa.array(images)).fill_null("~").to_numpy().astype(str)  # "~" sorts last
    partitions = rows.column("partition").take(pa.array(images)).to_numpy().astype(str)
    row = rows.column("row").take(pa.array(images)).to_numpy()
    order = np.lexsort((row, partitions, hashes, codes[images]))
    images = images[order]
    starts = np.flatnonzero(np.diff(codes[images], prepend=-1))
    sizes = np.diff(np.append(starts, len(images)))
    places = np.arange(len(images)) - np.repeat(starts, sizes)
    table = pa.table({"partition": partitions[order], "row": row[order], "ordinal": pa.array(places, pa.int32())})
    return images[is_good[images]], table


def _average_all(
    rows: pa.Table, texts: np.ndarray, images: np.ndarray, codes: np.ndarray, n: int, how: Reduction
) -> list[pa.Array]:
    """Text, image and average vectors of all products, some hundreds at a time: float64 is twice the size of all."""
    sorted_texts = texts[np.argsort(codes[texts], kind="stable")]
    vectors = rows.column("vector")
    found = [(np.zeros((n, how.dim), np.float32), np.zeros(n, bool)) for _ in range(3)]
    for at in range(0, n, _PRODUCTS_AT_ONCE):
        stop = min(at + _PRODUCTS_AT_ONCE, n)
        text, image = (_means(vectors, own, codes, at, stop, how.dim) for own in (sorted_texts, images))
        for part, (into, is_there) in zip((text, image, _average(*text, *image, how.text_weight)), found, strict=True):
            into[at:stop], is_there[at:stop] = part
    return [_vectors(*part) for part in found]


def _means(
    vectors: pa.ChunkedArray, indices: np.ndarray, codes: np.ndarray, start: int, stop: int, dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Unit mean vector of the products from `start` to `stop`, float64 (n, dim), and which of them have one.

    `indices` are sorted by product.
    """
    means = np.zeros((stop - start, dim))
    own = indices[slice(*np.searchsorted(codes[indices], (start, stop)))]
    if not len(own):
        return means, np.zeros(stop - start, dtype=bool)
    taken = vectors.take(pa.array(own)).combine_chunks().flatten().to_numpy().reshape(-1, dim)
    present, starts = np.unique(codes[own], return_index=True)
    means[present - start] = np.add.reduceat(taken.astype(np.float64), starts, axis=0)
    return _unit(means)


def _average(
    text: np.ndarray, has_text: np.ndarray, image: np.ndarray, has_image: np.ndarray, weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """The weighted average where both are there, else the one that is. A weight of 0 or 1 leaves one modality out."""
    text_share = np.where(has_text & has_image, weight, has_text.astype(float))[:, None]
    image_share = np.where(has_text & has_image, 1.0 - weight, has_image.astype(float))[:, None]
    return _unit(text_share * text + image_share * image)


def _unit(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    norms = np.linalg.norm(vectors, axis=1)
    has_norm = norms > _SMALLEST_NORM
    return vectors / np.where(has_norm, norms, 1.0)[:, None], has_norm


def _first_of(indices: np.ndarray, codes: np.ndarray, n: int) -> np.ndarray:
    """int64 (n,): each product's first row among `indices`, -1 where it has none."""
    first = np.full(n, -1, dtype=np.int64)
    first[codes[indices[::-1]]] = indices[::-1]
    return first


def _vectors(vectors: np.ndarray, is_there: np.ndarray) -> pa.Array:
    flat = pa.array(vectors.astype(np.float32, copy=False).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1], mask=pa.array(~is_there))


def _flat(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
