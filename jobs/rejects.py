"""What was rejected, why, and once more after a repair: `python -m jobs.rejects list|show|replay --db DB`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.backfill import add_run_arguments, gated, summary
from jobs.cli import JobParser, add_log_level, positive, run_job, start_log, tell
from pipeline.shown import visible

_COLUMNS = ("product_id", "input", "reason", "detail", "partition", "row", "sha256", "run_id", "attempts")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(
        prog="python -m jobs.rejects",
        description="Inputs and rows that a release has rejected: counted, shown one by one, or embedded again after "
        "their cause was repaired.",
    )
    actions = result.add_subparsers(dest="action", required=True, metavar="list|show|replay")
    for name, text in (
        ("list", "how many were rejected, by reason and partition"),
        ("show", "the rejected inputs and rows, with what is wrong with each"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("--db", required=True, help="folder or object-store prefix of the LanceDB tables")
        action.add_argument(
            "--release", type=positive, metavar="N", help="as of an older release; by default the newest"
        )
        if name == "show":
            action.add_argument("--reason", help="only those of one reason")
            action.add_argument("--product", metavar="ID", help="only those of one product")
            action.add_argument("--last", type=positive, default=50, metavar="N", help="how many to show at most")
        action.add_argument("--json", action="store_true", help="print one JSON object")
        add_log_level(action)
    text = "read the rejected inputs again from the repaired catalog, embed what is good now, and release it"
    replay = actions.add_parser("replay", help=text, description=f"{text}. Other products are not read.")
    add_run_arguments(replay)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    start_log(arguments.log_level)

    def job() -> Mapping[str, Any]:
        if arguments.action == "replay":
            return replay(arguments)
        result = read_rejects(
            arguments.db,
            release=arguments.release,
            reason=getattr(arguments, "reason", None),
            product=getattr(arguments, "product", None),
        )
        rows = result.pop("rows")
        if arguments.action == "show":
            result["rejects"] = rows[: arguments.last]
        if not arguments.json:
            tell(describe_rows(result) if arguments.action == "show" else describe_counts(result))
        return result

    return run_job(job, as_json=arguments.json)


def read_rejects(
    db: str, *, release: int | None = None, reason: str | None = None, product: str | None = None
) -> dict[str, Any]:
    """A release's rejects, counted, and as rows sorted by partition and row.

    Raises:
        QueryError: there is no database, no such release or no such reason.
    """
    import pyarrow.compute as pc

    from pipeline.errors import QueryError
    from pipeline.paths import absolute
    from pipeline.records import Reason
    from pipeline.store.releases import get_release, newest_release
    from pipeline.store.tables import Database, reach_database

    if reason is not None and reason not in list(Reason):
        raise QueryError(f"there is no reason {reason!r}; the reasons are {', '.join(Reason)}")
    database = Database(absolute(db))
    try:
        reach_database(database)
    except OSError as error:
        raise QueryError(f"the database {db} cannot be read: {error}") from error
    found = get_release(database, release) if release is not None else newest_release(database)
    if found is None:
        raise QueryError(f"nothing is released in {db}, so nothing is rejected; a refused run names its own file")
    rows = database.dataset("rejects", found.versions["rejects"]).to_table(columns=list(_COLUMNS))
    for column, value in (("reason", reason), ("product_id", product)):
        if value is not None:
            rows = rows.filter(pc.equal(rows.column(column), value))
    rows = rows.sort_by([("partition", "ascending"), ("row", "ascending"), ("input", "ascending")])

    def counted(column: str) -> dict[str, int]:
        counts = rows.column(column).value_counts().to_pylist()
        return {c["values"]: c["counts"] for c in sorted(counts, key=lambda c: (-c["counts"], c["values"]))}

    return {
        "db": database.uri,
        "release": found.release,
        "total": rows.num_rows,
        "reasons": counted("reason"),
        "partitions": counted("partition"),
        "rows": rows.to_pylist(),
    }


def replay(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Run the replay and tell its result."""
    from pipeline.config import load_config

    config = load_config(
        arguments.config, arguments.set, catalog_uri=arguments.catalog, db=arguments.db, model_name=arguments.model
    )
    from pipeline.run.backfill import backfill

    result = gated(config, lambda gate: backfill(config, replay=True, gate=gate))
    if not arguments.json:
        tell(summary(result))
    return result


def describe_counts(result: Mapping[str, Any]) -> str:
    """The counts as lines."""
    lines = [f"{result['total']:,} rejects in release {result['release']} of {result['db']}"]
    for title in ("reasons", "partitions"):
        lines += ["", title, *(f"  {count:>9,}  {visible(name)}" for name, count in result[title].items())]
    return "\n".join(lines) if result["total"] else lines[0]


def describe_rows(result: Mapping[str, Any]) -> str:
    """The rejects one by one: the product and input, the reason and its sentence, the place."""
    lines = []
    for row in result["rejects"]:
        product, detail = visible(row["product_id"] or "(no id)"), visible(row["detail"])  # on this line alone
        lines.append(f"{product}  {row['input']}  {row['reason']}: {detail}")
        lines.append(
            f"    row {row['row']} of {visible(row['partition'])}, run {row['run_id']}, attempt {row['attempts']}"
        )
    if result["total"] > len(result["rejects"]):
        lines.append(f"... and {result['total'] - len(result['rejects']):,} more; see --last, --reason and --product")
    return "\n".join(lines) or f"nothing of that kind is rejected in release {result['release']}"


if __name__ == "__main__":
    raise SystemExit(main())
