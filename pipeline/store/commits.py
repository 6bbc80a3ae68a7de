"""The driver's commits, one a table and run: each carries its run's id, counts once, and lies on nobody else's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lance
import pyarrow as pa
import pyarrow.compute as pc
from lance.fragment import FragmentMetadata

from pipeline.errors import ReleaseRefused, RunError
from pipeline.store.tables import READ_AHEAD_BYTES, Database, write_rows
from pipeline.store.transactions import commit_once, persistently

_RUN = "run_id"
_BATCH_ROWS = 4096
WORN_SHARE = 0.3
"""A fragment of which more is deleted is written anew: reading it reads what is gone, too."""
SMALL_ROWS, MOST_SMALL = 50_000, 16
"""More fragments of fewer rows are written into one: each costs a file to open, and an index its own segment."""


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
    db: Database,
    table: str,
    keys: Mapping[str, pa.Array],
    fragments: Sequence[str],
    *,
    run_id: str,
    both: Mapping[str, pa.Array] | None = None,
) -> int:
    """Take out the rows whose columns hold one of `keys`, and add the fragments, in one commit on the latest version.

    Fragments of which more than `WORN_SHARE` is deleted, and those under `SMALL_ROWS` once there are more than
    `MOST_SMALL` of them, are written anew in the same commit: a table of many small changes stays quick to read.

    Args:
        db: the database.
        table: the table's name.
        keys: column to values; a row that matches in any of the columns leaves.
        fragments: from `write_rows`.
        run_id: kept in the transaction's properties.
        both: column to values; a row that matches in all of the columns leaves too.

    Returns:
        How many rows the table has to have now.
    """
    dataset = db.dataset(table)
    count = int(dataset.count_rows())
    values = {name: pa.array(wanted) for name, wanted in keys.items()}
    removed: list[int] = []
    changed: list[tuple[Any, list[int]]] = []
    kept: list[Any] = []
    for fragment in dataset.get_fragments():
        rows = fragment.to_table(columns=list({**keys, **(both or {})}), with_row_address=True)
        leaving = _any([pc.is_in(rows.column(name), wanted) for name, wanted in values.items()])
        if both:
            leaving = pc.or_(leaving, _all([pc.is_in(rows.column(name), wanted) for name, wanted in both.items()]))
        addresses = rows.column("_rowaddr").filter(leaving).to_pylist()
        count -= len(addresses)
        if len(addresses) == rows.num_rows:
            removed.append(fragment.fragment_id)
        elif addresses:
            changed.append((fragment, addresses))
        else:
            kept.append(fragment)
    worn = _worn(changed, kept)
    updated = [
        fragment.delete(f"_rowaddr IN ({','.join(map(str, addresses))})")
        for fragment, addresses in changed
        if fragment.fragment_id not in worn
    ]
    new = [FragmentMetadata.from_json(f) for f in fragments]
    added = sum(int(fragment.physical_rows) for fragment in new)
    if worn:
        leaving_rows = {fragment.fragment_id: addresses for fragment, addresses in changed}
        batches = _remaining([f for f in dataset.get_fragments() if f.fragment_id in worn], leaving_rows)
        again = write_rows(db, table, dataset.schema, batches, is_whole=False)
        new += [FragmentMetadata.from_json(f) for f in again]
        removed += sorted(worn)
    operation = lance.LanceOperation.Update(removed_fragment_ids=removed, updated_fragments=updated, new_fragments=new)
    commit(db, table, operation, int(dataset.version), run_id=run_id)
    return count + added


def _worn(changed: Sequence[tuple[Any, Sequence[int]]], kept: Sequence[Any]) -> set[int]:
    """Fragments to be written anew: mostly deleted, or small and many."""
    after = {fragment: fragment.num_deletions + len(addresses) for fragment, addresses in changed}
    after |= {fragment: fragment.num_deletions for fragment in kept}
    worn = {f.fragment_id for f, deleted in after.items() if deleted > WORN_SHARE * f.physical_rows}
    small = {f.fragment_id for f, deleted in after.items() if f.physical_rows - deleted < SMALL_ROWS}
    return worn | (small if len(small) > MOST_SMALL else set())


def _remaining(fragments: Sequence[Any], leaving: Mapping[int, Sequence[int]]) -> Iterator[pa.RecordBatch]:
    """The rows of fragments that do not leave."""
    for fragment in fragments:
        gone = pa.array(leaving.get(fragment.fragment_id, ()), pa.uint64())
        scanner = fragment.scanner(with_row_address=True, batch_size=_BATCH_ROWS, io_buffer_size=READ_AHEAD_BYTES)
        for batch in scanner.to_batches():
            stays = pc.invert(pc.is_in(batch.column("_rowaddr"), gone))
            rows = batch.filter(stays).drop_columns(["_rowaddr"])
            if rows.num_rows:
                yield rows


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


def _all(masks: Sequence[Any]) -> Any:
    return pc.invert(_any([pc.invert(mask) for mask in masks]))


def _any(masks: Sequence[Any]) -> Any:
    result = masks[0]
    for mask in masks[1:]:
        result = pc.or_(result, mask)
    return result
