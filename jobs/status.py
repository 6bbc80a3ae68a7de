"""What a database holds and how its runs went: `python -m jobs.status --db DB`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.cli import JobParser, add_log_level, positive, run_job, start_log


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(
        prog="python -m jobs.status",
        description="Releases, runs, partitions staged by a run that is not released yet, and rejects by reason.",
    )
    result.add_argument("--db", required=True, help="folder or object-store prefix of the LanceDB tables")
    result.add_argument("--staging", default="", help="where the run stages, if staging.path was set")
    result.add_argument("--last", type=positive, default=5, metavar="N", help="how many releases and runs to show")
    result.add_argument("--run", metavar="RUN_ID", help="one run instead: what held it up, and where its page is")
    result.add_argument("--json", action="store_true", help="print one JSON object")
    add_log_level(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    start_log(arguments.log_level)

    def job() -> Mapping[str, Any]:
        if arguments.run is not None:
            run = read_run(arguments.db, arguments.run)
            if not arguments.json:
                print(describe_run(run))
            return run
        status = read_status(arguments.db, arguments.staging, last=arguments.last)
        if not arguments.json:
            print(describe(status))
        return status

    return run_job(job, as_json=arguments.json)


def read_status(db: str, staging: str = "", *, last: int = 5) -> dict[str, Any]:
    """Everything that the job prints, newest first.

    Raises:
        CatalogError: there is no database and nothing staged.
    """
    from pipeline.paths import absolute
    from pipeline.run.ledger import Ledger
    from pipeline.store.lease import read_lease
    from pipeline.store.releases import list_releases
    from pipeline.store.tables import open_database

    database = open_database(db)
    releases = list_releases(database)
    entries = Ledger(absolute(staging) or f"{database.uri}/_staging").entries()
    rejects: Counter[str] = Counter()
    if releases:
        table = database.dataset("rejects", releases[-1].versions["rejects"]).to_table(columns=["reason"])
        rejects.update(table.column("reason").to_pylist())
    holder = read_lease(database)
    runs: list[dict[str, Any]] = []
    if database.exists("runs"):
        runs = sorted(database.dataset("runs").to_table().to_pylist(), key=lambda run: run["started_at"], reverse=True)
    return {
        "db": database.uri,
        "release": releases[-1].release if releases else None,
        "writer": holder.describe() + (", but that process is gone" if holder.has_died else "") if holder else None,
        "releases": [_release(release) for release in reversed(releases[-last:])],
        "runs": runs[:last],
        "staged_partitions": len(entries),
        "staged_inputs": sum(entry["counts"]["texts"] + entry["counts"]["images"] for entry in entries),
        "rejects": dict(rejects.most_common()),
    }


def read_run(db: str, run_id: str) -> dict[str, Any]:
    """One run's row, its report read.

    Raises:
        CatalogError: there is no database.
        QueryError: no such run is in it.
    """
    import json

    from pipeline.errors import QueryError
    from pipeline.store.tables import open_database

    database = open_database(db)
    runs: list[dict[str, Any]] = database.dataset("runs").to_table().to_pylist() if database.exists("runs") else []
    run = next((run for run in runs if run["run_id"] == run_id), None)
    if run is None:
        raise QueryError(f"there is no run {run_id!r} in {db}; python -m jobs.status --db {db} lists the last ones")
    return run | {"report": json.loads(run.get("report") or "{}")}


def describe_run(run: Mapping[str, Any]) -> str:
    """One run as a few lines."""
    report = run["report"]
    lines = [
        f"run        {run['run_id']}: {run['job']} {run['status']} in {run['seconds']:.1f} s, "
        f"begun {run['started_at']:%Y-%m-%d %H:%M:%S}"
    ]
    told = {
        "error": run["error"],
        "bottleneck": report.get("diagnosis", {}).get("sentence"),
        "slower": report.get("slower_sentence"),
        "report": report.get("report"),
    }
    return "\n".join([*lines, *(f"{name:<10} {said}" for name, said in told.items() if said)])


def describe(status: Mapping[str, Any]) -> str:
    """The status as a few blocks of lines."""
    lines = [f"database   {status['db']}", f"release    {status['release'] or 'none yet'}"]
    if status["writer"]:
        lines.append(f"held by    {status['writer']}")
    if status["releases"]:
        lines += ["", "releases"]
        for release in status["releases"]:
            lines.append(
                f"  {release['release']:>4}  {release['created_at']}  {release['products']:>9,} products  "
                f"{release['images']:>9,} images  {release['model']}"
            )
    if status["runs"]:
        lines += ["", "runs"]
        for run in status["runs"]:
            started = f"{run['started_at']:%Y-%m-%d %H:%M:%S}"
            lines.append(f"  {run['run_id']}  {started}  {run['job']} {run['status']} in {run['seconds']:.1f} s")
            if run["error"]:
                lines.append(f"        {run['error']}")
    if status["staged_partitions"]:
        lines += [
            "",
            f"staged     {status['staged_partitions']} partitions with {status['staged_inputs']:,} inputs wait for "
            "their release; the same command as before goes on from there",
        ]
    if status["rejects"]:
        lines += ["", "rejects in the release"]
        lines += [f"  {count:>9,}  {reason}" for reason, count in status["rejects"].items()]
    return "\n".join(lines)


def _release(release: Any) -> dict[str, Any]:
    return {
        "release": release.release,
        "created_at": f"{release.created_at:%Y-%m-%d %H:%M:%S}",
        "products": release.checks.get("products", 0),
        "images": release.checks.get("images", 0),
        "model": release.model,
        "fingerprint": release.fingerprint,
        "versions": dict(release.versions),
    }


if __name__ == "__main__":
    raise SystemExit(main())
