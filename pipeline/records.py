"""The values that travel between modules: frozen dataclasses, and the closed list of reject reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Reason(StrEnum):
    """Why an input, or a whole row, was rejected. The list is closed: dashboards and checks rely on it."""

    MISSING_ID = "missing_id"
    DUPLICATE_ID = "duplicate_id"
    CONFLICTING_ROW = "conflicting_row"
    NO_TEXT_AND_NO_IMAGE = "no_text_and_no_image"
    TEXT_EMPTY = "text_empty"
    IMAGE_NULL = "image_null"
    IMAGE_EMPTY = "image_empty"
    IMAGE_NOT_AN_IMAGE = "image_not_an_image"
    IMAGE_UNSUPPORTED_FORMAT = "image_unsupported_format"
    IMAGE_UNDECODABLE = "image_undecodable"
    IMAGE_TRUNCATED = "image_truncated"
    IMAGE_CORRUPT = "image_corrupt"
    IMAGE_TOO_LARGE_BYTES = "image_too_large_bytes"
    IMAGE_TOO_MANY_PIXELS = "image_too_many_pixels"
    IMAGE_TOO_SMALL = "image_too_small"
    IMAGE_EXTREME_ASPECT = "image_extreme_aspect"
    IMAGE_NOT_FOUND = "image_not_found"
    FETCH_REFUSED = "fetch_refused"
    FETCH_FAILED = "fetch_failed"
    VECTOR_NOT_FINITE = "vector_not_finite"
    WORKER_CRASHED = "worker_crashed"
    PARTITION_UNREADABLE = "partition_unreadable"


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What an image may be before it is refused unread or undecoded."""

    max_bytes: int = 50_000_000
    max_pixels: int = 64_000_000
    min_side_px: int = 8
    max_aspect: float = 20.0


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result.

    Attributes:
        product_id: the product's key.
        score: cosine similarity of the query and the searched vector, -1 to 1, higher is better.
        rank: place in the result, from 1.
        fields: the asked columns of the product, by name.
        cluster: number of the image cluster when the result was diversified by clusters, else None.
        duplicates: product_ids of worse candidates that look the same and were left out for this one.
    """

    product_id: str
    score: float
    rank: int
    fields: Mapping[str, object] = field(default_factory=dict)
    cluster: int | None = None
    duplicates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One element of a product's images.

    Attributes:
        ordinal: place in the product, from 0; None where the catalog gives no order and the bytes' hash decides.
        data: encoded bytes, a reference to them, or None for a null element.
    """

    ordinal: int | None
    data: bytes | str | None


@dataclass(frozen=True, slots=True)
class Product:
    """One catalog row, as far as it concerns one product.

    Attributes:
        row: row number in the file, from 0.
        text: the assembled text, None where the catalog holds none or an earlier row of the product carries it.
        is_first: whether this row is the product's first and so carries its metadata.
        metadata: title, description, broad_category, fine_category and the carried columns, by name.
        content: 16 bytes, digest of the row's metadata, whether it is the first row or not.
    """

    product_id: str
    row: int
    is_first: bool
    text: str | None
    images: tuple[ImageInput, ...]
    metadata: Mapping[str, object]
    content: bytes = b""


@dataclass(frozen=True, slots=True)
class Rejected:
    """One bad input, or one bad row, of a partition.

    Attributes:
        kind: `text`, `image` or `row`.
        ordinal: the image's place, None for text and row, or where it is not known yet.
    """

    product_id: str | None
    row: int
    kind: str
    reason: Reason
    detail: str
    ordinal: int | None = None
    sha256: str | None = None
