"""The main job, top to bottom: catalog, plan, embed, reduce, commit, index, verify, release."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.catalog.partitions import Catalog, open_catalog
from pipeline.catalog.products import RowPlan
from pipeline.config import Config
from pipeline.errors import ClusterError, ConfigError, RunInterrupted, TwotowerError, UsageError
from pipeline.model import describe_model
from pipeline.paths import absolute, is_uri, resolve
from pipeline.run.cluster import PoolSize, check_nodes, connected, is_inside_job, ray_address, size_pool
from pipeline.run.embed import EmbedSettings, ReuseSource
from pipeline.run.ledger import Ledger, work_key
from pipeline.run.load import load
from pipeline.run.partition import PartitionResult
from pipeline.run.plan import Plan, plan_rows
from pipeline.run.pool import Pool
from pipeline.run.progress import ProgressDisplay
from pipeline.run.reduce import Reduction
from pipeline.run.release import Gate, check_base, check_rejects, is_unchanged, release
from pipeline.run.report import Run, record, report
from pipeline.run.signals import Stop
from pipeline.run.staging import write_atomically
from pipeline.run.worker import Work
from pipeline.store.releases import newest_release, now
from pipeline.store.tables import Database

log = logging.getLogger(__name__)


def backfill(
    config: Config, *, limit: int | None = None, fresh: bool = False, gate: Gate | None = None
) -> dict[str, Any]:
    """Embed a catalog and release it: products of the catalog are added or replaced, others stay.

    Args:
        config: everything else.
        limit: only the first `limit` products, for a trial.
        fresh: embed every input again, though the released tables hold its vector.
        gate: asked before the release row is written.

    Returns:
        The run's report: counts, stage times, versions, release.

    Raises:
        UsageError: the arguments, config, model, catalog or cluster cannot be used; nothing was written.
        ReleaseRefused: too much was rejected, or nothing was left, or the gate said no; readers keep what they had.
        RunInterrupted: a signal came; the same command resumes.
        RunError: a worker failed too often, or the result does not pass verification.
    """
    config = settle_paths(config)
    catalog = open_catalog(config.catalog_uri, config.catalog, config.columns, images_root=config.images.root)
    card = describe_model(config.model_name, dtype=config.model.dtype, **config.model_settings)
    db = Database(config.db)
    base = newest_release(db)
    run = Run(config, "backfill", uuid.uuid4().hex[:12], now(), card, base)
    moment = time.monotonic()
    plan = plan_rows(catalog, limit=limit)
    how = Reduction(card.dim, catalog.carried, config.average.text_weight, catalog.has_ordinals)
    is_whole = check_base(db, run, how, plan)
    moment = run.stage("plan", moment)
    with Stop().installed() as stop, connected(config, stop):
        try:
            check_cluster(config, catalog, run.run_id, stop)
            moment = run.stage("ray", moment)
            results = embed(run, catalog, plan, fresh=fresh, stop=stop)
            moment = run.stage("embed", moment)
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
            if not is_unchanged(db, run, how):
                release(db, run, how, plan, is_whole=is_whole, gate=gate, stop=stop)
                run.stage("release", moment)
            Ledger(config.staging_path).forget(results)
        except UsageError:
            raise
        except TwotowerError as error:
            try:
                record(db, run, "interrupted" if isinstance(error, RunInterrupted) else "failed", str(error))
            except OSError as unwritten:  # what stopped the run matters more than its row
                log.warning("the run could not be recorded in the table `runs`: %s", unwritten)
            raise
    record(db, run, "released" if run.release else "unchanged", None)
    return report(run)


def settle_paths(config: Config) -> Config:
    """Local paths made absolute; where other processes resolve them from another folder, relative ones are refused.

    Raises:
        ConfigError: catalog, db or model is not given.
        ClusterError: a relative local path inside a Ray job or with a remote cluster.
    """
    given = {
        "--catalog": config.catalog_uri, "--db": config.db, "--model": config.model_name,
        "staging.path": config.staging.path, "images.root": config.images.root,
    }  # fmt: skip
    for name, value in given.items():
        if name.startswith("--") and not value:
            raise ConfigError(f"{name} is missing")
        is_path = name != "--model" or Path(value).exists() or value.startswith(".")
        if is_path and value and not is_uri(value) and not Path(value).expanduser().is_absolute():
            if is_inside_job() or ray_address(config) != "local":
                raise ClusterError(
                    f"{name} {value!r} is a relative path; in a Ray job it would name a folder of Ray's temporary copy "
                    "of the code: give an absolute path that all nodes share, or an object store's URI"
                )
            given[name] = absolute(value)
    for name in ("--db", "staging.path"):
        if given[name] and not is_uri(given[name]):
            check_folder(name, Path(given[name]))
    return replace(
        config,
        catalog_uri=given["--catalog"],
        db=given["--db"].rstrip("/"),
        model_name=given["--model"],
        staging=replace(config.staging, path=given["staging.path"]),
        images=replace(config.images, root=given["images.root"]),
    )


def check_folder(name: str, path: Path) -> None:
    """Whether a local folder can be written to, or made.

    Raises:
        ConfigError: it cannot.
    """
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"{name} {path}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{name} {path}: {existing} is not writable")


def check_cluster(config: Config, catalog: Catalog, run_id: str, stop: Stop) -> None:
    """On a cluster, have every node look at the catalog, the model, and what the driver writes beside db and staging.

    Raises:
        ClusterError: names the node and the path that it cannot read, or the folder that cannot be written to.
    """
    if ray_address(config) == "local":
        return
    paths = [catalog.partitions[0].name.partition("#")[0]]
    paths += [path for path in (config.images.root, config.model_name) if is_uri(path) or Path(path).is_absolute()]
    with probed(dict.fromkeys((config.db, config.staging_path)), run_id) as probes:
        check_nodes([*paths, *probes], stop)


@contextmanager
def probed(folders: Iterable[str], run_id: str) -> Iterator[list[str]]:
    """A small file in each folder, for others to look at; afterwards the files are gone, and so are new empty folders.

    Raises:
        ClusterError: a folder cannot be written to.
    """
    probes: list[str] = []
    made: list[Path] = []
    try:
        for folder in folders:
            probe = f"{folder.rstrip('/')}/_probe-{run_id}"
            if not is_uri(folder):
                made += [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
            try:
                write_atomically(probe, b"")
            except OSError as error:
                raise ClusterError(f"the driver cannot write to {folder}: {error}") from error
            probes.append(probe)
        yield probes
    finally:
        for probe in probes:
            filesystem, inside = resolve(probe)
            filesystem.delete_file(inside)
        for path in sorted(made, key=lambda path: -len(path.parts)):
            with suppress(OSError):
                path.rmdir()


def embed(run: Run, catalog: Catalog, plan: Plan, *, fresh: bool, stop: Stop) -> dict[str, PartitionResult]:
    """Stage every partition: those of an earlier, broken run are taken as they are, the others go through the pool."""
    config, card = run.config, run.card
    ledger = Ledger(config.staging_path)
    reuse = None
    if run.base is not None and run.base.fingerprint == card.fingerprint and not fresh:
        reuse = ReuseSource(config.db, run.base.versions["products"], run.base.versions["images"])
    results: dict[str, PartitionResult] = {}
    works: dict[str, Work] = {}
    keys: dict[str, str] = {}
    rows = 0
    for partition in catalog.partitions:
        if partition.name not in plan.pending:
            continue
        row_plan = plan.rows.get(partition.name, RowPlan())
        keys[partition.name] = work_key(
            partition, _plan_key(row_plan), catalog.columns, catalog.shape, catalog.root, catalog.carried,
            card.fingerprint, config.images.limits, config.fetch, fresh,
        )  # fmt: skip
        staged = ledger.find(partition.name, keys[partition.name])
        if staged is not None:
            results[partition.name] = staged
        else:
            works[partition.name] = Work(partition, row_plan, ledger.staged_path(partition.name))
            rows += partition.rows - len(row_plan.skipped)
    if results:
        log.info("resuming: %d of %d partitions are staged already", len(results), len(results) + len(works))
    if works:
        display = ProgressDisplay(len(works), rows)

        def on_done(result: PartitionResult) -> None:
            ledger.record(result, keys[result.name])
            results[result.name] = result
            display.done += 1

        size = size_pool(config, len(works))
        with Pool(size, _settings(config, size), catalog, reuse, config=config, stop=stop) as pool:
            run.actors = pool.infos
            for info in pool.infos:
                log.info(
                    "actor %d on %s: %s, GPUs %s", info.actor, info.node, info.device, ",".join(info.gpu_ids) or "none"
                )
            try:
                pool.embed(works, on_done=on_done, on_progress=display.update)
            finally:
                display.close()
    for result in results.values():
        for name, value in result.counts.items():
            setattr(run.progress, name, getattr(run.progress, name) + value)
        for stage, seconds in result.seconds.items():
            run.progress.seconds[stage] += seconds
    return results


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
    )


def _plan_key(plan: RowPlan) -> tuple[object, ...]:
    return (sorted(plan.rejected.items()), sorted(plan.followers), sorted(plan.skipped))
