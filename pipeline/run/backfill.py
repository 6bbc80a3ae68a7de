"""The main job, top to bottom: catalog, plan, embed, reduce, commit, index, verify, release."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.catalog.partitions import open_catalog
from pipeline.config import Config
from pipeline.errors import ConfigError, RunError, RunInterrupted, TwotowerError, UsageError, described
from pipeline.model import describe_model
from pipeline.run.checks import check_cluster, settle_paths
from pipeline.run.cluster import connected
from pipeline.run.ledger import Ledger
from pipeline.run.load import load
from pipeline.run.plan import plan_rows, rejected_rows
from pipeline.run.reduce import Reduction
from pipeline.run.release import Gate, check_base, check_rejects, is_unchanged, release
from pipeline.run.report import Run, record, report
from pipeline.run.signals import Stop
from pipeline.run.stage import stage
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
    config = settle_paths(config)
    catalog = open_catalog(config.catalog_uri, config.catalog, config.columns, images_root=config.images.root)
    card = describe_model(config.model_name, dtype=config.model.dtype, **config.model_settings)
    db = Database(config.db)
    job, stop = "replay" if replay else "backfill", Stop()
    run = Run(config, job, uuid.uuid4().hex[:12], now(), card)
    with Writer(db, config.lease, run_id=run.run_id, job=job, stop=stop) as writer:
        writer.look()
        run.base = newest_release(db)
        if replay and run.base is None:
            raise ConfigError(
                f"nothing is released in {config.db}, so nothing was rejected there that could be replayed"
            )
        moment = time.monotonic()
        plan = plan_rows(catalog, limit=limit, only=rejected_rows(db, run.base) if replay else None)
        how = Reduction(card.dim, catalog.carried, config.average.text_weight, catalog.has_ordinals)
        is_whole = check_base(db, run, how, plan)
        moment = run.stage("plan", moment)
        if not plan.pending:
            return report(run)
        with stop.installed(), connected(config, stop), recorded(db, run):
            check_cluster(config, catalog, run.run_id, stop)
            moment = run.stage("ray", moment)
            results = stage(run, catalog, plan, fresh=fresh, stop=stop, writer=writer)
            if (newest := writer.take()) != run.base:
                run.base = newest  # released meanwhile: the vectors hold, but not what was planned on the older release
                is_whole = check_base(db, run, how, plan)
                results = stage(run, catalog, plan, fresh=fresh, stop=stop, writer=writer)
            moment = run.stage("embed", moment)
            if not replay:  # which only sees what was rejected before
                check_rejects(run, list(results.values()))
            run.loaded = load(
                db,
                list(results.values()),
                how,
                folder=config.staging_path,
                run_id=run.run_id,
                is_whole=is_whole,
                stop=stop,
            )
            moment = run.stage("reduce", moment)
            if not is_unchanged(db, run, how, plan):
                release(db, run, how, plan, is_whole=is_whole, gate=gate, stop=stop, lease=writer.lease)
                run.stage("release", moment)
            ledger = Ledger(config.staging_path)
            ledger.forget(results)
            ledger.sweep()
    return report(run)


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
