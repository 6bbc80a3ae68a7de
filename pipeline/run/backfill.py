"""The main job, top to bottom: catalog, plan, embed, reduce, commit, index, verify, release."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pipeline.catalog.partitions import Catalog, open_catalog
from pipeline.config import Config
from pipeline.errors import ConfigError, RunError, RunInterrupted, TwotowerError, UsageError, described
from pipeline.model import describe_model
from pipeline.run.checks import Cluster, settle_paths
from pipeline.run.extent import account, extent_of, partition_rows, taken_over
from pipeline.run.ledger import Ledger, scratch
from pipeline.run.load import keep_products, load, scanned_rows, staged_rows, write_catalog_rows
from pipeline.run.partition import PartitionResult
from pipeline.run.plan import Order, Plan, counts_of, make_plan
from pipeline.run.reduce import Reduction
from pipeline.run.release import Gate, check_rejects, is_unchanged, release
from pipeline.run.report import Run, record, report
from pipeline.run.signals import Stop
from pipeline.run.stage import fill, spent, stage
from pipeline.run.writer import Writer
from pipeline.store.releases import newest_release, now
from pipeline.store.tables import Database

log = logging.getLogger(__name__)


def backfill(
    config: Config, *, limit: int | None = None, fresh: bool = False, replay: bool = False, gate: Gate | None = None
) -> dict[str, Any]:
    """Embed a catalog and release it: products of the catalog are added or replaced, others stay.

    Args:
        config: everything else.
        limit: only the first `limit` products, for a trial.
        fresh: embed every input again, though the released tables hold its vector.
        replay: only what the release has rejected, after its cause was repaired.
        gate: asked before the release row is written.

    Returns:
        The run's report: counts, stage times, versions, release.

    Raises:
        UsageError: the arguments, config, model, catalog or cluster cannot be used; nothing was written.
        ReleaseRefused: too much was rejected, or nothing was left, or the gate said no; readers keep what they had.
        LeaseHeld: another run writes the database.
        RunInterrupted: a signal came; the same command resumes.
        RunError: a worker failed too often, or the result does not pass verification.
    """
    order = Order("replay" if replay else "backfill", limit=limit, fresh=fresh, replay=replay)
    return _run(config, order, gate)


def reindex(
    config: Config, *, verify_content: bool = False, confirm_deletes: int | None = None, gate: Gate | None = None
) -> dict[str, Any]:
    """Bring the release to what the catalog says now: changed products are written again, missing ones leave.

    Args:
        config: everything else; its catalog is the whole truth.
        verify_content: read every partition, whatever size, time and footer of its file say.
        confirm_deletes: the number of products that may leave; else at most `max_delete_share` of them.
        gate: asked before the release row is written.

    Returns:
        As `backfill`.

    Raises:
        ReleaseRefused: more products would leave than may; and as `backfill` raises.
    """
    order = Order("reindex", is_truth=True, verify_content=verify_content, confirm_deletes=confirm_deletes)
    return _run(config, order, gate)


def _run(config: Config, order: Order, gate: Gate | None) -> dict[str, Any]:
    config = settle_paths(config)
    catalog = open_catalog(config.catalog_uri, config.catalog, config.columns, images_root=config.images.root)
    card = describe_model(config.model_name, dtype=config.model.dtype, **config.model_settings)
    db, stop = Database(config.db), Stop()
    run = Run(config, order.job, uuid.uuid4().hex[:12], now(), card)
    how = Reduction(card.dim, catalog.carried, config.average.text_weight, catalog.has_ordinals)
    with Writer(db, config.lease, run_id=run.run_id, job=order.job, stop=stop) as writer:
        writer.look()
        run.base = newest_release(db)
        if order.replay and run.base is None:
            raise ConfigError(
                f"nothing is released in {config.db}, so nothing was rejected there that could be replayed"
            )
        with (
            stop.installed(),
            Cluster(config, catalog, run.run_id, stop) as cluster,
            scratch(config.staging_path, run.run_id) as folder,
            recorded(db, run),
        ):
            while True:
                moment = time.monotonic()
                plan = make_plan(db, run, catalog, order, cluster=cluster, scratch=folder, stop=stop)
                run.changes = counts_of(plan)
                moment = run.stage("plan", moment)
                results = _embed(run, catalog, plan, order, cluster=cluster, folder=folder, stop=stop, writer=writer)
                moment = run.stage("embed", moment)
                if (newest := writer.take()) == run.base:
                    break
                run.base = newest  # released meanwhile: what is staged holds, but not what was planned on the old one
            _write(
                db, run, catalog, plan, results, order, how, gate, cluster=cluster, folder=folder, stop=stop,
                writer=writer,
            )  # fmt: skip
            ledger = Ledger(config.staging_path)
            ledger.forget({*results, *plan.rows.pending, *spent(run, catalog, plan, ledger)})
            ledger.sweep()
    return report(run)


def _embed(
    run: Run, catalog: Catalog, plan: Plan, order: Order, *, cluster: Cluster, folder: str, stop: Stop, writer: Writer
) -> dict[str, PartitionResult]:
    """Everything that needs a tower through the towers, and every product that is written again staged."""
    if plan.changes is None:
        return stage(run, catalog, plan.rows, fresh=order.fresh, stop=stop, writer=writer, join=cluster.join)
    embedded: Mapping[str, PartitionResult] = {}
    if plan.wanted.files:
        embedded = stage(
            run, catalog, plan.rows, fresh=order.fresh, stop=stop, writer=writer, join=cluster.join,
            wanted=plan.wanted.files,
        )  # fmt: skip
    return fill(run, catalog, plan, embedded, folder=folder, stop=stop, join=cluster.join)


def _write(
    db: Database,
    run: Run,
    catalog: Catalog,
    plan: Plan,
    results: Mapping[str, PartitionResult],
    order: Order,
    how: Reduction,
    gate: Gate | None,
    *,
    cluster: Cluster,
    folder: str,
    stop: Stop,
    writer: Writer,
) -> None:
    """From staged partitions to the release, unless nothing changed."""
    account(db, run, catalog, plan, results)
    if plan.is_nothing or (plan.changes is None and not plan.rows.pending):
        return
    moment = time.monotonic()
    staged = list(results.values())
    if not order.replay:  # which only sees what was rejected before
        check_rejects(run, staged)
    extent = extent_of(plan, results)
    Ledger(run.config.staging_path).sweep_scratch(run.run_id, db.uri)  # before as much is written there
    run.loaded = load(db, staged, how, extent, folder=folder, run_id=run.run_id, stop=stop, join=cluster.join)
    account(db, run, catalog, plan, results)
    moment = run.stage("reduce", moment)
    if is_unchanged(db, run, how, extent):
        return
    if "products" in extent.whole and not plan.is_rebuilt and run.base is not None:
        leaving = [*run.loaded.ids, extent.gone]
        version = run.base.versions["products"]
        run.loaded.fragments["products"] += keep_products(db, version, leaving, how, stop=stop, join=cluster.join)
    if not order.replay:  # which knows nothing of the rows beside those that it takes
        if plan.changes is None and not plan.is_rebuilt:
            extent = replace(extent, taken_over=taken_over(db, run.base, catalog, run.loaded))
        rows = scanned_rows(plan.changes.scanned) if plan.changes else staged_rows(staged)
        partitions = partition_rows(db, run, catalog, plan, results, extent)
        write_catalog_rows(db, rows, partitions, run.loaded, extent)
    release(db, run, how, extent, gate=gate, stop=stop, lease=writer.lease)
    run.stage("release", moment)


@contextmanager
def recorded(db: Database, run: Run) -> Iterator[None]:
    """The run's row in `runs`, whatever becomes of it; and a sentence for what the operating system or Lance says.

    Raises:
        RunError: in the place of an OSError: a full disk, a folder that cannot be written, a store that is away.
    """
    try:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"the run cannot go on: {described(error)}; readers keep the release that they have, and what was "
                "staged is kept: repair that, and run the same command again"
            ) from error
    except UsageError:
        raise
    except TwotowerError as error:
        try:
            record(db, run, "interrupted" if isinstance(error, RunInterrupted) else "failed", str(error))
        except OSError as unwritten:  # what stopped the run matters more than its row
            log.warning("the run could not be recorded in the table `runs`: %s", unwritten)
        raise
    record(db, run, "released" if run.release else "unchanged", None)
