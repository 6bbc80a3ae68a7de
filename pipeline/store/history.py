"""Going back to an older release, making given versions a release, and letting old releases go."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

from pipeline.errors import QueryError, ReleaseRefused
from pipeline.store.commits import restore_version
from pipeline.store.files import damaged_files
from pipeline.store.recovery import recover, remove_orphans
from pipeline.store.releases import Release, get_release, list_releases, now, publish, untag
from pipeline.store.tables import Database
from pipeline.store.transactions import persistently

_MOST_DAYS = 100_000  # before that there are no dates
_KEPT_VERSIONS = 20  # of tables that a reader looks at for milliseconds


@dataclass(frozen=True)
class Pruned:
    """What pruning took away.

    Attributes:
        releases: their numbers.
        kept: the numbers of those that stay.
        freed_bytes: of the files that only they used; 0 in a dry run.
    """

    releases: list[int]
    kept: list[int]
    freed_bytes: int


def rollback(db: Database, to: int | None = None, *, run_id: str) -> Release:
    """Publish a new release that holds what an older one holds; readers follow it as any other. Under the lease.

    Args:
        db: the database.
        to: the older release, or a later one to go forward again; None for the one before what is released now.
        run_id: kept with the commits.

    Raises:
        QueryError: there is no such release, or none before.
        ReleaseRefused: files of that release are gone.
    """
    recover(db, run_id, removes_orphans=False)
    releases = {release.release: release for release in list_releases(db)}
    if not releases:
        raise QueryError(f"nothing was released in {db.uri} yet, so there is nothing to go back to")
    newest = releases[max(releases)]
    older = get_release(db, to) if to is not None else _before(newest, releases)
    if older.release == newest.release:
        raise QueryError(f"release {older.release} is what readers get already")
    found = [f"{table}: {name}" for table, n in older.versions.items() for name in damaged_files(db, table, n)]
    if found:
        raise ReleaseRefused(
            f"release {older.release} cannot be read any more; missing or cut short: {', '.join(found)}"
        )
    counts = {"rolled_back_to": older.release, "rolled_back_from": newest.release}
    return promote(db, replace(older, counts=counts), run_id=run_id)


def promote(db: Database, release: Release, *, run_id: str) -> Release:
    """Publish versions of the tables as the next release, whatever lies after them. Under the lease.

    Args:
        db: the database.
        release: the versions and everything that is said of them; number, parent and time are set here.
        run_id: kept with the commits.

    Returns:
        The release as published: it names the restored versions, which are the latest of their tables.
    """
    releases = list_releases(db)
    parent = releases[-1].release if releases else None
    versions = {table: restore_version(db, table, n, run_id=run_id) for table, n in release.versions.items()}
    made = replace(release, release=(parent or 0) + 1, parent=parent, created_at=now(), versions=versions)
    return publish(db, made, run_id=run_id)


def prune(db: Database, keep: int, younger_than_days: float, *, dry_run: bool = False) -> Pruned:
    """Let old releases go: their rows, their tags, and the files that only they used. Under the lease.

    Args:
        db: the database.
        keep: the newest releases that stay, at least one.
        younger_than_days: releases made within as many days stay too.
        dry_run: only tell which would go.

    Raises:
        QueryError: `keep` is under 1, or the days cannot be counted back.
    """
    if keep < 1:
        raise QueryError(f"--keep {keep}: the newest release always stays; give 1 or more")
    if not 0 <= younger_than_days <= _MOST_DAYS:
        raise QueryError(f"--younger-than-days takes a number from 0 to {_MOST_DAYS:,}; got {younger_than_days:g}")
    releases = list_releases(db)
    youngest = now() - timedelta(days=younger_than_days)
    old = [release.release for release in releases[:-keep] if release.created_at < youngest]
    kept = [release.release for release in releases if release.release not in old]
    if dry_run or not releases:
        return Pruned(old, kept, 0)
    if old:
        gone = f"release IN ({', '.join(map(str, old))})"
        persistently(lambda: db.dataset("releases").delete(gone))
        for table in releases[-1].versions:
            known = db.dataset(table).tags.list()
            for name in known.keys() & {f"release-{number}" for number in old}:
                untag(db, table, name)
    recover(db, uuid.uuid4().hex[:12], removes_orphans=False)  # tags without a release go, here or after a crash
    freed = sum(remove_orphans(db, table, others_before=youngest) for table in releases[-1].versions)
    for table in ("releases", "runs"):
        _compact(db, table)
    return Pruned(old, kept, freed)


def _before(newest: Release, releases: Mapping[int, Release]) -> Release:
    """The release before the one whose content `newest` has; after a rollback that is the one before its target."""
    origin = newest
    while (target := origin.counts.get("rolled_back_to")) is not None and target in releases:
        origin = releases[target]
    before = releases.get(origin.parent or 0) if target is None else None
    if before is None:
        others = ", ".join(str(number) for number in sorted(releases) if number != newest.release) or "none"
        raise QueryError(
            f"the release before release {origin.release} is not there any more, or never was; say which one is meant "
            f"(--to). Besides release {newest.release} there are: {others}"
        )
    return before


def _compact(db: Database, table: str) -> None:
    """One file in place of one per row, in a table that grows by a row a time."""
    if db.exists(table):
        dataset = db.dataset(table)
        with contextlib.suppress(OSError, RuntimeError):  # a run that was turned away may be adding its row
            dataset.optimize.compact_files()
            dataset.cleanup_old_versions(retain_versions=_KEPT_VERSIONS)
