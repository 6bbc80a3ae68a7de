"""Rows of a partition as products: the text assembled, the images listed, bad rows named."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.catalog.partitions import READ_ERRORS, Catalog, Partition
from pipeline.records import ImageInput, Product, Reason, Rejected

Rows = npt.NDArray[np.int64]
_HELD_ROWS = 64  # as many make a batch of what a plan leaves
_NO_ROWS: Rows = np.zeros(0, np.int64)


@dataclass(frozen=True)
class RowPlan:
    """What a pass over the ids of the whole catalog found out about one partition's rows, by row number in the file.

    Attributes:
        rejected: rows that are not read, with the reason and a sentence.
        followers: rows of a product whose first row, in (path, row) order, is another one; only in the image shape.
        skipped: rows that this run has nothing to do with. Both as int64, ascending.
    """

    rejected: Mapping[int, tuple[Reason, str]] = field(default_factory=dict)
    followers: Rows = field(default_factory=lambda: _NO_ROWS)
    skipped: Rows = field(default_factory=lambda: _NO_ROWS)

    def digest(self) -> str:
        """The same for equal plans."""
        digest = hashlib.sha256(repr(sorted(self.rejected.items())).encode())
        for rows in (self.followers, self.skipped):
            digest.update(len(rows).to_bytes(8, "little") + np.ascontiguousarray(rows, np.int64).tobytes())
        return digest.hexdigest()


def read_products(
    catalog: Catalog,
    partition: Partition,
    plan: RowPlan,
    *,
    rows: tuple[int, int] | None = None,
    batch_rows: int | None = None,
) -> Iterator[tuple[list[Product], list[Rejected]]]:
    """A partition's products in row order, batch by batch, with the rows that are rejected.

    A page that cannot be read ends the partition: what came before it stands, and the rest is one rejected row.

    Args:
        catalog: the checked catalog.
        partition: one of its partitions.
        plan: what is known of the partition's rows.
        rows: first row and row after the last, as in the file; None: all of the partition.
        batch_rows: rows per batch at most; None: as the catalog does.

    Raises:
        RunError: the file is gone, or was changed since the catalog was opened.
    """
    names = catalog.columns
    columns = [names.product_id, names.title, names.description, names.broad_category, names.fine_category]
    columns += [names.images, names.image_ordinal, *(f.name for f in catalog.carried)]
    row, stop = rows or partition.span
    roles = _Roles(plan, row, stop)
    wanted = [c for c in dict.fromkeys(columns) if c]
    held = _Held(catalog, roles, batch_rows or _HELD_ROWS)
    try:
        for table in catalog.read(partition, wanted, rows=(row, stop), batch_rows=batch_rows):
            held.add(table, row)
            row += table.num_rows
            if held.is_full:
                yield held.take()
        if held.is_something:
            yield held.take()
        catalog.check_unchanged(partition)
    except READ_ERRORS as error:
        if held.is_something:
            yield held.take()
        detail = f"rows {row} to {stop - 1} of {partition.name} cannot be read: {error}"
        yield [], [Rejected(None, row, "row", Reason.PARTITION_UNREADABLE, detail)]


def assemble_text(title: str | None, description: str | None) -> str | None:
    """`title. description`: null and blank parts skipped, equal parts once, no second full stop; None if both are null.

    A result of "" says that there was a text and that it is blank.
    """
    parts = [part.strip() for part in (title, description) if part is not None]
    if not parts:
        return None
    filled = [part for part in dict.fromkeys(parts) if part]
    if len(filled) < 2:
        return filled[0] if filled else ""
    return f"{filled[0]}{' ' if filled[0].endswith('.') else '. '}{filled[1]}"


def product_ids(column: pa.ChunkedArray) -> pa.Array:
    """Ids as strings: an integer in decimal digits, a blank one as null."""
    ids = column.cast(pa.string())
    is_blank = pc.equal(pc.utf8_trim_whitespace(ids), "")
    ids = pc.if_else(pc.fill_null(is_blank, fill_value=True), pa.scalar(None, pa.string()), ids)
    return ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids


def _records(catalog: Catalog, table: pa.Table) -> Iterator[dict[str, object]]:
    """One dict per row, keyed by role and by carried name."""
    names = catalog.columns
    roles = ("title", "description", "broad_category", "fine_category", "images", "image_ordinal")
    values: dict[str, Sequence[object]] = {"product_id": product_ids(table.column(names.product_id)).to_pylist()}
    for role in roles:
        name = getattr(names, role)
        values[role] = table.column(name).to_pylist() if name else [None] * table.num_rows
    for carried in catalog.carried:
        values[f"carried.{carried.name}"] = table.column(carried.name).to_pylist()
    for i in range(table.num_rows):
        yield {role: column[i] for role, column in values.items()}


def row_digest(content: bytes, images: Sequence[tuple[int | None, str]]) -> bytes:
    """16 bytes: what a catalog row says, its place in the catalog apart.

    Args:
        content: `Product.content`, which covers everything but the images.
        images: ordinal and sha256 of each, or in the place of the hash a word on why there is none.
    """
    return hashlib.blake2b(content + repr(list(images)).encode(), digest_size=16).digest()


class _Roles:
    """A plan's rows of a range, quick to ask."""

    def __init__(self, plan: RowPlan, row: int, stop: int) -> None:
        self.rejected = plan.rejected
        self.followers, self.skipped = (
            frozenset(rows[np.searchsorted(rows, row) : np.searchsorted(rows, stop)].tolist())
            for rows in (plan.followers, plan.skipped)
        )


