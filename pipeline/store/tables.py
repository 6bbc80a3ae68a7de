"""LanceDB tables: where they lie, fragments written by any process, and rows read back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
from lance.fragment import write_fragments

from pipeline.errors import CatalogError, first_line
from pipeline.paths import absolute, exists, is_uri, list_names, reach, share_settings
from pipeline.store.transactions import commit_once, persistent

READ_AHEAD_BYTES = 64 << 20
"""Of a scan that reads vectors; Lance's own 2 GiB are taken by every scan of a large table."""

_MAX_ROWS_PER_FILE = 1_000_000


@dataclass(frozen=True)
class Database:
    """A folder or object-store prefix of Lance tables, as `lancedb.connect(uri)` opens it."""

    uri: str

    def uri_of(self, table: str) -> str:
        """Where a table lies; Lance is told by the way how to reach it."""
        if is_uri(self.uri):
            share_settings()
        return f"{self.uri.rstrip('/')}/{table}.lance"

    def exists(self, table: str) -> bool:
        """Whether the table has a version; the folder alone may be left by a run that died as it made the table."""
        return any(name.endswith(".manifest") for name in list_names(f"{self.uri_of(table)}/_versions"))

    @persistent
    def dataset(self, table: str, version: int | None = None) -> Any:
        """The table at a version, or at its latest."""
        return lance.dataset(self.uri_of(table), version=version)

    def latest_version(self, table: str) -> int:
        """Number of the table's newest version, 0 where there is no table."""
        return int(self.dataset(table).version) if self.exists(table) else 0


def open_database(path: str) -> Database:
    """A database that is there.

    Raises:
        CatalogError: it is not.
    """
    db = Database(absolute(path))
    try:
        reach_database(db)
    except OSError as error:
        raise CatalogError(f"the database {path} cannot be read: {first_line(error)}") from error
    if not exists(db.uri) or Path(db.uri).is_file():
        raise CatalogError(f"there is no database at {path}")
    return db


def reach_database(db: Database) -> None:
    """See within seconds that a database's store answers pyarrow and Lance alike; local folders pass.

    Raises:
        OSError: a few words that say why not.
    """
    if not is_uri(db.uri):
        return
    reach(db.uri)
    try:
        db.dataset("_nothing")
    except (OSError, ValueError) as error:
        said = str(error)
        if "was not found" in said:
            return
        if "credentials" in said:
            raise OSError(
                "there are no credentials for its store: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile "
                "or role that the machine has"
            ) from error
        raise OSError(first_line(error)) from error


def write_rows(
    db: Database, table: str, schema: pa.Schema, rows: pa.Table | Iterable[pa.RecordBatch], *, is_whole: bool
) -> list[str]:
    """Write rows as fragments that belong to no version yet; any process may do it.

    Args:
        db: the database.
        table: the table's name.
        schema: of the table.
        rows: in any order; what an iterator of them raises comes out as it is, where Lance has words of its own for it.
        is_whole: whether `commits.replace_all` will take the fragments, else `replace_rows`.

    Returns:
        The fragments' metadata as JSON, for `commit`; empty where there are no rows.
    """
    if isinstance(rows, pa.Table):
        if not rows.num_rows:
            return []
        rows = rows.select(schema.names).cast(schema)
    raised: list[Exception] = []

    def batches(made: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        try:
            yield from made
        except Exception as error:  # the boundary to Lance, on whose far side it is raised again
            raised.append(error)
            raise

    if not isinstance(rows, pa.Table):
        rows = pa.RecordBatchReader.from_batches(schema, batches(rows))
    mode = "append" if not is_whole else "overwrite" if db.exists(table) else "create"
    try:
        fragments = write_fragments(
            rows, db.uri_of(table), schema=schema, mode=mode, max_rows_per_file=_MAX_ROWS_PER_FILE
        )
    except (OSError, RuntimeError) as error:
        raise (raised[0] if raised else error) from None
    return [json.dumps(fragment.to_json()) for fragment in fragments if fragment.physical_rows]


def append_row(db: Database, table: str, schema: pa.Schema, row: Mapping[str, object]) -> None:
    """Add one row to a table that only grows; columns that it did not have yet are null in its older rows."""
    ensure(db, table, schema)
    dataset = db.dataset(table)
    if missing := [field for field in schema if field.name not in dataset.schema.names]:
        dataset.add_columns(missing)
    rows = pa.Table.from_pylist([dict(row)], schema=schema)
    fragments = write_fragments(rows, db.uri_of(table), schema=schema, mode="append")
    commit_once(db.uri_of(table), lance.Transaction(db.latest_version(table), lance.LanceOperation.Append(fragments)))


def ensure(db: Database, table: str, schema: pa.Schema) -> None:
    """Create an empty table where there is none, whoever else does so at the same moment.

    `write_dataset(mode="create")` would not do: the slower of two writers rebases its creation onto the table of the
    faster one, as an overwrite, and the rows that were there meanwhile are gone. So the commit may not be retried.
    """
    if db.exists(table):
        return
    transaction = lance.Transaction(0, lance.LanceOperation.Overwrite(schema, []))
    try:
        commit_once(db.uri_of(table), transaction, max_rebases=0)
    except (OSError, RuntimeError):
        if not db.exists(table):
            raise


def vectors_by_sha256(
    db: Database, table: str, version: int, column: str, sha256s: Sequence[str], fields: Sequence[str]
) -> pa.Table:
    """Rows of a released table whose hash column holds one of `sha256s`, one row per hash that is there.

    A photo may be in thousands of products, so the rows are found by hash and address first, and one of each is read.

    Args:
        db: the database.
        table: `products` or `images`.
        version: the released version.
        column: the hash column; it has a scalar index.
        sha256s: lowercase hex digests, at most a few thousand.
        fields: columns to return beside it.
    """
    quoted = ",".join(f"'{value}'" for value in sha256s)  # hex digests of our own: nothing to escape
    dataset = db.dataset(table, version)
    found = dataset.to_table(columns=[column], filter=f"{column} IN ({quoted})", with_row_address=True)
    first = found.group_by(column).aggregate([("_rowaddr", "min")]).column("_rowaddr_min")
    return dataset._take_rows(sorted(first.to_pylist()), columns=[column, *fields])
