"""Look at releases, go back to one, let old ones go: `python -m jobs.release list|show|publish|rollback|prune`."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from jobs.cli import JobParser, add_log_level, number, positive, run_job, start_log, tell

if TYPE_CHECKING:
    from pipeline.store.releases import Release
    from pipeline.store.tables import Database


_TABLES = ("products", "images", "rejects", "partitions", "catalog_rows")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(
        prog="python -m jobs.release",
        description="The releases of a database: list them, show one, put the tables right or release versions of "
        "them, go back to an older release, let old ones go.",
        epilog="exit codes: 0 done; 1 another run holds the database, or the release was refused; 2 wrong arguments",
    )
    actions = result.add_subparsers(dest="action", required=True, metavar="ACTION")
    shared = JobParser(add_help=False)
    shared.add_argument("--db", required=True, help="folder or object-store prefix of the LanceDB tables")
    shared.add_argument("--json", action="store_true", help="print one JSON object")
    add_log_level(shared)
    writer = JobParser(add_help=False, parents=[shared])
    writer.add_argument(
        "--wait-s", type=number, default=0.0, metavar="S", help="how long to wait for a run that holds the database"
    )
    actions.add_parser("list", parents=[shared], help="all releases, newest first")
    show = actions.add_parser("show", parents=[shared], help="everything that is known of a release")
    show.add_argument("number", nargs="?", type=positive, metavar="N", help="the newest if not given")
    publish = actions.add_parser(
        "publish", parents=[writer], help="put the tables right after a run that died; or release versions of them"
    )
    publish.add_argument(
        "--versions", type=_versions, metavar="products=7,images=5,rejects=3",
        help="verify these versions of the tables and publish them, with what the newest release says of the model",
    )  # fmt: skip
    publish.add_argument(
        "--min-recall", type=_share, default=0.99, metavar="R", help="floor of recall@10, as release.min_recall"
    )
    back = actions.add_parser("rollback", parents=[writer], help="publish again what an older release held")
    back.add_argument("--to", type=positive, metavar="N", help="the release before the present one if not given")
    prune = actions.add_parser("prune", parents=[writer], help="delete old releases and the files that only they used")
    prune.add_argument("--keep", type=positive, required=True, metavar="N", help="the newest N stay")
    prune.add_argument(
        "--younger-than-days", type=number, required=True, metavar="D", help="releases of the last D days stay too"
    )
    prune.add_argument("--dry-run", action="store_true", help="only tell which would go")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    start_log(arguments.log_level)

    def job() -> Mapping[str, Any]:
        from pipeline.store.tables import open_database

        result, lines = _ACTIONS[arguments.action](open_database(arguments.db), arguments)
        if not arguments.json:
            tell("\n".join(lines))
        return result

    return run_job(job, as_json=arguments.json)


def list_(db: Database, _: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """All releases, newest first."""
    from pipeline.store.releases import list_releases

    makers = _makers(db)
    releases = [_brief(release, makers) for release in reversed(list_releases(db))]
    current = releases[0]["release"] if releases else None
    lines = [
        f"{'*' if release['release'] == current else ' '} {release['release']:>4}  {release['created_at']}  "
        f"{release['products']:>9,} products  {release['images']:>9,} images  {release['model']}  {release['made_by']}"
        for release in releases
    ]
    return {"db": db.uri, "release": current, "releases": releases}, lines or [f"nothing was released in {db.uri} yet"]


def show(db: Database, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Everything of one release."""
    from pipeline.errors import QueryError
    from pipeline.store.releases import get_release, newest_release

    release = newest_release(db) if arguments.number is None else get_release(db, arguments.number)
    if release is None:
        raise QueryError(f"nothing was released in {db.uri} yet")
    told = asdict(release) | {"created_at": _time(release), "made_by": _brief(release, _makers(db))["made_by"]}
    lines: list[str] = []
    for name, value in told.items():
        if isinstance(value, Mapping):
            lines.append(name)
            lines += [f"  {key:<24} {_short(item)}" for key, item in value.items()]
        else:
            lines.append(f"{name:<26} {_short(value)}")
    return told, lines


