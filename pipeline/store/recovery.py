"""What a run that died left behind, put right under the lease: tags, latest versions, and files of no version."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pipeline.store.commits import is_ours, restore
from pipeline.store.releases import Release, list_releases, tag, untag
from pipeline.store.tables import Database
from pipeline.store.transactions import persistent

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovery:
    """What was put right; all empty after runs that ended in order.

    Attributes:
        tagged: tags that releases lacked, as `products release-3`.
        untagged: tags of dead runs and of pruned releases.
        restored: tables whose latest version was not the release's, and their new version.
        lost: versions of releases that are not there any more, as `images of release 2`.
        freed_bytes: of files that no version, or only a dead run's, knew.
    """

    tagged: list[str] = field(default_factory=list)
    untagged: list[str] = field(default_factory=list)
    restored: Mapping[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    freed_bytes: int = 0


def recover(db: Database, run_id: str, *, removes_orphans: bool = True) -> Recovery:
    """Bring a database back to its newest release. Call it under the lease, before anything is written.

    Args:
        db: the database; without a release there is nothing to bring back, and a first load overwrites what it finds.
        run_id: kept with the restoring commits.
        removes_orphans: delete dead runs' versions and files. Versions that other programs committed stay.
    """
    releases = list_releases(db)
    if not releases:
        return Recovery()
    tagged, untagged, lost = _repair_tags(db, releases)
    restored = restore(db, releases[-1].versions, run_id=run_id)
    freed = sum(remove_orphans(db, table) for table in releases[-1].versions) if removes_orphans else 0
    recovery = Recovery(tagged, untagged, restored, lost, freed)
    if lost:
        log.warning("cleaned away by someone else: %s; these releases cannot be read", ", ".join(lost))
    if tagged or untagged or restored:
        log.info("put right after a run that did not end: %s", ", ".join([*tagged, *untagged, *restored]))
    return recovery


@persistent
def remove_orphans(db: Database, table: str, *, others_before: datetime | None = None) -> int:
    """Delete files that belong to no version, and versions between releases; only the latest and tagged ones are safe.

    Nobody else may be writing: Lance cannot tell a dead run's file from one about to be committed.

    Args:
        db: the database.
        table: the table's name.
        others_before: delete other programs' versions too, where they were committed before that time.

    Returns:
        The bytes freed.
    """
    dataset = db.dataset(table)
    latest = int(dataset.version)
    kept = {known["version"] for known in dataset.tags.list().values()} | {latest}
    removed = [
        version["version"]
        for version in dataset.versions()
        if version["version"] not in kept
        and (is_ours(db, table, version["version"]) or _is_before(version["timestamp"], others_before))
    ]
    stats = dataset.cleanup_old_versions(
        versions=[*removed, latest],  # the latest is never removed; alone it stands for files of no version
        delete_unverified=True,
        error_if_tagged_old_versions=False,
    )
    return int(stats.bytes_removed)


def _is_before(committed: datetime, moment: datetime | None) -> bool:
    return moment is not None and committed.astimezone(UTC) < moment  # Lance gives local time without a zone


@persistent
def _repair_tags(db: Database, releases: list[Release]) -> tuple[list[str], list[str], list[str]]:
    """Give every release's versions its tag, and leave no other tag of ours: tags set, tags removed, versions lost."""
    tagged: list[str] = []
    untagged: list[str] = []
    lost: list[str] = []
    names = {f"release-{release.release}" for release in releases}
    for table in releases[-1].versions:
        known = db.dataset(table).tags.list()
        for release in releases:
            name, version = f"release-{release.release}", release.versions.get(table)
            if version is None:
                continue
            if name in known and known[name]["version"] == version:
                continue
            try:
                tag(db, table, name, version)
                tagged.append(f"{table} {name}")
            except (OSError, ValueError):
                lost.append(f"{table} of release {release.release}")
        for name in known:
            is_ours_ = name.startswith("run-") or (name.startswith("release-") and name[8:].isdigit())
            if is_ours_ and name not in names:
                untag(db, table, name)
                untagged.append(f"{table} {name}")
    return tagged, untagged, lost
