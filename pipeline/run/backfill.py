"""The main job, top to bottom: catalog, plan, embed, reduce, commit, index, verify, release."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pipeline.catalog.partitions import Catalog, open_catalog
from pipeline.catalog.products import RowPlan
from pipeline.config import Config
from pipeline.errors import ClusterError, ConfigError, ReleaseRefused, RunInterrupted, TwotowerError, UsageError
from pipeline.model import ModelCard, describe_model
from pipeline.paths import absolute, is_uri, resolve
from pipeline.run.embed import EmbedSettings, ReuseSource
from pipeline.run.ledger import Ledger, work_key
from pipeline.run.load import Loaded, commit, load, verify
from pipeline.run.partition import PartitionResult
from pipeline.run.plan import Plan, plan_rows
from pipeline.run.pool import (
    ActorInfo,
    Pool,
    PoolSize,
    Stop,
    Work,
    check_nodes,
    connected,
    is_inside_job,
    ray_address,
    size_pool,
)
from pipeline.run.progress import Progress, ProgressDisplay
from pipeline.run.reduce import Reduction, write_table
from pipeline.run.staging import write_atomically
from pipeline.store.indices import build_indices
from pipeline.store.releases import Release, newest_release, now, publish
from pipeline.store.schemas import TABLES, products_schema, runs_schema
from pipeline.store.tables import Database, append_row, restore

log = logging.getLogger(__name__)

Gate = Callable[[Config, Release | None], None]
"""Handed in by the job: raises ReleaseRefused where the committed tables make search worse than the release."""


@dataclass
class Run:
    """One run as it goes: what it found, counted and measured. The report is made from it."""

    config: Config
    job: str
    run_id: str
    started_at: datetime
    card: ModelCard
    base: Release | None
    seconds: dict[str, float] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    actors: list[ActorInfo] = field(default_factory=list)
    loaded: Loaded | None = None
    deleted: int = 0
    release: Release | None = None
    begun: float = field(default_factory=time.monotonic)

    def stage(self, name: str, since: float) -> float:
        """Book the time since a moment to a stage; returns the present moment."""
        moment = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + moment - since
        return moment


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
    card = describe_model(config.model_name, dtype=config.model.dtype, **model_settings(config))
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
            check_rejects(run)
            if not is_unchanged(db, run, how):
                release(db, run, how, plan, is_whole=is_whole, gate=gate, stop=stop)
                run.stage("release", moment)
            Ledger(config.staging_path).forget(results)
        except UsageError:
            raise
        except TwotowerError as error:
            record(db, run, "interrupted" if isinstance(error, RunInterrupted) else "failed", str(error))
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
    replaced = asdict_shallow(config)
    replaced |= {"catalog_uri": given["--catalog"], "db": given["--db"].rstrip("/"), "model_name": given["--model"]}
    replaced["staging"] = type(config.staging)(given["staging.path"])
    replaced["images"] = type(config.images)(**{**asdict_shallow(config.images), "root": given["images.root"]})
    return Config(**replaced)


def model_settings(config: Config) -> dict[str, Any]:
    """The settings that decide which vectors a model gives, its dtype apart: arguments of `load_model`."""
    return {
        "preprocessing": config.images.preprocessing,
        "max_tokens": config.model.max_tokens,
        "jpeg_draft": config.images.jpeg_draft,
        "revision": config.model.revision,
    }


def check_base(db: Database, run: Run, how: Reduction, plan: Plan) -> bool:
    """Whether the run makes the tables whole and new: on a first load, or where old rows could not stand beside new.

    Raises:
        ConfigError: the new rows cannot stand beside the old ones, and the catalog does not cover those.
    """
    if run.base is None:
        return True
    old = db.dataset("products", run.base.versions["products"])
    schema = products_schema(how.dim, how.carried)
    differences = {
        f"model (fingerprint {run.base.fingerprint[:12]}, now {run.card.fingerprint[:12]})": run.base.fingerprint
        != run.card.fingerprint,
        f"average.text_weight ({run.base.average_text_weight}, now {how.text_weight})": run.base.average_text_weight
        != how.text_weight,
        "columns of products": [(f.name, f.type) for f in old.schema] != [(f.name, f.type) for f in schema],
    }
    differing = [name for name, is_different in differences.items() if is_different]
    if not differing:
        return False
    ids = old.to_table(columns=["product_id"]).column("product_id")
    covered = pc.sum(pc.is_in(ids, plan.product_ids)).as_py() or 0
    if covered < len(ids):
        raise ConfigError(
            f"release {run.base.release} was made with another {' and another '.join(differing)}, and "
            f"{len(ids) - covered:,} of its {len(ids):,} products are not in this catalog: their vectors would not be "
            "comparable. Backfill a catalog that holds all of them, use the old settings, or another --db"
        )
    return True


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
            card.fingerprint, config.images.limits, fresh,
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


def check_rejects(run: Run) -> None:
    """Refuse a run that lost too much, or has nothing to show; its rejects are kept for reading.

    Raises:
        ReleaseRefused: the share of rejected inputs is over `max_reject_share`, or no product has a vector.
    """
    progress, loaded = run.progress, run.loaded
    assert loaded is not None
    inputs = progress.texts + progress.images
    share = progress.rejected / inputs if inputs else 0.0
    if share <= run.config.max_reject_share and loaded.products:
        return
    path = f"{run.config.staging_path}/rejects-{run.run_id}.parquet"
    write_table(path, loaded.rejects)
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in loaded.reasons.items())
    if not loaded.products:
        raise ReleaseRefused(f"no product of the catalog has a valid text or image ({reasons}); nothing was released")
    raise ReleaseRefused(
        f"{progress.rejected:,} of {inputs:,} inputs were rejected, {share:.1%}; max_reject_share is "
        f"{run.config.max_reject_share:.1%} ({reasons}). Nothing was released; the rejects are in {path}"
    )


def is_unchanged(db: Database, run: Run, how: Reduction) -> bool:
    """Whether the run's products and rejects are what the newest release holds already."""
    base, loaded = run.base, run.loaded
    if base is None or loaded is None or base.fingerprint != run.card.fingerprint:
        return False
    if base.average_text_weight != how.text_weight or base.checks.get("content") != f"{loaded.content:032x}":
        return False
    keys = ["product_id", "partition", "row", "input", "reason", "sha256"]
    old = db.dataset("rejects", base.versions["rejects"]).to_table(columns=keys)
    return sorted(map(repr, old.to_pylist())) == sorted(map(repr, loaded.rejects.select(keys).to_pylist()))