def publish(db: Database, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Put the tables right, or make versions of them a release."""
    from pipeline.errors import QueryError
    from pipeline.store.history import promote
    from pipeline.store.indices import measure_indices
    from pipeline.store.recovery import recover
    from pipeline.store.releases import newest_release
    from pipeline.store.verify import verify

    with _lease(db, arguments, "publish") as (run_id, check):
        newest = newest_release(db)
        if newest is None:
            raise QueryError(f"nothing was released in {db.uri} yet; run jobs.backfill first")
        if arguments.versions is None:
            recovery = asdict(recover(db, run_id))
            done = [f"{name} {_short(value)}" for name, value in recovery.items() if value]
            lines = [f"put right: {'; '.join(done)}" if done else "there was nothing to put right"]
            return {"release": newest.release, "released": False, **recovery}, [
                *lines, f"release {newest.release} is what readers get",
            ]  # fmt: skip
        versions = _known(db, dict(newest.versions) | arguments.versions)
        index = measure_indices(db.uri, versions["products"], min_recall=arguments.min_recall)
        checks = verify(db, index, versions=versions, min_recall=arguments.min_recall)
        check()
        made = replace(newest, versions=versions, index=index, checks=checks, counts={"published_versions": versions})
        release = promote(db, made, run_id=run_id)
    return _published(db, release)


def rollback(db: Database, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Publish an older release's content again."""
    from pipeline.store import history

    with _lease(db, arguments, "rollback") as (run_id, _):
        release = history.rollback(db, arguments.to, run_id=run_id)
    return _published(db, release)


def prune(db: Database, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Let old releases go."""
    from pipeline.store import history

    with _lease(db, arguments, "prune"):
        pruned = history.prune(db, arguments.keep, arguments.younger_than_days, dry_run=arguments.dry_run)
    gone = ", ".join(map(str, pruned.releases)) or "none"
    verb = "would go" if arguments.dry_run else "gone"
    lines = [f"{verb:<10} {gone}", f"kept       {', '.join(map(str, pruned.kept)) or 'none'}"]
    if not arguments.dry_run:
        lines.append(f"freed      {pruned.freed_bytes:,} bytes")
    return asdict(pruned) | {"dry_run": arguments.dry_run}, lines


_ACTIONS = {"list": list_, "show": show, "publish": publish, "rollback": rollback, "prune": prune}


@contextmanager
def _lease(db: Database, arguments: argparse.Namespace, job: str) -> Iterator[tuple[str, Any]]:
    """The writer's lease, while a job changes the database: the run's id, and what checks that the lease is held."""
    from pipeline.errors import RunError, first_line
    from pipeline.store.lease import Lease

    run_id = uuid.uuid4().hex[:12]
    with Lease(db, run_id=run_id, job=job) as lease:
        lease.acquire(wait_s=arguments.wait_s)
        try:
            yield run_id, lease.check
        except (OSError, RuntimeError, ValueError) as error:  # what Lance raises
            raise RunError(
                f"{db.uri} could not be read or written: {first_line(error)}; see the release with `show`"
            ) from error


def _published(db: Database, release: Release) -> tuple[dict[str, Any], list[str]]:
    told = _brief(release, {}) | {"released": True, "versions": dict(release.versions)}
    return told, [f"release {release.release} in {db.uri}: {told['made_by']}"]


def _brief(release: Release, makers: Mapping[int, str]) -> dict[str, Any]:
    counts = release.counts
    made_by = makers.get(release.release, "unknown")
    if "rolled_back_to" in counts:
        made_by = f"rollback to {counts['rolled_back_to']}"
    elif "published_versions" in counts:
        made_by = "publish of given versions"
    return {
        "release": release.release,
        "parent": release.parent,
        "created_at": _time(release),
        "products": release.checks.get("products", 0),
        "images": release.checks.get("images", 0),
        "model": release.model,
        "fingerprint": release.fingerprint,
        "made_by": made_by,
    }


def _makers(db: Database) -> dict[int, str]:
    """Release to the run that made it, as `backfill 3f2a`."""
    if not db.exists("runs"):
        return {}
    runs = db.dataset("runs").to_table(columns=["release", "job", "run_id"], filter="release IS NOT NULL")
    return {run["release"]: f"{run['job']} {run['run_id']}" for run in runs.to_pylist()}


def _known(db: Database, versions: Mapping[str, int]) -> dict[str, int]:
    """The versions, if each is there.

    Raises:
        QueryError: names the table, and the versions that it has.
    """
    from pipeline.errors import QueryError

    for table, version in versions.items():
        known = [found["version"] for found in db.dataset(table).versions()]
        if version not in known:
            raise QueryError(f"--versions {table}={version}: the table has {', '.join(map(str, known))}")
    return dict(versions)


def _time(release: Release) -> str:
    return f"{release.created_at:%Y-%m-%d %H:%M:%S}"


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _versions(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in text.split(","):
        table, equals, number = part.strip().partition("=")
        if table not in _TABLES or not equals or table in found:
            raise argparse.ArgumentTypeError(f"takes products=7,images=5,rejects=3, some or all of them, not {text!r}")
        found[table] = positive(number)
    return found


def _share(text: str) -> float:
    value = number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"takes a number from 0 to 1, not {text!r}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
