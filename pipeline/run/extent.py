"""What a run's rows take the place of, what it counted, and what a later run will compare with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.catalog.partitions import Catalog
from pipeline.records import Reason
from pipeline.run.changes import known_partitions
from pipeline.run.load import Extent, Loaded
from pipeline.run.partition import PartitionResult
from pipeline.run.plan import Plan
from pipeline.run.progress import Progress
from pipeline.run.report import Run
from pipeline.store.releases import Release
from pipeline.store.schemas import TABLES, partitions_schema
from pipeline.store.tables import Database

_BATCH_ROWS = 65_536


def extent_of(plan: Plan, results: Mapping[str, PartitionResult]) -> Extent:
    """Which tables a run writes whole, and which rows leave where it does not."""
    if plan.is_rebuilt:
        return Extent(frozenset(TABLES), gone=plan.gone, partitions=tuple(sorted(results)))
    changes = plan.changes
    if changes is None:
        return Extent(frozenset(), partitions=tuple(sorted(plan.rows.pending)))
    partitions = tuple(sorted({*changes.scanned, *changes.dropped}))
    whole = frozenset({"products"}) if plan.is_averaged_anew else frozenset[str]()
    return Extent(whole, plan.gone, partitions, tuple(sorted(changes.superseded)))


def taken_over(db: Database, base: Release | None, catalog: Catalog, loaded: Loaded) -> tuple[str, ...]:
    """Partitions outside of the catalog that hold rows of products which this run writes."""
    if base is None:
        return ()
    inside = pa.array([partition.name for partition in catalog.partitions], pa.string())
    written = pa.concat_arrays([pa.array([], pa.string()), *loaded.ids])
    found: set[str] = set()
    dataset = db.dataset("catalog_rows", base.versions["catalog_rows"])
    for batch in dataset.to_batches(columns=["product_id", "partition"], batch_size=_BATCH_ROWS):
        is_outside = pc.invert(pc.is_in(batch.column("partition"), inside))
        is_written = pc.is_in(batch.column("product_id"), written)
        found |= set(batch.column("partition").filter(pc.and_(is_outside, is_written)).unique().to_pylist())
    return tuple(sorted(found))


def account(db: Database, run: Run, catalog: Catalog, plan: Plan, results: Mapping[str, PartitionResult]) -> None:
    """Tell the run what it counted, over all partitions of the catalog, those that it did not read included."""
    total = Progress()
    for result in results.values():
        total.add(result.counts, result.seconds, result.waits)
    run.products = run.loaded.products.total() if run.loaded else 0
    run.rejected_rows = _row_rejects(run.loaded).total() if run.loaded else total.rejected_rows
    changes = plan.changes
    if changes is not None:
        known = known_partitions(db, run.base)
        unread = [asdict(known[name]) for name in changes.unread]
        for counts in [*unread, *changes.untouched.values()]:
            total.texts += counts["texts"]
            total.images += counts["images"]
            total.rejected += counts.get("rejected", 0)
            run.products += counts["products"]
            run.rejected_rows += counts.get("rejected_rows", 0)
        total.reused = total.texts + total.images - total.rejected - total.embedded
    run.progress = total


def partition_rows(
    db: Database,
    run: Run,
    catalog: Catalog,
    plan: Plan,
    results: Mapping[str, PartitionResult],
    extent: Extent,
) -> pa.Table:
    """Rows of `partitions`: those that were read, and those outside the catalog that lost a product to it."""
    loaded = run.loaded
    assert loaded is not None
    inputs = loaded.rejects.filter(pc.not_equal(loaded.rejects.column("input"), "row"))
    rejected = Counter(inputs.column("partition").to_pylist())
    rejected_rows = _row_rejects(loaded)
    unreadable = loaded.rejects.filter(pc.equal(loaded.rejects.column("reason"), str(Reason.PARTITION_UNREADABLE)))
    again = set(unreadable.column("partition").to_pylist())
    untouched = plan.changes.untouched if plan.changes else {}
    read = set(plan.changes.scanned) if plan.changes else set(results)
    rows: list[dict[str, Any]] = []
    for partition in catalog.partitions:
        name = partition.name
        if name not in read:
            continue
        stays = untouched.get(name, {})
        counts = results[name].counts if name in results else {}
        is_partial = plan.changes is None and len(plan.rows.rows_of(name).skipped) > 0
        rows.append(
            {
                "partition": name,
                "digest": "" if is_partial or name in again else partition.digest,
                "settings": plan.settings,
                "rows": partition.rows,
                "products": stays.get("products", 0) + loaded.products[name],
                "texts": stays.get("texts", 0) + counts.get("texts", 0),
                "images": stays.get("images", 0) + counts.get("images", 0),
                "rejected": rejected[name],
                "rejected_rows": rejected_rows[name],
                "run_id": run.run_id,
            }
        )
    known = known_partitions(db, run.base)
    rows += [
        asdict(known[name]) | {"partition": name, "digest": "", "run_id": run.run_id}
        for name in extent.taken_over
        if name in known
    ]
    return pa.Table.from_pylist(rows, schema=partitions_schema())


def _row_rejects(loaded: Loaded) -> Counter[str]:
    """Whole rows that were rejected, by partition."""
    rows = loaded.rejects.filter(pc.equal(loaded.rejects.column("input"), "row"))
    return Counter(rows.column("partition").to_pylist())
