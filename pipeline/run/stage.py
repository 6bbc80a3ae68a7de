"""Every partition staged: the ledger asked, the pool run by a schedule, and each partition written down as it ends."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.catalog.partitions import Catalog, Partition
from pipeline.catalog.products import RowPlan
from pipeline.config import Config
from pipeline.errors import TwotowerError
from pipeline.records import Reason
from pipeline.run.cluster import size_pool
from pipeline.run.embed import EmbedSettings, ReuseSource
from pipeline.run.fill import FillWork, fill_partitions, gather_shared
from pipeline.run.ledger import Ledger, work_key
from pipeline.run.load import BRIEF_INPUTS
from pipeline.run.metrics import RunMetrics
from pipeline.run.partition import PartitionResult, Work, joined, stage_condemned
from pipeline.run.plan import Plan
from pipeline.run.pool import Pool
from pipeline.run.progress import Progress, ProgressDisplay
from pipeline.run.report import Run
from pipeline.run.rows import RowPlans
from pipeline.run.schedule import Schedule, Unit
from pipeline.run.signals import Stop
from pipeline.run.tasks import run_tasks
from pipeline.run.wanted import WantedFile
from pipeline.run.writer import Writer
from pipeline.store.releases import now
from pipeline.store.tables import Database

log = logging.getLogger(__name__)


def stage(
    run: Run,
    catalog: Catalog,
    plan: RowPlans,
    *,
    fresh: bool,
    stop: Stop,
    writer: Writer,
    join: Callable[[], None],
    wanted: Mapping[str, WantedFile] | None = None,
) -> dict[str, PartitionResult]:
    """Stage every partition: those of an earlier, broken run are taken as they are, the others go through the pool.

    Args:
        run: goes into the ledger, and is told what was counted.
        catalog: what to read.
        plan: which of its partitions, and what is known of their rows.
        fresh: embed every input again.
        stop: ends the work when it is set.
        writer: takes the lease once the actors are there, before anything is written.
        join: called before the pool starts.
        wanted: the only inputs to embed, by partition; None: all of the plan's rows.
    """
    config = run.config
    ledger = Ledger(config.staging_path)
    partitions = {p.name: p for p in catalog.partitions if p.name in plan.pending}
    wanted = wanted or {}
    facts = {
        name: _facts(run, catalog, partition, plan.rows_of(name), fresh)
        | ({"wanted": wanted[name].digest} if name in wanted else {})
        for name, partition in partitions.items()
    }
    keys = {name: work_key(fact) for name, fact in facts.items()}
    # What could not be fetched may be there by now: an outage is not taken over from a run that was not released.
    results = {name: found for name, found in ledger.find(keys).items() if not found.counts.get("fetch_failed")}
    if results:
        log.info("resuming: %d of %d partitions are staged already", len(results), len(partitions))
    pending = {name: partition for name, partition in partitions.items() if name not in results}
    if pending:
        parts: dict[str, list[PartitionResult]] = defaultdict(list)
        rows = sum(p.rows - len(plan.rows_of(p.name).skipped) for p in pending.values())
        display, metrics = ProgressDisplay(len(pending), rows), RunMetrics()

        def work_for(unit: Unit) -> Work:
            name = unit.partition
            path = wanted[name].path if name in wanted else None
            return Work(partitions[name], plan.rows_of(name), unit, ledger.staged_path(name), path)

        def on_done(unit: Unit, result: PartitionResult, is_complete: bool) -> None:
            name = unit.partition
            parts[name].append(result)
            if is_complete:
                results[name] = joined(parts.pop(name))
                ledger.record(
                    results[name], keys[name], {**facts[name], "run_id": run.run_id, "finished_at": str(now())}
                )
                display.done += 1

        def on_condemned(unit: Unit, detail: str, is_complete: bool) -> None:
            log.warning("row %d of %s is rejected: every worker that embeds it dies", unit.first_row, unit.partition)
            metrics.reject(Reason.WORKER_CRASHED)
            told = f"{unit.attempt} workers died over the row ({detail})"
            on_done(unit, stage_condemned(catalog, work_for(unit), run.card.dim, told), is_complete)

        def on_progress(progress: Progress) -> None:
            display.update(progress)
            metrics.update(display.done, len(pending))
            run.samples.add(time.monotonic() - run.begun, progress)
            writer.check()

        join()
        size = size_pool(config, len(pending))
        reuse = None if wanted else _reuse(run, fresh)
        schedule = Schedule(
            {name: _span(partition, wanted.get(name)) for name, partition in pending.items()},
            max_attempts=config.pool.max_attempts,
            max_crashes=config.pool.max_crashes,
        )
        try:
            with Pool(size, _settings(config), catalog, reuse, config=config, stop=stop) as pool:
                run.actors = pool.infos
                for info in pool.infos:
                    gpus = ",".join(info.gpu_ids) or "none"
                    log.info("actor %d on %s: %s, GPUs %s", info.actor, info.node, info.device, gpus)
                    if not info.is_resize_compiled:
                        log.warning(
                            "actor %d on %s resizes images in Pillow, to the same pixels but at a seventh of the "
                            "speed: install twotower there again, with a C compiler and Python's headers",
                            info.actor,
                            info.node,
                        )
                writer.begin()
                try:
                    pool.embed(schedule, work_for, on_done=on_done, on_condemned=on_condemned, on_progress=on_progress)
                finally:
                    run.usage = run.usage.joined(pool.usage())
        except (TwotowerError, OSError):
            if writer.lease.is_held:  # beside another run, its files of the same partition could be among them
                with suppress(OSError):
                    ledger.tidy(pending)
            raise
        finally:
            display.close()
    return results


def fill(
    run: Run,
    catalog: Catalog,
    plan: Plan,
    embedded: Mapping[str, PartitionResult],
    *,
    folder: str,
    stop: Stop,
    join: Callable[[], None],
) -> dict[str, PartitionResult]:
    """Stage the products that changed, of every scanned partition, with vectors from the actors and from the release.

    Args:
        run: its base is where vectors are taken from, and its counts grow.
        catalog: names the carried columns.
        plan: with changes.
        embedded: what the actors staged of the wanted inputs, by partition.
        folder: of the run's own, for the staged files.
        stop: ends the work when it is set.
        join: called where tasks are worth their processes.
    """
    changes, base = plan.changes, run.base
    assert changes is not None
    db = Database(run.config.db)
    release = base if base is not None and base.fingerprint == run.card.fingerprint else None
    shared = [
        (plan.wanted.files[name], result) for name, result in embedded.items() if plan.wanted.files[name].has_shared
    ]
    shared_path = f"{folder}/shared.parquet" if shared else ""
    if shared:
        gather_shared(shared, shared_path, run.card.dim)
    numbers = {partition.name: i for i, partition in enumerate(catalog.partitions)}
    works = [
        FillWork(
            partition=name,
            scanned_path=path,
            touched=changes.touched_rows.get(name, np.zeros(0, np.int64)),
            plan=changes.roles.get(name, RowPlan()),
            embedded=embedded.get(name),
            shared_path=shared_path,
            release=release,
            bad=plan.bad,
            staged_path=f"{folder}/{numbers[name]}.filled.parquet",
        )
        for name, path in changes.scanned.items()
    ]
    rows = sum(len(work.touched) for work in works)
    is_brief = rows <= BRIEF_INPUTS
    if not is_brief:
        join()
    tasks = [(db, [work], run.card.dim, catalog.carried) for work in works]
    filled = run_tasks(fill_partitions, tasks, stop=stop, is_brief=is_brief)
    return {result.name: result for part in filled for result in part}


def spent(run: Run, catalog: Catalog, plan: Plan, ledger: Ledger) -> set[str]:
    """Partitions whose ledger entries hold what is released: a run that died between its release and its end left them.

    An entry of another model, other settings or `fresh` is another run's, which may go on from it.
    """
    unread = plan.changes.unread if plan.changes else ()
    partitions = {partition.name: partition for partition in catalog.partitions if partition.name in unread}
    found = set()
    for entry in ledger.entries():
        if (partition := partitions.get(entry["name"])) is not None:
            # As JSON gives it back: lists for tuples. Which rows it was about, the release has made unimportant.
            facts = json.loads(json.dumps(_facts(run, catalog, partition, RowPlan(), False)))
            if all(entry[name] == value for name, value in facts.items() if name != "rows"):
                found.add(partition.name)
    return found


def _span(partition: Partition, wanted: WantedFile | None) -> tuple[int, int]:
    """First row and row after the last of those that are to be embedded."""
    return partition.span if wanted is None else (int(wanted.rows[0]), int(wanted.rows[-1]) + 1)


def _facts(run: Run, catalog: Catalog, partition: Partition, rows: RowPlan, fresh: bool) -> dict[str, Any]:
    """Everything that decides what a partition's staged files hold: its content, the model, the settings."""
    return {
        "identity": partition.identity,
        "row_groups": list(partition.row_groups),
        "rows": rows.digest(),
        "fingerprint": run.card.fingerprint,
        "columns": asdict(catalog.columns),
        "shape": catalog.shape,
        "root": catalog.root,
        "carried": [str(field) for field in catalog.carried],
        "limits": asdict(run.config.images.limits),
        "fetch": asdict(run.config.fetch),
        "fresh": fresh,
    }


def _reuse(run: Run, fresh: bool) -> ReuseSource | None:
    """The release to take vectors from, if its vectors are the model's."""
    if run.base is None or run.base.fingerprint != run.card.fingerprint or fresh:
        return None
    return ReuseSource(run.config.db, run.base.versions["products"], run.base.versions["images"])


def _settings(config: Config) -> EmbedSettings:
    return EmbedSettings(
        model_name=config.model_name,
        dtype=config.model.dtype,
        device=config.model.device,
        settings=config.model_settings,
        compile=config.model.compile,
        limits=config.images.limits,
        fetch=config.fetch,
        memory_bytes=config.pool.memory_per_actor_bytes,
    )
