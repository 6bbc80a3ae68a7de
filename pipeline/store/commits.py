"""The driver's commits, one a table and run: each carries its run's id, counts once, and lies on nobody else's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lance
import pyarrow as pa
import pyarrow.compute as pc
from lance.fragment import FragmentMetadata

from pipeline.errors import ReleaseRefused, RunError
from pipeline.store.tables import Database
from pipeline.store.transactions import commit_once, persistently

_RUN = "run_id"


def replace_all(db: Database, table: str, schema: pa.Schema, fragments: Sequence[str], *, run_id: str) -> int:
    """Make the fragments the whole table, in one commit; the table is created where there is none.

    Returns:
        How many rows the table has to have now.
    """
    new = [FragmentMetadata.from_json(f) for f in fragments]
    operation = lance.LanceOperation.Overwrite(schema, new)
    commit(db, table, operation, db.latest_version(table), run_id=run_id)
    return sum(int(fragment.physical_rows) for fragment in new)


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
        How many rows the table has to have now.
    """
    dataset = db.dataset(table)
    count = int(dataset.count_rows())
    removed: list[int] = []
    updated: list[FragmentMetadata] = []
    for fragment in dataset.get_fragments():
        rows = fragment.to_table(columns=list(keys), with_row_address=True)
        leaving = _any([pc.is_in(rows.column(name), pa.array(values)) for name, values in keys.items()])
        addresses = rows.column("_rowaddr").filter(leaving).to_pylist()
        if not addresses:
            continue
        count -= len(addresses)
        if len(addresses) == rows.num_rows:
            removed.append(fragment.fragment_id)
        else:
            updated.append(fragment.delete(f"_rowaddr IN ({','.join(map(str, addresses))})"))
    new = [FragmentMetadata.from_json(f) for f in fragments]
    operation = lance.LanceOperation.Update(removed_fragment_ids=removed, updated_fragments=updated, new_fragments=new)
    commit(db, table, operation, int(dataset.version), run_id=run_id)
    return count + sum(int(fragment.physical_rows) for fragment in new)


def commit(db: Database, table: str, operation: Any, read_version: int, *, run_id: str) -> int:
    """Commit an operation as the version after `read_version`.

    Returns:
        The new version.

    Raises:
        RunError: another writer committed meanwhile; Lance put this commit on top of that.
        OSError, RuntimeError: it could not be written.
    """
    transaction = lance.Transaction(read_version, operation, transaction_properties={_RUN: run_id})
    version = commit_once(db.uri_of(table), transaction)
    if version != read_version + 1:
        raise RunError(
            f"someone else wrote to the table {table} (version {version - 1}) while this run did; see that nothing "
            "else writes to this database, and run it again"
        )
    return version


def restore(db: Database, versions: Mapping[str, int], *, run_id: str) -> dict[str, int]:
    """Make the given versions the latest ones, where they are not; that costs milliseconds and copies no data.

    Returns:
        The new version of each table that had to be restored.
    """
    restored: dict[str, int] = {}
    for table, version in versions.items():
        if not _is_copy(db, table, db.latest_version(table), version):
            restored[table] = restore_version(db, table, version, run_id=run_id)
    return restored


def restore_version(db: Database, table: str, version: int, *, run_id: str) -> int:
    """Make a version the latest one again, even where it is; the new version is this run's, whoever wrote the old one.

    Returns:
        The new version.
    """
    return commit(db, table, lance.LanceOperation.Restore(version), db.latest_version(table), run_id=run_id)


def is_ours(db: Database, table: str, version: int) -> bool:
    """Whether a run of this project made the version; an index changes no row, so it counts as ours."""
    transaction = _transaction(db, table, version)
    is_index = isinstance(transaction.operation, lance.LanceOperation.CreateIndex)
    return is_index or _RUN in (transaction.transaction_properties or {})


def check_commits(db: Database, table: str, version: int, base_version: int | None, *, run_id: str) -> None:
    """See that a version holds only what a release held and what this run did, from the newest commit back.

    Args:
        db: the database.
        table: the table's name.
        version: what is going to be released; it has to be the latest.
        base_version: what the parent release holds, None without one.
        run_id: of this run.

    Raises:
        ReleaseRefused: the version is not the latest, or someone else's commit is in it.
    """
    latest = db.latest_version(table)
    if latest != version:
        raise ReleaseRefused(
            f"the table {table} moved from version {version} to {latest} while this run was ending: someone else "
            "writes to this database. Nothing was released; stop that, and run it again"
        )
    while version > 0 and version != base_version:
        transaction = _transaction(db, table, version)
        operation, properties = transaction.operation, transaction.transaction_properties or {}
        if isinstance(operation, lance.LanceOperation.Restore) and operation.version == base_version:
            return
        if properties.get(_RUN) == run_id:
            if isinstance(operation, lance.LanceOperation.Restore | lance.LanceOperation.Overwrite):
                return  # it decides what the table holds, whatever was before
        elif not isinstance(operation, lance.LanceOperation.CreateIndex):
            by = f" of run {properties[_RUN]}" if _RUN in properties else ""
            raise ReleaseRefused(
                f"version {version} of the table {table} was not written by this run, but by someone else's "
                f"{type(operation).__name__}{by}. Nothing was released; see that nothing else writes to this database, "
                "and run it again"
            )
        version -= 1


def _is_copy(db: Database, table: str, version: int, of: int) -> bool:
    """Whether a version is another one, or was restored from it."""
    if version == of:
        return True
    operation = _transaction(db, table, version).operation
    return isinstance(operation, lance.LanceOperation.Restore) and operation.version == of


def _transaction(db: Database, table: str, version: int) -> lance.Transaction:
    """How a version came to be.

    Raises:
        RunError: the version is not there, or does not tell.
    """
    try:
        transaction = persistently(lambda: db.dataset(table).read_transaction(version))
    except (OSError, ValueError) as error:
        raise RunError(f"version {version} of the table {table} is not there any more: {error}") from error
    if transaction is None:
        return lance.Transaction(version - 1, lance.LanceOperation.BaseOperation())
    return transaction


def _any(masks: Sequence[Any]) -> Any:
    result = masks[0]
    for mask in masks[1:]:
        result = pc.or_(result, mask)
    return result
