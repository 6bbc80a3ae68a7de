"""A table's rows as products: columns mapped, rows of one product joined, image paths read, bad rows named."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.catalog.import_source import ImportReason, ImportReject, SourceImage, SourceProduct
from pipeline.catalog.table_files import TableFile, TableRow, fitting, sha256_of
from pipeline.errors import CatalogError, InputRejected, first_line
from pipeline.paths import absolute
from pipeline.records import Reason
from pipeline.shown import redacted

_TEXTS = ("title", "description", "broad_category", "fine_category")
_TAKEN = ("product_id", *_TEXTS, "images")
_SHOWN = 80  # characters of a value in a sentence


@dataclass(frozen=True)
class TableColumns:
    """What a table calls what a catalog holds; an empty name, or a default that is not there, is null.

    Attributes:
        separator: between several paths in one text; empty: a text is one path, or a JSON list of paths.
        numbers: columns carried as float64; their text is read as numbers.
    """

    product_id: str = "product_id"
    title: str = "title"
    description: str = "description"
    broad_category: str = "broad_category"
    fine_category: str = "fine_category"
    images: str = "images"
    separator: str = ""
    numbers: tuple[str, ...] = ()


@dataclass
class _Open:
    """A product whose last row has not come yet."""

    values: dict[str, Any]
    carried: dict[str, Any]
    images: dict[str, SourceImage] = field(default_factory=dict)


class TableProducts:
    """A table as a source of products; an `import_source.ImportSource`.

    Rows of one id are one product, wherever in the file they stand: images are put together in row order; each text is
    that of the first row that has one, and a row that says another is rejected (`conflicting_row`); carried columns
    are those of the first row. A product comes when its last row was read, so that what is held is small where a
    product's rows stand together. The ids of the whole table are held: some 150 bytes each.

    Args:
        table: the opened table.
        path: its file.
        columns: the mapping.
        images_root: local folder that paths are relative to; an absolute path in it is taken as such.

    Raises:
        CatalogError: a column is missing or of a wrong type, or the file cannot be read to its end.
    """

    needs_images = False

    def __init__(self, table: TableFile, path: str, columns: TableColumns, images_root: str) -> None:
        self._table, self._path = table, path
        self._roots = [f"{root.rstrip('/')}/" for root in (absolute(images_root), os.path.realpath(images_root))]
        self._asked = columns
        self._names = {role: _found(table, role, getattr(columns, role)) for role in _TAKEN}
        others = [name for name in table.schema.names if name not in self._names.values()]
        unknown = next((name for name in columns.numbers if name not in others), None)
        if unknown is not None:
            raise CatalogError(f"{table.name} has no further column {unknown!r} to carry as numbers; it has {others}")
        self._carried = {name: name if name not in _TAKEN else f"source_{name}" for name in others}
        self.schema = pa.schema(
            [pa.field(name, pa.string()) for name in _TAKEN[:-1]]
            + [pa.field(self._carried[name], self._type(name)) for name in others]
        )
        if len(set(self.schema.names)) < len(self.schema.names):
            raise CatalogError(f"{table.name} has columns that a catalog would give one name: {self.schema.names}")
        self._rows = self._references = 0
        self._last = self._survey()
        self._sha256 = sha256_of(path)

    def identity(self) -> Mapping[str, Any]:
        """The file's digest and the mapping."""
        asked = asdict(self._asked) | {"numbers": list(self._asked.numbers)}
        return {"table": {"sha256": self._sha256}, "columns": asked, "carried": list(self._carried.values())}

    def products(self) -> Iterator[SourceProduct | ImportReject]:
        """The products in the order of their last rows, and what is rejected between them."""
        opened: dict[str, _Open] = {}
        for row in self._table.rows():
            self._rows += 1
            if isinstance(row, ImportReject):
                yield row
                continue
            product_id = _product_id(row.values.get(self._names["product_id"]))
            try:
                if product_id is None:
                    raise InputRejected(Reason.MISSING_ID, f"row {row.number} has no id that is text or a whole number")
                yield from self._taken(row, product_id, opened)
            except InputRejected as why:
                yield ImportReject(self._table.name, row.number, "row", product_id, "", str(why.reason), why.detail)
            if product_id is not None and self._last[product_id] == row.number and product_id in opened:
                whole = opened.pop(product_id)
                yield SourceProduct(product_id, tuple(whole.images.values()), {**whole.values, **whole.carried})

    def row(self, product: SourceProduct, images: Sequence[SourceImage]) -> Mapping[str, Any]:
        """A catalog row; a product stays one without images."""
        return {"product_id": product.product_id, **product.values}

    def counts(self) -> Mapping[str, Any]:
        """Rows of the table, and image references in the rows that count."""
        return {"rows": self._rows, "image_references": self._references}

    def _type(self, name: str) -> pa.DataType:
        return pa.float64() if name in self._asked.numbers else self._table.schema.field(name).type

    def _survey(self) -> dict[str, int]:
        """The last row of each id."""
        last: dict[str, int] = {}
        try:
            for row in self._table.rows(only=self._names["product_id"]):
                if isinstance(row, TableRow):
                    product_id = _product_id(row.values.get(self._names["product_id"]))
                    if product_id is not None:
                        last[product_id] = row.number
        except (OSError, EOFError, zlib.error) as error:
            raise CatalogError(f"{self._path} cannot be read to its end: {first_line(error)}") from error
        return last

    def _taken(self, row: TableRow, product_id: str, opened: dict[str, _Open]) -> Iterator[ImportReject]:
        """Add a row to its product; what of it is bad.

        Raises:
            InputRejected: the whole row is.
        """
        values = {role: _text(role, row.values.get(self._names[role])) for role in _TEXTS}
        elements = self._elements(row)
        carried, rejects = self._carried_values(row, product_id)
        product = opened.get(product_id)
        if product is None:
            product = opened[product_id] = _Open(values, carried)
        for role, value in values.items():
            before = product.values[role]
            if value is not None and before is not None and value != before:
                detail = f"{role} is {value[:_SHOWN]!r}; an earlier row of the product says {before[:_SHOWN]!r}"
                raise InputRejected(Reason.CONFLICTING_ROW, detail)
        product.values |= {role: value for role, value in values.items() if value is not None}
        yield from rejects
        self._references += len(elements)
        for element in elements:
            try:
                reference = self._reference(element)
                if reference in product.images:
                    detail = f"row {product.images[reference].row} has this image of the product already"
                    raise InputRejected(ImportReason.DUPLICATE_IMAGE, detail)
            except InputRejected as why:
                place = (self._table.name, row.number, "image", product_id, redacted(str(element or "")))
                yield ImportReject(*place, str(why.reason), why.detail)
            else:
                product.images[reference] = SourceImage(reference, self._table.name, row.number)

    def _elements(self, row: TableRow) -> list[object]:
        """What the row's images column names, in order."""
        value = _plain(row.values.get(self._names["images"]))
        if isinstance(value, list):
            return value
        if not isinstance(value, str) or not value.strip():
            if value is None or isinstance(value, str):
                return []
            raise InputRejected(ImportReason.NOT_TEXT, f"the images are {str(value)[:_SHOWN]!r}, neither text nor list")
        if value.lstrip().startswith("["):
            try:
                found = json.loads(value)
            except (ValueError, RecursionError):
                found = None  # a file name may begin with a bracket
            if isinstance(found, list):
                return found
        parts = value.split(self._asked.separator) if self._asked.separator else [value]
        return [part for part in parts if part.strip()]

    def _reference(self, element: object) -> str:
        """One element as a reference relative to the root."""
        if element is None:
            raise InputRejected(Reason.IMAGE_NULL, "an element of the list of images is null")
        if not isinstance(element, str):
            raise InputRejected(ImportReason.NOT_TEXT, f"an image is {str(element)[:_SHOWN]!r}, not the text of a path")
        written = element.strip()
        return next((written[len(root) :] for root in self._roots if written.startswith(root)), written)

    def _carried_values(self, row: TableRow, product_id: str) -> tuple[dict[str, Any], list[ImportReject]]:
        """The carried columns under their names in the catalog, and the numbers that are none."""
        types = self._table.schema
        values = {
            name: fitting(row.values.get(source), types.field(source).type) for source, name in self._carried.items()
        }
        rejects = []
        for source in self._asked.numbers:
            written = _plain(values[self._carried[source]])
            try:
                number = None if written is None else float(written)
                if number is not None and not math.isfinite(number):
                    raise ValueError
                values[self._carried[source]] = number
            except (TypeError, ValueError, OverflowError):
                values[self._carried[source]] = None
                shown = str(written)[:_SHOWN]
                detail = f"{source} is no number; the product has none"
                place = (self._table.name, row.number, "value", product_id, shown)
                rejects.append(ImportReject(*place, ImportReason.NOT_A_NUMBER, detail))
        return values, rejects


