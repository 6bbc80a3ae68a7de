"""Bring the tables to what the catalog says now: `python -m jobs.reindex --catalog DIR --db DB --model M`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.backfill import add_plan_arguments, add_run_arguments, gated, run_config, show_plan, summary
from jobs.cli import JobParser, count, run_job, start_log, tell


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(
        prog="python -m jobs.reindex",
        description="Bring the tables to what the catalog says now, at the cost of what changed. The catalog is the "
        "whole truth: products that it does not hold any more are deleted, up to max_delete_share of them.",
        epilog="exit codes: 0 released, or nothing to do; 1 it ran, but not everything, or the release was refused; "
        "2 wrong arguments, config, model, catalog or cluster, and nothing was written",
    )
    add_run_arguments(result)
    add_plan_arguments(result)
    result.add_argument(
        "--verify-content",
        action="store_true",
        help="read every partition and hash every input, also where size, time and footer of a file are as they were",
    )
    result.add_argument(
        "--confirm-deletes",
        type=count,
        metavar="N",
        help="delete more than max_delete_share: N is the number of products that the refusal, or --dry-run, names",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    start_log(arguments.log_level)

    def job() -> Mapping[str, Any]:
        config = run_config(arguments)
        if arguments.dry_run:
            return show_plan(config, arguments, is_truth=True, verify_content=arguments.verify_content)
        from pipeline.run.backfill import reindex  # seconds of imports: a wrong setting is told before them

        options = {"verify_content": arguments.verify_content, "confirm_deletes": arguments.confirm_deletes}
        result = gated(config, lambda gate: reindex(config, **options, gate=gate))
        if not arguments.json:
            tell(summary(result))
        return result

    return run_job(job, as_json=arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
