"""From staged partitions to what readers see: whether the result may be released, and its release."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.errors import ConfigError, ReleaseRefused, RunError, described
from pipeline.run.load import commit
from pipeline.run.partition import PartitionResult
from pipeline.run.plan import Plan
from pipeline.run.reduce import Reduction, reject_rows, staged_files, write_table
from pipeline.run.report import Run, counts
from pipeline.run.signals import Stop
from pipeline.store.commits import restore
from pipeline.store.content import content_digest
from pipeline.store.indices import build_indices
from pipeline.store.lease import Lease
from pipeline.store.releases import Release, newest_release, now, publish
from pipeline.store.schemas import TABLES, products_schema
from pipeline.store.tables import Database
from pipeline.store.verify import verify

Gate = Callable[[Config, Release | None], None]
"""Handed in by the job: raises ReleaseRefused where the committed tables make search worse than the release."""


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


def check_rejects(run: Run, results: Sequence[PartitionResult]) -> None:
    """Refuse a run that lost too much, or has nothing to show, before a table is touched; its rejects are kept.

    Raises:
        ReleaseRefused: the share of rejected inputs is over `max_reject_share`, or no input has a vector.
    """
    progress = run.progress
    inputs = progress.texts + progress.images
    share = progress.rejected / inputs if inputs else 0.0
    has_vectors = progress.embedded + progress.reused > 0
    if share <= run.config.max_reject_share and has_vectors:
        return
    rejects = pa.concat_tables([reject_rows(source, None, run.run_id) for source in staged_files(results)])
    path = f"{run.config.staging_path}/rejects-{run.run_id}.parquet"
    write_table(path, rejects)
    counted = Counter(rejects.column("reason").to_pylist()).most_common()
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counted) or "there are no inputs at all"
    if not has_vectors:
        raise ReleaseRefused(
            f"no product of the catalog has a valid text or image ({reasons}). Nothing was released; the rejects are "
            f"in {path}"
        )
    raise ReleaseRefused(
        f"{progress.rejected:,} of {inputs:,} inputs were rejected, {share:.1%}; max_reject_share is "
        f"{run.config.max_reject_share:.1%} ({reasons}). Nothing was released; the rejects are in {path}"
    )


def is_unchanged(db: Database, run: Run, how: Reduction, plan: Plan) -> bool:
    """Whether the run's products and rejects are what the newest release holds of them already."""
    base, loaded = run.base, run.loaded
    if base is None or loaded is None or base.fingerprint != run.card.fingerprint:
        return False
    if base.average_text_weight != how.text_weight:
        return False
    ids = pa.concat_arrays(loaded.ids) if loaded.ids else pa.array([], pa.string())
    if base.checks.get("content") != f"{loaded.content:032x}":  # the whole table's, which is known
        old = db.dataset("products", base.versions["products"])
        if [field.name for field in old.schema] != [field.name for field in products_schema(how.dim, how.carried)]:
            return False
        names = [field.name for field in old.schema if not field.name.endswith("_vector")]
        products = old.to_table(columns=names)
        products = products.filter(pc.is_in(products.column("product_id"), ids))
        if content_digest(products) != loaded.content:
            return False
    keys = ["product_id", "partition", "row", "input", "reason", "sha256"]
    rejects = db.dataset("rejects", base.versions["rejects"]).to_table(columns=keys)
    is_ours = pc.or_(
        pc.is_in(rejects.column("product_id"), ids),
        pc.is_in(rejects.column("partition"), pa.array(sorted(plan.pending), pa.string())),
    )
    old_rejects = rejects.filter(is_ours).to_pylist()
    return sorted(map(repr, old_rejects)) == sorted(map(repr, loaded.rejects.select(keys).to_pylist()))


def release(
    db: Database,
    run: Run,
    how: Reduction,
    plan: Plan,
    *,
    is_whole: bool,
    gate: Gate | None,
    stop: Stop,
    lease: Lease | None = None,
) -> None:
    """Commit, index, verify and publish: short from the first commit on, and visible with the row at its end."""
    loaded, base = run.loaded, run.base
    assert loaded is not None
    check = lease.check if lease is not None else lambda: None
    settings = run.config.release
    stop.check()
    newest = newest_release(db)
    if (newest.release if newest else None) != (base.release if base else None):
        raise ReleaseRefused(
            f"another run published release {newest.release if newest else None} while this one was running; nothing "
            "was committed, and what was staged is kept: run the same command again"
        )
    with _writing():
        check()
        if base is not None:
            restore(db, base.versions, run_id=run.run_id)
        partitions = sorted(plan.pending)
        rows = commit(db, loaded, how, is_whole=is_whole, partitions=partitions, run_id=run.run_id, check=check)
        if base is not None:
            run.deleted = _lost_products(db, base)
        check()
        index = build_indices(db.uri, min_rows=settings.index_min_rows, min_recall=settings.min_recall)
        versions = {table: db.latest_version(table) for table in TABLES}
        checks = verify(db, index, versions=versions, expected_rows=rows, min_recall=settings.min_recall)
    if gate is not None:
        gate(run.config, base)
    inputs = run.progress.texts + run.progress.images
    released = Release(
        release=base.release + 1 if base else 1,
        parent=base.release if base else None,
        created_at=now(),
        versions=versions,
        model=run.config.model_name,
        model_id=run.card.model_id,
        fingerprint=run.card.fingerprint,
        average_text_weight=how.text_weight,
        index=index,
        counts=counts(run),
        checks=checks | {"reject_share": round(run.progress.rejected / inputs, 6) if inputs else 0.0},
        model_settings=run.config.model_settings,
    )
    with _writing():
        check()
        run.release = publish(db, released, run_id=run.run_id)


@contextmanager
def _writing() -> Iterator[None]:
    """What Lance raises, as one error of ours."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(
            f"the tables could not be written ({described(error)}); readers keep the release that they have, and what "
            "was staged is kept: see that no other run writes this database, and run the same command again"
        ) from error


def _lost_products(db: Database, base: Release) -> int:
    """How many products of the release are not in the committed table any more."""
    old = db.dataset("products", base.versions["products"]).to_table(columns=["product_id"]).column("product_id")
    new = db.dataset("products").to_table(columns=["product_id"]).column("product_id")
    return len(old) - int(pc.sum(pc.is_in(old, new)).as_py() or 0)