class _Held:
    """Rows that are not skipped, until there are enough of them for a batch: a plan may leave one row in a thousand."""

    def __init__(self, catalog: Catalog, roles: _Roles, enough: int) -> None:
        self._catalog, self._roles, self._enough = catalog, roles, enough
        self._products: list[Product] = []
        self._rejects: list[Rejected] = []

    @property
    def is_full(self) -> bool:
        """Whether what is held makes a batch; without skipped rows every table does."""
        return not self._roles.skipped or len(self._products) + len(self._rejects) >= self._enough

    @property
    def is_something(self) -> bool:
        """Whether anything is held."""
        return bool(self._products or self._rejects)

    def add(self, table: pa.Table, row: int) -> None:
        """Hold the rows of a table whose first row has that number."""
        numbers = range(row, row + table.num_rows)
        if self._roles.skipped:  # before a skipped row's images are copied
            chosen = [number for number in numbers if number not in self._roles.skipped]
            table = table.take(pa.array([number - row for number in chosen], pa.int64()))
            numbers = chosen  # type: ignore[assignment]
        for number, record in zip(numbers, _records(self._catalog, table), strict=True):
            result = _product(self._catalog, record, number, self._roles)
            if isinstance(result, Product):
                self._products.append(result)
            else:
                self._rejects.append(result)

    def take(self) -> tuple[list[Product], list[Rejected]]:
        """What is held, which is then let go."""
        taken = self._products, self._rejects
        self._products, self._rejects = [], []
        return taken


def _product(catalog: Catalog, record: dict[str, object], row: int, roles: _Roles) -> Product | Rejected:
    """The row as a product, or why it is none."""
    product_id = record["product_id"]
    if row in roles.rejected:
        reason, detail = roles.rejected[row]
        return Rejected(product_id, row, "row", reason, detail)  # type: ignore[arg-type]
    if product_id is None:
        return Rejected(None, row, "row", Reason.MISSING_ID, f"row {row} has no product id")
    images = _images(catalog, record)
    if isinstance(images, str):
        return Rejected(str(product_id), row, "row", Reason.CONFLICTING_ROW, images)
    is_first = row not in roles.followers
    metadata = {role: record[role] for role in ("title", "description", "broad_category", "fine_category")}
    metadata |= {carried.name: record[f"carried.{carried.name}"] for carried in catalog.carried}
    content = hashlib.blake2b(repr(metadata).encode(), digest_size=16).digest()
    text = assemble_text(record["title"], record["description"]) if is_first else None  # type: ignore[arg-type]
    return Product(str(product_id), row, is_first, text, images, metadata if is_first else {}, content)


def _images(catalog: Catalog, record: dict[str, object]) -> tuple[ImageInput, ...] | str:
    """The row's images, or a sentence on why its image has no place.

    In a list, a null element is an input. A single null is no image, unless an ordinal says that one belongs there.
    """
    value = record["images"]
    if isinstance(value, list):
        return tuple(ImageInput(i, element) for i, element in enumerate(value))
    if not catalog.columns.image_ordinal:
        ordinal = 0 if catalog.shape == "product" else None
        return () if value is None else (ImageInput(ordinal, value),)  # type: ignore[arg-type]
    ordinal = record["image_ordinal"]  # type: ignore[assignment]
    if ordinal is None and value is None:
        return ()
    if ordinal is None or not 0 <= ordinal < 2**31:
        return f"{catalog.columns.image_ordinal} is {ordinal}; it is the image's place in its product, from 0"
    return (ImageInput(ordinal, value),)  # type: ignore[arg-type]
