"""What an import reads: products of a source with the images that they name, and what of it is left out, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import pyarrow as pa


class ImportReason(StrEnum):
    """Why an import left something out, beside the pipeline's own reasons for rows and images (`records.Reason`)."""

    NOT_UTF8 = "not_utf8"
    WRONG_FIELDS = "wrong_fields"
    SCORE_NOT_A_NUMBER = "score_not_a_number"
    PATH_OUTSIDE = "path_outside"
    PATH_SHAPE = "path_shape"
    DUPLICATE_IMAGE = "duplicate_image"
    CONFLICTING_CATEGORY = "conflicting_category"
    ROW_UNREADABLE = "row_unreadable"
    NOT_TEXT = "not_text"
    NOT_A_NUMBER = "not_a_number"


@dataclass(frozen=True, slots=True)
class ImportReject:
    """Something of the source that did not become a part of the catalog.

    Attributes:
        source: the file it stands in, by name.
        row: line or row in that file, from 1.
        kind: `row`: the whole row; `image`: one image of it; `value`: one carried value, which is null then.
        input: the path or value as it is written.
        reason: an `ImportReason` or a `records.Reason`.
        detail: a sentence for the person who repairs the source.
    """

    source: str
    row: int
    kind: str
    product_id: str | None
    input: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image that a source names.

    Attributes:
        reference: path relative to the images' root, or a URL.
        source: the file that names it.
        row: line or row there, from 1.
        values: what the source says of this image, as the source's own `row` reads it.
    """

    reference: str
    source: str
    row: int
    values: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceProduct:
    """One product as a source tells it, before its images are looked at.

    Attributes:
        images: in the order of the catalog.
        values: what the source says of the product.
    """

    product_id: str
    images: tuple[SourceImage, ...]
    values: Mapping[str, Any]


class ImportSource(Protocol):
    """Where products come from: labels of a data set, or a table."""

    schema: pa.Schema
    """Of the catalog, `images` left out, which comes last."""
    needs_images: bool
    """Whether a product without any image that is left is no product."""

    def identity(self) -> Mapping[str, Any]:
        """Digests of what is read and the options of reading: equal for equal catalogs; a part of the manifest."""
        ...

    def products(self) -> Iterator[SourceProduct | ImportReject]:
        """The products, in an order that is always the same, and what is wrong with the source between them."""
        ...

    def row(self, product: SourceProduct, images: Sequence[SourceImage]) -> Mapping[str, Any]:
        """A catalog row of `schema`.

        Args:
            product: as it came from `products`.
            images: those of its images that could be read.
        """
        ...

    def counts(self) -> Mapping[str, Any]:
        """What the source knows of itself once `products` came to its end; a part of the manifest."""
        ...
