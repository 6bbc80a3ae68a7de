"""Tables as people have them: rows of a CSV, JSONL or Parquet file, and why a row is none."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.catalog.import_source import ImportReason, ImportReject
from pipeline.errors import CatalogError, RunError, first_line
from pipeline.paths import absolute, is_uri

FORMATS = ("csv", "jsonl", "parquet")
_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 1000
_FIELD_CHARACTERS = 1_000_000  # a quote that is never closed ends here; the csv module's own bound is 131,072
_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row that could be read.

    Attributes:
        number: of the line it begins in, from 1; in Parquet of the row.
        values: by column name, those that are not null or all; of Parquet as Arrow scalars.
    """

    number: int
    values: Mapping[str, Any]


class TableFile(Protocol):
    """A table that is read from its beginning as often as it is asked for."""

    name: str
    schema: pa.Schema
    """Of the columns; for CSV all are strings, for JSONL what their values have in common."""

    def rows(self, *, only: str | None = None) -> Iterator[TableRow | ImportReject]:
        """All rows in order.

        Args:
            only: the one column that is needed, if so; others may be left out.

        Raises:
            RunError: the file is damaged.
        """
        ...


def open_table(path: str, *, kind: str | None = None, delimiter: str | None = None) -> TableFile:
    """A table by its suffix: .csv, .tsv, .jsonl, .ndjson, .parquet, .pq; text with .gz behind it, too.

    Args:
        path: a local file.
        kind: one of `FORMATS`, where the suffix does not tell.
        delimiter: of CSV, one character; None: a comma, for .tsv a tab.

    Raises:
        CatalogError: there is no such file, its kind is unknown, or its head cannot be read.
    """
    if is_uri(path):
        raise CatalogError(f"a table is read from a local file, not from {path}; copy it first")
    file = Path(absolute(path))
    if not file.is_file():
        raise CatalogError(f"there is no table {path}; give a CSV, JSONL or Parquet file")
    suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    found = kind or _SUFFIXES.get(suffix.lower())
    if found is None:
        raise CatalogError(f"{path} has none of the suffixes {', '.join(_SUFFIXES)}; say what it is with --format")
    try:
        if found == "csv":
            return CsvTable(file, delimiter or ("\t" if suffix == ".tsv" else ","))
        return JsonlTable(file) if found == "jsonl" else ParquetTable(file)
    except (OSError, EOFError, ValueError, zlib.error, csv.Error, pa.ArrowException) as error:
        raise CatalogError(f"{path} cannot be read as {found}: {first_line(error)}") from error


def sha256_of(path: str) -> str:
    """Digest of a file's bytes."""
    with Path(absolute(path)).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fitting(value: Any, type_: pa.DataType) -> Any:
    """A value as its column has it: JSON where its values have only text in common, whole numbers among floats."""
    if value is None or isinstance(value, pa.Scalar):
        return value
    if pa.types.is_string(type_) and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return float(value) if pa.types.is_floating(type_) and isinstance(value, int) else value


class CsvTable:
    """Comma-separated values with a head line, UTF-8; every value is text, an empty one is null.

    Raises:
        CatalogError: the head names a column twice.
    """

    def __init__(self, file: Path, delimiter: str) -> None:
        self.name, self._file, self._delimiter = file.name, file, delimiter
        with self._opened() as text:
            head = next(csv.reader(text, delimiter=delimiter, strict=True), [])
        self._columns = [name.strip() for name in head]
        _check_columns(file, self._columns)
        self.schema = pa.schema([pa.field(name, pa.string()) for name in self._columns])

    def rows(self, *, only: str | None = None) -> Iterator[TableRow | ImportReject]:
        """All rows; blank lines are none."""
        csv.field_size_limit(_FIELD_CHARACTERS)
        with self._opened() as text:
            reader = csv.reader(text, delimiter=self._delimiter, strict=True)  # an open quote at the end is an error
            next(reader, None)
            while True:
                number = reader.line_num + 1
                try:
                    fields = next(reader, None)
                except csv.Error as error:
                    detail = f"lines {number} to {reader.line_num} cannot be read: {error}"
                    yield _row_reject(self.name, number, ImportReason.ROW_UNREADABLE, detail)
                    continue
                if fields is None:
                    return
                if fields:
                    yield self._row(number, reader.line_num, fields)

    def _row(self, number: int, last: int, fields: list[str]) -> TableRow | ImportReject:
        if len(fields) != len(self._columns):
            detail = f"lines {number} to {last} have {len(fields)} fields; the head has {len(self._columns)}"
            return _row_reject(self.name, number, ImportReason.WRONG_FIELDS, detail)
        try:
            "".join(fields).encode()
        except UnicodeEncodeError:
            detail = "the row holds bytes that are not UTF-8; convert the file"
            return _row_reject(self.name, number, ImportReason.NOT_UTF8, detail)
        return TableRow(number, {name: value or None for name, value in zip(self._columns, fields, strict=True)})

    def _opened(self) -> io.TextIOWrapper:
        return io.TextIOWrapper(_binary(self._file), encoding="utf-8-sig", errors="surrogateescape", newline="")


