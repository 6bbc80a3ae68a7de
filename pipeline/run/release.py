"""From staged partitions to what readers see: whether the result may be released, and its release."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.errors import ReleaseRefused, RunError, TwotowerError, described
from pipeline.run.load import Extent, commit
from pipeline.run.memory import give_back_freed_memory
from pipeline.run.partition import PartitionResult, staged_files
from pipeline.run.reduce import Reduction, reject_rows, write_table
from pipeline.run.report import Run, counts
from pipeline.run.signals import Stop
from pipeline.store.commits import restore
from pipeline.store.content import content_digest
from pipeline.store.folding import fold_indices
from pipeline.store.indices import build_indices
from pipeline.store.lease import Lease
from pipeline.store.releases import Release, newest_release, now, publish
from pipeline.store.schemas import TABLES, products_schema
from pipeline.store.tables import Database
from pipeline.store.verify import verify

Gate = Callable[[Config, Release, Release], Mapping[str, Any]]
"""Handed in by the job, called with the release that readers have and the one that is to come, whose tables are
committed: gives what is kept among its checks, or raises ReleaseRefused where it would make search worse."""


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


def is_unchanged(db: Database, run: Run, how: Reduction, extent: Extent) -> bool:
    """Whether the run's products and rejects are what the newest release holds of them already."""
    base, loaded = run.base, run.loaded
    if base is None or loaded is None or base.fingerprint != run.card.fingerprint or len(extent.gone):
        return False
    if base.average_text_weight != how.text_weight:
        return False
    ids = pa.concat_arrays([pa.array([], pa.string()), *loaded.ids])
    if len(ids) and base.checks.get("content") != f"{loaded.content:032x}":  # the whole table's, which is known
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
        pc.is_in(rejects.column("partition"), pa.array(extent.partitions, pa.string())),
    )
    old_rejects = rejects.filter(is_ours).to_pylist()
    return sorted(map(repr, old_rejects)) == sorted(map(repr, loaded.rejects.select(keys).to_pylist()))


def release(
    db: Database,
    run: Run,
    how: Reduction,
    extent: Extent,
    *,
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
        rows = commit(db, loaded, how, extent, run_id=run.run_id, check=check)
        run.deleted = len(extent.gone)
        check()
        if base is None or extent.whole >= {"products", "images"}:
            verified = None
            index = build_indices(db.uri, min_rows=settings.index_min_rows, min_recall=settings.min_recall)
        else:
            verified = base
            index = fold_indices(db.uri, base.index, min_rows=settings.index_min_rows, min_recall=settings.min_recall)
        give_back_freed_memory()  # of the indices; what is verified is read in batches
        versions = {table: db.latest_version(table) for table in TABLES}
        checks = verify(
            db,
            index,
            versions=versions,
            expected_rows=rows,
            min_recall=settings.min_recall,
            verified=verified,
        )
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
    if gate is not None and base is not None:
        released = _gated(db, run, base, released, gate)
    with _writing():
        check()
        run.release = publish(db, released, run_id=run.run_id)


def _gated(db: Database, run: Run, base: Release, released: Release, gate: Gate) -> Release:
    """The release with what the gate found; where it says no, the tables go back to what readers have at once."""
    try:
        return replace(released, checks={**released.checks, "gate": gate(run.config, base, released)})
    except TwotowerError:
        with _writing():
            restore(db, base.versions, run_id=run.run_id)
        raise


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
