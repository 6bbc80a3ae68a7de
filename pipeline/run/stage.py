"""Every partition staged: the ledger asked, the pool run by a schedule, and each partition written down as it ends."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from pipeline.catalog.partitions import Catalog, Partition
from pipeline.config import Config
from pipeline.errors import TwotowerError
from pipeline.records import Reason
from pipeline.run.cluster import PoolSize, size_pool
from pipeline.run.embed import EmbedSettings, ReuseSource
from pipeline.run.ledger import Ledger, work_key
from pipeline.run.metrics import RunMetrics
from pipeline.run.partition import PartitionResult, Work, joined, stage_condemned
from pipeline.run.plan import Plan
from pipeline.run.pool import Pool
from pipeline.run.progress import Progress, ProgressDisplay
from pipeline.run.report import Run
from pipeline.run.schedule import Schedule, Unit
from pipeline.run.signals import Stop
from pipeline.run.writer import Writer
from pipeline.store.releases import now

log = logging.getLogger(__name__)


def stage(
    run: Run, catalog: Catalog, plan: Plan, *, fresh: bool, stop: Stop, writer: Writer
) -> dict[str, PartitionResult]:
    """Stage every partition: those of an earlier, broken run are taken as they are, the others go through the pool.

    Args:
        run: goes into the ledger, and is told what was counted.
        catalog: what to read.
        plan: which of its partitions, and what is known of their rows.
        fresh: embed every input again.
        stop: ends the work when it is set.
        writer: takes the lease once the actors are there, before anything is written.
    """
    config = run.config
    ledger = Ledger(config.staging_path)
    partitions = {p.name: p for p in catalog.partitions if p.name in plan.pending}
    facts = {name: _facts(run, catalog, partition, plan, fresh) for name, partition in partitions.items()}
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
            return Work(partitions[name], plan.rows_of(name), unit, ledger.staged_path(name))

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

        size = size_pool(config, len(pending))
        schedule = Schedule(
            {name: partition.span for name, partition in pending.items()},
            max_attempts=config.pool.max_attempts,
            max_crashes=config.pool.max_crashes,
        )
        try:
            with Pool(size, _settings(config, size), catalog, _reuse(run, fresh), config=config, stop=stop) as pool:
                run.actors = pool.infos
                for info in pool.infos:
                    gpus = ",".join(info.gpu_ids) or "none"
                    log.info("actor %d on %s: %s, GPUs %s", info.actor, info.node, info.device, gpus)
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
    run.progress = Progress()
    for result in results.values():
        run.progress.add(result.counts, result.seconds, result.waits)
    return results


def _facts(run: Run, catalog: Catalog, partition: Partition, plan: Plan, fresh: bool) -> dict[str, Any]:
    """Everything that decides what a partition's staged files hold: its content, the model, the settings."""
    row_plan = plan.rows_of(partition.name)
    rows = (sorted(row_plan.rejected.items()), sorted(row_plan.followers), sorted(row_plan.skipped))
    return {
        "identity": partition.identity,
        "row_groups": list(partition.row_groups),
        "rows": hashlib.sha256(repr(rows).encode()).hexdigest(),
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


def _settings(config: Config, size: PoolSize) -> EmbedSettings:
    return EmbedSettings(
        model_name=config.model_name,
        dtype=config.model.dtype,
        device=config.model.device,
        settings=config.model_settings,
        compile=config.model.compile,
        limits=config.images.limits,
        fetch=config.fetch,
        decode_threads=size.decode_threads,
        torch_threads=size.torch_threads,
        memory_bytes=config.pool.memory_per_actor_bytes,
    )
