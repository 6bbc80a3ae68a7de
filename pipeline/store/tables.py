"""LanceDB tables: fragments written anywhere, committed by the driver alone, one commit a table and run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lance
import pyarrow as pa
import pyarrow.compute as pc
from lance.fragment import FragmentMetadata, write_fragments

from pipeline.paths import list_names

_MAX_ROWS_PER_FILE = 1_000_000


@dataclass(frozen=True)
class Database:
    """A folder or object-store prefix of Lance tables, as `lancedb.connect(uri)` opens it."""

    uri: str

    def uri_of(self, table: str) -> str:
        """Where a table lies."""
        return f"{self.uri.rstrip('/')}/{table}.lance"

    def exists(self, table: str) -> bool:
        """Whether the table has a version; the folder alone may be left by a run that died as it made the table."""
        return any(name.endswith(".manifest") for name in list_names(f"{self.uri_of(table)}/_versions"))

    def dataset(self, table: str, version: int | None = None) -> Any:
        """The table at a version, or at its latest."""
        return lance.dataset(self.uri_of(table), version=version)

    def latest_version(self, table: str) -> int:
        """Number of the table's newest version, 0 where there is no table."""
        return int(self.dataset(table).version) if self.exists(table) else 0


def write_rows(
    db: Database, table: str, schema: pa.Schema, rows: pa.Table | Iterable[pa.RecordBatch], *, is_whole: bool
) -> list[str]:
    """Write rows as fragments that belong to no version yet; any process may do it.

    Args:
        db: the database.
        table: the table's name.
        schema: of the table.
        rows: in any order.
        is_whole: whether `replace_all` will take the fragments, else `replace_rows`.

    Returns:
        The fragments' metadata as JSON, for `commit`; empty where there are no rows.
    """
    if isinstance(rows, pa.Table):
        if not rows.num_rows:
            return []
        rows = rows.select(schema.names).cast(schema)
    else:
        rows = pa.RecordBatchReader.from_batches(schema, iter(rows))
    mode = "append" if not is_whole else "overwrite" if db.exists(table) else "create"
    fragments = write_fragments(rows, db.uri_of(table), schema=schema, mode=mode, max_rows_per_file=_MAX_ROWS_PER_FILE)
    return [json.dumps(fragment.to_json()) for fragment in fragments if fragment.physical_rows]


def replace_all(db: Database, table: str, schema: pa.Schema, fragments: Sequence[str], *, run_id: str) -> int:
    """Make the fragments the whole table, in one commit; the table is created where there is none.

    Returns:
        The new version.
    """
    operation = lance.LanceOperation.Overwrite(schema, [FragmentMetadata.from_json(f) for f in fragments])
    return _commit(db, table, operation, db.latest_version(table), run_id)


def replace_rows(
    db: Database, table: str, keys: Mapping[str, pa.Array], fragments: Sequence[str], *, run_id: str
) -> int:
    """Take out the rows whose columns hold one of `keys`, and add the fragments, in one commit on the latest version.

    Args:
        db: the database.
        table: the table's name.
        keys: column to values; a row that matches in any of the columns leaves.
        fragments: from `write_rows`.
        run_id: kept in the transaction's properties.

    Returns:
        The new version.
    """
    dataset = db.dataset(table)
    removed: list[int] = []
    updated: list[FragmentMetadata] = []
    for fragment in dataset.get_fragments():
        rows = fragment.to_table(columns=list(keys), with_row_address=True)
        leaving = _any([pc.is_in(rows.column(name), pa.array(values)) for name, values in keys.items()])
        addresses = rows.column("_rowaddr").filter(leaving).to_pylist()
        if not addresses:
            continue
        if len(addresses) == rows.num_rows:
            removed.append(fragment.fragment_id)
        else:
            updated.append(fragment.delete(f"_rowaddr IN ({','.join(map(str, addresses))})"))
    new = [FragmentMetadata.from_json(f) for f in fragments]
    operation = lance.LanceOperation.Update(removed_fragment_ids=removed, updated_fragments=updated, new_fragments=new)
    return _commit(db, table, operation, int(dataset.version), run_id)


def append_row(db: Database, table: str, schema: pa.Schema, row: Mapping[str, object]) -> None:
    """Add one row to a table that only grows."""
    ensure(db, table, schema)
    lance.write_dataset(pa.Table.from_pylist([dict(row)], schema=schema), db.uri_of(table), mode="append")


def ensure(db: Database, table: str, schema: pa.Schema) -> None:
    """Create an empty table where there is none, whoever else does so at the same moment.

    `write_dataset(mode="create")` would not do: the slower of two writers rebases its creation onto the table of the
    faster one, as an overwrite, and the rows that were there meanwhile are gone. So the commit may not be retried.
    """
    if db.exists(table):
        return
    transaction = lance.Transaction(0, lance.LanceOperation.Overwrite(schema, []))
    try:
        lance.LanceDataset.commit(db.uri_of(table), transaction, max_retries=0)
    except (OSError, RuntimeError):
        if not db.exists(table):
            raise


def restore(db: Database, versions: Mapping[str, int]) -> None:
    """Make the released versions the latest ones, where a run that died left commits behind."""
    for table, version in versions.items():
        if db.latest_version(table) != version:
            db.dataset(table, version).restore()


def vectors_by_sha256(
    db: Database, table: str, version: int, column: str, sha256s: Sequence[str], fields: Sequence[str]
) -> pa.Table:
    """Rows of a released table whose hash column holds one of `sha256s`, one row per hash at least.

    Args:
        db: the database.
        table: `products` or `images`.
        version: the released version.
        column: the hash column; it has a scalar index.
        sha256s: lowercase hex digests, at most a few thousand.
        fields: columns to return beside it.
    """
    quoted = ",".join(f"'{value}'" for value in sha256s)  # hex digests of our own: nothing to escape
    return db.dataset(table, version).to_table(columns=[column, *fields], filter=f"{column} IN ({quoted})")


def _commit(db: Database, table: str, operation: Any, read_version: int, run_id: str) -> int:
    transaction = lance.Transaction(read_version, operation, transaction_properties={"run_id": run_id})
    return int(lance.LanceDataset.commit(db.uri_of(table), transaction).version)


def _any(masks: Sequence[Any]) -> Any:
    result = masks[0]
    for mask in masks[1:]:
        result = pc.or_(result, mask)
    return result
