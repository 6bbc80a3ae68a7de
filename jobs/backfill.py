"""Embed a catalog into LanceDB tables and release them: `python -m jobs.backfill --catalog DIR --db DB --model M`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.cli import JobParser, add_log_level, number, positive, run_job, start_log, tell
from pipeline.errors import ConfigError, TwotowerError

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.run.release import Gate

log = logging.getLogger("jobs.backfill")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(
        prog="python -m jobs.backfill",
        description="Embed the products of a catalog and release them. Products of the catalog are added or replaced, "
        "others stay; inputs that did not change keep their vectors.",
        epilog="exit codes: 0 released, or nothing to do; 1 it ran, but not everything, or the release was refused; "
        "2 wrong arguments, config, model, catalog or cluster, and nothing was written",
    )
    add_run_arguments(result)
    add_plan_arguments(result)
    result.add_argument("--limit", type=positive, metavar="N", help="only the first N products, for a trial run")
    result.add_argument("--fresh", action="store_true", help="embed every input again, though its vector is known")
    return result


def add_run_arguments(result: argparse.ArgumentParser) -> None:
    """What backfill and reindex share."""
    result.add_argument("--catalog", required=True, help="folder, file, glob or object-store prefix of Parquet files")
    result.add_argument("--db", required=True, help="folder or object-store prefix of the LanceDB tables")
    result.add_argument(
        "--model",
        required=True,
        help="`demo`, a model folder or object-store prefix, or a hub id such as jinaai/jina-clip-v1",
    )
    result.add_argument("--config", metavar="FILE.toml", help="settings; see README.md, Settings")
    result.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, as pool.gpus=2")
    result.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    add_log_level(result)


def run_config(arguments: argparse.Namespace) -> Config:
    """The settings that `add_run_arguments` was given."""
    from pipeline.config import load_config

    return load_config(
        arguments.config, arguments.set, catalog_uri=arguments.catalog, db=arguments.db, model_name=arguments.model
    )


def add_plan_arguments(result: argparse.ArgumentParser) -> None:
    """What shows a plan without carrying it out."""
    result.add_argument(
        "--dry-run", action="store_true", help="show what would be done and what it would cost, and end"
    )
    result.add_argument(
        "--price-per-gpu-hour", type=number, metavar="X", help="with --dry-run: tell the cost, in X's currency"
    )


def show_plan(config: Config, arguments: argparse.Namespace, **order: Any) -> Mapping[str, Any]:
    """Print the plan as a table, or give it for `--json`."""
    from pipeline.run.plan import Order
    from pipeline.run.preview import describe, preview

    job = "reindex" if order.get("is_truth") else "backfill"
    told = preview(config, Order(job, is_shown=True, **order), price_per_gpu_hour=arguments.price_per_gpu_hour)
    if not arguments.json:
        tell(describe(told))
    return told


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    start_log(arguments.log_level)

    def job() -> Mapping[str, Any]:
        config = run_config(arguments)
        if arguments.dry_run:
            if arguments.limit is not None:
                raise ConfigError("--dry-run plans the whole catalog; leave out --limit")
            return show_plan(config, arguments, fresh=arguments.fresh)
        from pipeline.run.backfill import backfill  # seconds of imports: a wrong setting is told before them

        result = gated(config, lambda gate: backfill(config, limit=arguments.limit, fresh=arguments.fresh, gate=gate))
        if not arguments.json:
            tell(summary(result))
        return result

    return run_job(job, as_json=arguments.json)


def gated(config: Config, run: Callable[[Gate | None], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Run a job with the gate that its settings ask for, and freeze the queries of what it released."""
    settings = config.release.gate
    if not settings.on:
        return run(None)
    from pipeline.evaluate.frozen import frozen_queries
    from pipeline.evaluate.gate import gate
    from pipeline.store.releases import get_release
    from pipeline.store.tables import Database

    result = run(gate)
    if result["released"]:
        db = Database(result["db"])
        try:
            frozen_queries(db, get_release(db, result["release"]), settings)
        except (TwotowerError, OSError) as error:  # it is released; the next run draws the same queries
            log.warning("the queries of release %s could not be frozen: %s", result["release"], error)
    return result


def summary(result: Mapping[str, Any]) -> str:
    """The report as a few lines for people."""
    lines = [
        f"products   {result['products']:,}",
        f"inputs     {result['inputs']:,} = {result['texts']:,} texts + {result['images']:,} images",
        f"           {result['embedded']:,} embedded, {result['reused']:,} reused, {result['rejected']:,} rejected",
    ]
    if result["reasons"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in result["reasons"].items())
        lines.append(f"rejects    {reasons} (whole rows: {result['rejected_rows']:,})")
    if result["truncated_texts"]:
        lines.append(f"truncated  {result['truncated_texts']:,} texts are longer than model.max_tokens")
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["run_seconds"].items())
    lines.append(f"time       {result['seconds']:.1f} s: {stages}")
    if result["deleted"]:
        lines.append(f"deleted    {result['deleted']:,} products that the catalog does not hold any more")
    lines.append(f"bottleneck {result['diagnosis']['sentence']}")
    if result["slower_sentence"]:
        lines.append(f"slower     {result['slower_sentence']}")
    if result["report"]:
        lines.append(f"report     {result['report']}")
    if result["released"]:
        lines.append(f"release    {result['release']} in {result['db']}")
    else:
        lines.append(f"release    {result['release']} stays: nothing changed")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
