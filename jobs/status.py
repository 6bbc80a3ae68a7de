"""What a database holds and how its runs went: `python -m jobs.status --db DB`.

With `--metrics PORT` the same is served to Prometheus, between runs too, when no Ray is there to be asked:

    python -m jobs.status --db s3://shop/vectors --metrics 9108
"""

from __future__ import annotations

import argparse
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from jobs.cli import JobParser, add_log_level, port, positive, run_and_tell, run_job, start_log
from pipeline.errors import ConfigError, TwotowerError, first_line
from pipeline.shown import visible

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

log = logging.getLogger("jobs.status")  # not __name__: as a job this module is __main__


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
    result.add_argument(
        "--metrics", type=port, metavar="PORT", help="serve gauges to Prometheus until a signal comes; 0: a free port"
    )
    result.add_argument(
        "--metrics-host", default="127.0.0.1", metavar="HOST", help="where to listen; 0.0.0.0 inside a pod"
    )
    add_log_level(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.metrics is not None:
        start_log(arguments.log_level)
        return run_job(
            lambda: serve_metrics(arguments.db, host=arguments.metrics_host, port=arguments.metrics),
            as_json=arguments.json,
        )
    if arguments.run is not None:
        return run_and_tell(arguments, lambda: read_run(arguments.db, arguments.run), describe_run)
    return run_and_tell(arguments, lambda: read_status(arguments.db, arguments.staging, last=arguments.last), describe)


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
                lines.append(f"        {visible(run['error'])}")
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


def serve_metrics(db: str, *, host: str, port: int, until: threading.Event | None = None) -> dict[str, Any]:
    """Answer scrapes until a signal comes, or `until` is set.

    Raises:
        ConfigError: the port cannot be listened on.
    """
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(StatusCollector(db))
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {first_line(error)}; choose another --metrics") from error
    log.info("metrics of %s on http://%s:%d/metrics", db, host, server.server_port)
    try:
        (until or threading.Event()).wait()
    except KeyboardInterrupt:
        log.info("stopped by a signal")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    return {"db": db, "port": server.server_port}


class StatusCollector:
    """The gauges of a database, read afresh at each scrape; one that cannot be read is `twotower_up 0`.

    Args:
        db: folder or object-store prefix of the LanceDB tables; it need not be there yet.
    """

    def __init__(self, db: str) -> None:
        self._db = db
        self._said = ""
        self._rejects: tuple[object, Counter[str]] = (None, Counter())

    def describe(self) -> list[Metric]:
        """Nothing: without this, registering would read the database once."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All gauges, or `twotower_up 0` alone."""
        from prometheus_client.core import GaugeMetricFamily

        try:
            gauges, said = list(self._read()), ""
        except (TwotowerError, OSError, RuntimeError, ValueError) as error:  # Lance raises the last three
            gauges, said = [], first_line(error)
        if said and said != self._said:  # once, and not at each scrape
            log.warning("cannot read %s: %s", self._db, said)
        self._said = said
        yield GaugeMetricFamily("twotower_up", "Whether the database can be read", value=not said)
        yield from gauges

    def _read(self) -> Iterator[Metric]:
        """The gauges of a database that is there."""
        from prometheus_client.core import GaugeMetricFamily

        from pipeline.store.lease import read_lease
        from pipeline.store.releases import newest_release
        from pipeline.store.tables import open_database

        database, now = open_database(self._db), datetime.now(UTC)
        release = newest_release(database)
        if release is not None:
            age_s = (now - release.created_at).total_seconds()
            products, images = (release.checks.get(name, 0) for name in ("products", "images"))
            yield GaugeMetricFamily("twotower_release", "Number of the newest release", value=release.release)
            yield GaugeMetricFamily("twotower_release_age_seconds", "Since the newest release", value=age_s)
            yield GaugeMetricFamily("twotower_release_products", "Products in the newest release", value=products)
            yield GaugeMetricFamily("twotower_release_images", "Images in the newest release", value=images)
            if self._rejects[0] != (release.release, release.created_at):  # a release's rejects never change
                table = database.dataset("rejects", release.versions["rejects"]).to_table(columns=["reason"])
                self._rejects = (release.release, release.created_at), Counter(table.column("reason").to_pylist())
            rejects = GaugeMetricFamily("twotower_release_rejects", "Rejects in the newest release", labels=["reason"])
            for reason, count in sorted(self._rejects[1].items()):
                rejects.add_metric([reason], count)
            yield rejects
        # `run` is the job's name: `job` is a label of Prometheus's own.
        lasted = GaugeMetricFamily(
            "twotower_last_run_seconds", "How long the last such run took", labels=["run", "status"]
        )
        ended = GaugeMetricFamily(
            "twotower_last_run_timestamp_seconds", "When the last such run ended", labels=["run", "status"]
        )
        for (job, status), run in _last_runs(database).items():
            lasted.add_metric([job, status], run["seconds"])
            ended.add_metric([job, status], run["started_at"].timestamp() + run["seconds"])
        yield lasted
        yield ended
        holder = read_lease(database)
        is_held = (
            holder is not None and not holder.has_died and now - holder.renewed_at <= timedelta(seconds=holder.ttl_s)
        )
        yield GaugeMetricFamily("twotower_writer_held", "Whether a run holds the writer's lease", value=is_held)


def _last_runs(database: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """The last run of each job and status."""
    if not database.exists("runs"):
        return {}
    runs = database.dataset("runs").to_table(columns=["job", "status", "started_at", "seconds"]).to_pylist()
    return {(run["job"], run["status"]): run for run in sorted(runs, key=lambda run: run["started_at"])}


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
