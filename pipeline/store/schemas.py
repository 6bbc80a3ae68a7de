"""The Arrow schemas of all tables, and of their keys."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

SCHEMA_VERSION = 2
TABLES = ("products", "images", "rejects", "partitions", "catalog_rows")
"""The tables that a release pins; `runs` and `releases` only grow."""

PRIMARY_KEY = {b"lance-schema:unenforced-primary-key": b"true"}
"""Field metadata by which Lance's merge_insert finds two writers of one key in conflict. Such a field is never null."""


def key(name: str, type_: pa.DataType) -> pa.Field:
    """A key column: not null, and known to Lance as the primary key."""
    return pa.field(name, type_, nullable=False, metadata=PRIMARY_KEY)


def vector(dim: int) -> pa.DataType:
    """The type of every vector column: float32 (dim,)."""
    return pa.list_(pa.float32(), dim)


def products_schema(dim: int, carried: Sequence[pa.Field] = ()) -> pa.Schema:
    """One row per product. Vectors have unit L2 norm or are null; `carried` are the catalog's own further columns."""
    return pa.schema(
        [
            key("product_id", pa.string()),
            pa.field("title", pa.string()),
            pa.field("description", pa.string()),
            pa.field("broad_category", pa.string()),
            pa.field("fine_category", pa.string()),
            *[pa.field(field.name, field.type) for field in carried],
            pa.field("text_vector", vector(dim)),
            pa.field("image_vector", vector(dim)),
            pa.field("avg_vector", vector(dim)),
            pa.field("n_images", pa.int32(), nullable=False),
            pa.field("has_text", pa.bool_(), nullable=False),
            pa.field("text_sha256", pa.string()),
            pa.field("images_sha256", pa.list_(pa.string())),
            pa.field("partition", pa.string()),
        ]
    )


def images_schema(dim: int) -> pa.Schema:
    """One row per embedded image. `thumbnail` is a JPEG, longest side 224 pixels; sizes are of the upright image."""
    return pa.schema(
        [
            key("image_id", pa.string()),
            pa.field("product_id", pa.string(), nullable=False),
            pa.field("ordinal", pa.int32(), nullable=False),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("vector", vector(dim)),
            pa.field("width_px", pa.int32(), nullable=False),
            pa.field("height_px", pa.int32(), nullable=False),
            pa.field("thumbnail", pa.binary()),
        ]
    )


def rejects_schema() -> pa.Schema:
    """One row per bad input or bad row, as of the release. `input` is `text`, `image/<ordinal>` or `row`."""
    return pa.schema(
        [
            pa.field("product_id", pa.string()),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("input", pa.string(), nullable=False),
            pa.field("reason", pa.string(), nullable=False),
            pa.field("detail", pa.string()),
            pa.field("partition", pa.string(), nullable=False),
            pa.field("sha256", pa.string()),
            pa.field("run_id", pa.string(), nullable=False),
            pa.field("attempts", pa.int32(), nullable=False),
        ]
    )


def partitions_schema() -> pa.Schema:
    """One row per catalog partition as of the release: what a later run compares, to leave the partition unread.

    `digest` is of size, modification time, footer and row groups, empty where the partition has to be read again;
    `settings` is of everything else that decides what its rows say. The counts are of inputs and of whole rows.
    """
    counts = ("rows", "products", "texts", "images", "rejected", "rejected_rows")
    return pa.schema(
        [
            key("partition", pa.string()),
            pa.field("digest", pa.string(), nullable=False),
            pa.field("settings", pa.string(), nullable=False),
            *[pa.field(name, pa.int64(), nullable=False) for name in counts],
            pa.field("run_id", pa.string(), nullable=False),
        ]
    )


def catalog_rows_schema() -> pa.Schema:
    """One row per catalog row that has a part in the release: whose it is, and a digest of what it says.

    `digest` is 16 bytes from `pipeline.catalog.products.row_digest`, null where the row was not read to its end.
    """
    return pa.schema(
        [
            pa.field("product_id", pa.string()),
            pa.field("partition", pa.string(), nullable=False),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("digest", pa.binary(16)),
        ]
    )


def runs_schema() -> pa.Schema:
    """One row per run, released or not; `counts`, `stages`, `rates`, `versions` and `report` are JSON objects."""
    return pa.schema(
        [
            key("run_id", pa.string()),
            pa.field("job", pa.string(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("started_at", pa.timestamp("us", tz="UTC"), nullable=False),
            pa.field("seconds", pa.float64(), nullable=False),
            pa.field("release", pa.int64()),
            pa.field("catalog", pa.string()),
            pa.field("model", pa.string()),
            pa.field("model_id", pa.string()),
            pa.field("fingerprint", pa.string()),
            pa.field("counts", pa.string()),
            pa.field("stages", pa.string()),
            pa.field("rates", pa.string()),
            pa.field("versions", pa.string()),
            pa.field("report", pa.string()),
            pa.field("error", pa.string()),
        ]
    )


def releases_schema() -> pa.Schema:
    """One row per release: versions that belong together. `model_settings`, `index`, `counts`, `checks` are JSON."""
    return pa.schema(
        [
            key("release", pa.int64()),
            pa.field("parent", pa.int64()),
            pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
            pa.field("products_version", pa.int64(), nullable=False),
            pa.field("images_version", pa.int64(), nullable=False),
            pa.field("rejects_version", pa.int64(), nullable=False),
            pa.field("partitions_version", pa.int64()),  # null in releases of schema version 1
            pa.field("catalog_rows_version", pa.int64()),
            pa.field("model", pa.string(), nullable=False),
            pa.field("model_id", pa.string(), nullable=False),
            pa.field("fingerprint", pa.string(), nullable=False),
            pa.field("model_settings", pa.string()),
            pa.field("average_text_weight", pa.float64(), nullable=False),
            pa.field("index", pa.string(), nullable=False),
            pa.field("counts", pa.string(), nullable=False),
            pa.field("checks", pa.string(), nullable=False),
            pa.field("schema_version", pa.int32(), nullable=False),
        ]
    )


def lease_schema() -> pa.Schema:
    """One row: who may write to the database; see `pipeline.store.lease.Holder`."""
    moment = pa.timestamp("us", tz="UTC")
    return pa.schema(
        [
            pa.field("token", pa.string(), nullable=False),
            pa.field("run_id", pa.string(), nullable=False),
            pa.field("job", pa.string(), nullable=False),
            pa.field("host", pa.string(), nullable=False),
            pa.field("pid", pa.int64(), nullable=False),
            pa.field("system", pa.string(), nullable=False),
            pa.field("process_start", pa.int64()),
            pa.field("acquired_at", moment, nullable=False),
            pa.field("renewed_at", moment, nullable=False),
            pa.field("ttl_s", pa.float64(), nullable=False),
            pa.field("is_released", pa.bool_(), nullable=False),
        ]
    )