def _found(table: TableFile, role: str, name: str) -> str:
    """The column for a role, empty where there is none.

    Raises:
        CatalogError: it is asked for and missing, or of a type that cannot be read so.
    """
    if name not in table.schema.names:
        if role == "product_id" or name != getattr(TableColumns(), role):
            option = {"product_id": "id", "broad_category": "broad", "fine_category": "fine"}.get(role, role)
            raise CatalogError(
                f"{table.name} has no column {name!r} for {role}; it has {', '.join(table.schema.names)}. Name another "
                f"with --{option}"
            )
        return ""
    type_ = table.schema.field(name).type
    element = type_.value_type if role == "images" and _is_list(type_) else type_
    if role == "images" and (pa.types.is_binary(element) or pa.types.is_large_binary(element)):
        raise CatalogError(
            f"{table.name}: column {name!r} holds the images themselves, not their paths: this is a catalog already; "
            f"python -m jobs.backfill --catalog {table.name} --set columns.images={name}"
        )
    if role == "images" and not (_is_string(element) or pa.types.is_null(element)):
        raise CatalogError(
            f"{table.name}: column {name!r} for images is {type_}; it should be text, or a list of texts"
        )
    return name


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _is_string(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _plain(value: Any) -> Any:
    """An Arrow scalar as Python has it, other values as they are."""
    return value.as_py() if isinstance(value, pa.Scalar) else value


def _product_id(value: object) -> str | None:
    """Text, or a whole number in decimal digits; None for all else and for blanks."""
    value = _plain(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what spreadsheets make of a column of numbers with a gap
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value.strip() else None


def _text(role: str, value: object) -> str | None:
    """A text; numbers as they are written."""
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise InputRejected(ImportReason.NOT_TEXT, f"{role} is {str(value)[:_SHOWN]!r}, not text")
    return value if value is None or isinstance(value, str) else str(value)