class JsonlTable:
    """One JSON object a line. The file is read once to learn its columns and what their values have in common."""

    def __init__(self, file: Path) -> None:
        self.name, self._file = file.name, file
        kinds: dict[str, set[str]] = {}
        for row in self._read():
            if isinstance(row, TableRow):
                for name, value in row.values.items():
                    kinds.setdefault(name, set()).add(_kind(value))
        _check_columns(file, list(kinds))
        self.schema = pa.schema([pa.field(name, _common(found)) for name, found in kinds.items()])

    def rows(self, *, only: str | None = None) -> Iterator[TableRow | ImportReject]:
        """All rows, their values as JSON has them."""
        yield from self._read()

    def _read(self) -> Iterator[TableRow | ImportReject]:
        with _binary(self._file) as file:
            for number, line in enumerate(file, 1):
                raw = line.removeprefix(_BOM) if number == 1 else line
                if raw.strip():
                    yield self._parsed(number, raw)

    def _parsed(self, number: int, raw: bytes) -> TableRow | ImportReject:
        try:
            value = json.loads(raw.decode())
            if b"\\u" in raw:
                json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be stored
        except UnicodeError as error:
            detail = f"the line holds what is not UTF-8: {first_line(error)}"
            return _row_reject(self.name, number, ImportReason.NOT_UTF8, detail)
        except (ValueError, RecursionError) as error:
            return _row_reject(self.name, number, ImportReason.ROW_UNREADABLE, f"the line is not JSON: {error}")
        if not isinstance(value, dict):
            detail = f"the line is a JSON {type(value).__name__}, no object"
            return _row_reject(self.name, number, ImportReason.ROW_UNREADABLE, detail)
        return TableRow(number, value)


class ParquetTable:
    """A Parquet file; its columns keep their types, dictionaries apart, which become what they stand for."""

    def __init__(self, file: Path) -> None:
        self.name, self._file = file.name, file
        schema = pq.read_schema(file)
        _check_columns(file, schema.names)
        self.schema = pa.schema([pa.field(field.name, _plain(field.type)) for field in schema])

    def rows(self, *, only: str | None = None) -> Iterator[TableRow | ImportReject]:
        """All rows, their values as Arrow scalars.

        Raises:
            RunError: a page is damaged.
        """
        fields = [field for field in self.schema if only in (None, field.name)]
        names = [field.name for field in fields]
        number = 0
        try:
            with pq.ParquetFile(self._file) as file:
                for batch in file.iter_batches(_BATCH_ROWS, columns=names):
                    columns = [
                        column.cast(field.type) if column.type != field.type else column
                        for column, field in zip(batch.columns, fields, strict=True)
                    ]
                    for values in zip(*columns, strict=True):
                        number += 1
                        yield TableRow(number, dict(zip(names, values, strict=True)))
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{self._file} cannot be read behind row {number}: {first_line(error)}") from error


def _binary(file: Path) -> BinaryIO:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def _check_columns(file: Path, names: list[str]) -> None:
    if not names:
        raise CatalogError(f"{file} has no columns; a table begins with a line of their names")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CatalogError(f"{file} has the column {twice!r} twice; a column has a name of its own")


def _row_reject(source: str, number: int, reason: ImportReason, detail: str) -> ImportReject:
    return ImportReject(source, number, "row", None, "", reason, detail)


def _kind(value: object) -> str:
    """What a JSON value is; a number beyond 64 bits is kept as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return "int" if -_INT64 <= value < _INT64 else "other"
    if isinstance(value, list):
        return "list" if all(item is None or isinstance(item, str) for item in value) else "other"
    return {type(None): "null", bool: "bool", float: "float", str: "str"}.get(type(value), "other")


def _common(kinds: set[str]) -> pa.DataType:
    """The Arrow type of a column in which these kinds of values were found."""
    found = kinds - {"null"}
    if found == {"list"}:
        return pa.list_(pa.string())
    if found and found <= {"int", "float"}:
        return pa.float64() if "float" in found else pa.int64()
    return pa.bool_() if found == {"bool"} else pa.string()


def _plain(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_dictionary(type_) else type_