def release(
    db: Database, run: Run, how: Reduction, plan: Plan, *, is_whole: bool, gate: Gate | None, stop: Stop
) -> None:
    """Commit, index, verify and publish: short from the first commit on, and visible with the row at its end."""
    loaded, base = run.loaded, run.base
    assert loaded is not None
    stop.check()
    if base is not None:
        restore(db, base.versions)
    commit(db, loaded, how, is_whole=is_whole, partitions=sorted(plan.pending), run_id=run.run_id)
    if base is not None:
        run.deleted = _lost_products(db, base)
    index = build_indices(db.uri, min_rows=run.config.release.index_min_rows)
    checks = verify(db, index)
    if gate is not None:
        gate(run.config, base)
    released = Release(
        release=base.release + 1 if base else 1,
        parent=base.release if base else None,
        created_at=now(),
        versions={table: db.latest_version(table) for table in TABLES},
        model=run.config.model_name,
        model_id=run.card.model_id,
        fingerprint=run.card.fingerprint,
        average_text_weight=how.text_weight,
        index=index,
        counts=counts(run),
        checks=checks,
        model_settings=model_settings(run.config),
    )
    run.release = publish(db, released, run_id=run.run_id)


def counts(run: Run) -> dict[str, int]:
    """What the run counted: `inputs = texts + images = embedded + reused + rejected`; whole rows are apart."""
    progress, loaded = run.progress, run.loaded
    row_rejects = pc.sum(pc.equal(loaded.rejects.column("input"), "row")).as_py() or 0 if loaded else 0
    return {
        "products": loaded.products if loaded else 0,
        "inputs": progress.texts + progress.images,
        "texts": progress.texts,
        "images": progress.images,
        "embedded": progress.embedded,
        "reused": progress.reused,
        "rejected": progress.rejected,
        "rejected_rows": row_rejects,
        "deleted": run.deleted,
        "truncated_texts": progress.truncated_texts,
    }


def report(run: Run) -> dict[str, Any]:
    """The run as one JSON-able object."""
    current = run.release or run.base
    seconds = time.monotonic() - run.begun
    embed_s = max(run.seconds.get("embed", 0.0), 1e-9)
    return {
        **counts(run),
        "release": current.release if current else None,
        "released": run.release is not None,
        "seconds": round(seconds, 3),
        "run_id": run.run_id,
        "job": run.job,
        "db": run.config.db,
        "reasons": dict(run.loaded.reasons) if run.loaded else {},
        "model": run.config.model_name,
        "model_id": run.card.model_id,
        "fingerprint": run.card.fingerprint,
        "dim": run.card.dim,
        "actors": [asdict(info) for info in run.actors],
        "run_seconds": {name: round(value, 3) for name, value in run.seconds.items()},
        "stage_seconds": {name: round(value, 3) for name, value in run.progress.seconds.items()},
        "rates": {
            "inputs_per_s": round((run.progress.texts + run.progress.images) / embed_s, 1),
            "images_per_s": round(run.progress.images / embed_s, 1),
        },
        "versions": dict(current.versions) if current else {},
        "index": dict(current.index) if current else {},
    }


def record(db: Database, run: Run, status: str, error: str | None) -> None:
    """Add the run's row to `runs`, whatever became of it."""
    told = report(run)
    row: Mapping[str, object] = {
        "run_id": run.run_id,
        "job": run.job,
        "status": status,
        "started_at": run.started_at,
        "seconds": told["seconds"],
        "release": run.release.release if run.release else None,
        "catalog": run.config.catalog_uri,
        "model": run.config.model_name,
        "model_id": run.card.model_id,
        "fingerprint": run.card.fingerprint,
        "counts": json.dumps(counts(run)),
        "stages": json.dumps({**told["run_seconds"], **told["stage_seconds"]}),
        "rates": json.dumps(told["rates"]),
        "versions": json.dumps(told["versions"]),
        "error": error,
    }
    append_row(db, "runs", runs_schema(), row)


def asdict_shallow(value: Any) -> dict[str, Any]:
    """A dataclass's own fields, nested ones as they are."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _settings(config: Config, size: PoolSize) -> EmbedSettings:
    return EmbedSettings(
        model_name=config.model_name,
        dtype=config.model.dtype,
        device=config.model.device,
        settings=model_settings(config),
        compile=config.model.compile,
        limits=config.images.limits,
        decode_threads=size.decode_threads,
        torch_threads=size.torch_threads,
    )


def _plan_key(plan: RowPlan) -> tuple[object, ...]:
    return (sorted(plan.rejected.items()), sorted(plan.followers), sorted(plan.skipped))


def _lost_products(db: Database, base: Release) -> int:
    """How many products of the release are not in the committed table any more."""
    old = db.dataset("products", base.versions["products"]).to_table(columns=["product_id"]).column("product_id")
    new = db.dataset("products").to_table(columns=["product_id"]).column("product_id")
    return len(old) - int(pc.sum(pc.is_in(old, new)).as_py() or 0)
