"""Releases: one row names the versions of all tables that belong together, and readers follow that row."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from pipeline.errors import QueryError, ReleaseRefused
from pipeline.store.commits import check_commits
from pipeline.store.schemas import SCHEMA_VERSION, TABLES, releases_schema
from pipeline.store.tables import Database, ensure
from pipeline.store.transactions import persistent, persistently


@dataclass(frozen=True)
class Release:
    """One published state of a database.

    Attributes:
        versions: table name to the Lance version that belongs to this release.
        model: the model as it was named by the run.
        index: how each vector column is searched, by mode.
        counts: what the run that made it counted.
        checks: what was verified before it was written.
        model_settings: how the model was loaded, as far as it is part of model_id: a query has to be embedded the same.
    """

    release: int
    parent: int | None
    created_at: datetime
    versions: Mapping[str, int]
    model: str
    model_id: str
    fingerprint: str
    average_text_weight: float
    index: Mapping[str, Any]
    counts: Mapping[str, Any]
    checks: Mapping[str, Any]
    schema_version: int = SCHEMA_VERSION
    model_settings: Mapping[str, Any] = field(default_factory=dict)


@persistent
def list_releases(db: str | Database) -> list[Release]:
    """All releases, oldest first; empty where nothing was released."""
    database = db if isinstance(db, Database) else Database(db)
    if not database.exists("releases"):
        return []
    rows = database.dataset("releases").to_table().to_pylist()
    return sorted((_from_row(row) for row in rows), key=lambda release: release.release)


def newest_release(db: str | Database) -> Release | None:
    """The release that readers get, or None where nothing was released."""
    releases = list_releases(db)
    return releases[-1] if releases else None


def get_release(db: str | Database, number: int) -> Release:
    """One release by its number.

    Raises:
        QueryError: there is no such release.
    """
    releases = list_releases(db)
    for release in releases:
        if release.release == number:
            return release
    known = ", ".join(str(release.release) for release in releases) or "none"
    raise QueryError(f"there is no release {number}; there are: {known}")


def publish(db: Database, release: Release, *, run_id: str) -> Release:
    """Make a release visible to readers: compare-and-swap on its number.

    The versions are tagged by the run before the row exists, so that no cleanup can take them; only the winner of the
    number gives them the tag `release-N`. What dies on the way is put right by `recovery.recover`.

    Raises:
        ReleaseRefused: another run took the number first, or a version holds what this run did not write.
    """
    newest = newest_release(db)
    if (newest.release if newest else None) != release.parent:
        raise _lost_race(release)
    for table in release.versions:
        base_version = newest.versions.get(table) if newest else None
        check_commits(db, table, release.versions[table], base_version, run_id=run_id)
    for table in release.versions:
        tag(db, table, f"run-{run_id}", release.versions[table])
    ensure(db, "releases", releases_schema())
    if not insert_row(db, release):
        for table in release.versions:
            untag(db, table, f"run-{run_id}")
        raise _lost_race(release)
    for table in release.versions:
        tag(db, table, f"release-{release.release}", release.versions[table])
        untag(db, table, f"run-{run_id}")
    return release


def insert_row(db: Database, release: Release) -> bool:
    """Write a release's row; False where the number is taken."""
    row = pa.Table.from_pylist([_to_row(release)], schema=releases_schema())
    insert = db.dataset("releases").merge_insert("release").when_not_matched_insert_all()
    try:
        # Without use_index(False) a scalar index on the key lets two writers both insert the number.
        inserted = persistently(lambda: insert.use_index(False).execute(row)["num_inserted_rows"])
    except (OSError, RuntimeError):
        if release in list_releases(db):  # it was written, only the answer was lost
            return True
        raise
    return bool(inserted == 1) or release in list_releases(db)


def tag(db: Database, table: str, name: str, version: int) -> bool:
    """Give a version a tag, so that no cleanup takes it; False where it has it already."""
    tags = db.dataset(table).tags

    def set_tag() -> bool:
        known = tags.list()
        if name not in known:
            tags.create(name, version)
        elif known[name]["version"] != version:
            tags.update(name, version)
        else:
            return False
        return True

    def is_set() -> bool | None:
        return True if tags.list().get(name, {}).get("version") == version else None

    return persistently(set_tag, is_set)


def untag(db: Database, table: str, name: str) -> None:
    """Take a tag away; it may be gone already."""
    with contextlib.suppress(OSError, ValueError):
        persistently(lambda: db.dataset(table).tags.delete(name))


def _lost_race(release: Release) -> ReleaseRefused:
    return ReleaseRefused(
        f"another run published release {release.release} while this one was running; run it again on top of that"
    )


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def _from_row(row: dict[str, Any]) -> Release:
    return Release(
        release=row["release"],
        parent=row["parent"],
        created_at=row["created_at"],
        versions={table: version for table in TABLES if (version := row.get(f"{table}_version")) is not None},
        model=row["model"],
        model_id=row["model_id"],
        fingerprint=row["fingerprint"],
        average_text_weight=row["average_text_weight"],
        index=json.loads(row["index"]),
        counts=json.loads(row["counts"]),
        checks=json.loads(row["checks"]),
        schema_version=row["schema_version"],
        model_settings=json.loads(row["model_settings"] or "{}"),
    )


def _to_row(release: Release) -> dict[str, Any]:
    return {
        "release": release.release,
        "parent": release.parent,
        "created_at": release.created_at,
        **{f"{table}_version": release.versions.get(table) for table in TABLES},
        "model": release.model,
        "model_id": release.model_id,
        "fingerprint": release.fingerprint,
        "average_text_weight": release.average_text_weight,
        "index": json.dumps(release.index),
        "counts": json.dumps(release.counts),
        "checks": json.dumps(release.checks),
        "schema_version": release.schema_version,
        "model_settings": json.dumps(release.model_settings),
    }
