"""Indices after a change: new rows folded in as a segment each, or built anew once that would cost recall or time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import lancedb

from pipeline.store.indices import (
    MIN_RECALL,
    MODES,
    PRESENT,
    VectorIndex,
    build_scalar_index,
    build_vector_index,
    index_partitions,
    index_statistics,
    probe_index,
    scalar_columns,
)
from pipeline.store.transactions import persistently

MOST_SEGMENTS = 8
"""A query reads every segment of an index; with more of them it is built anew."""
MOST_FOLDED = 0.2
"""Share of rows that the centroids have never seen; with more, they no longer lie where the vectors are."""
MOST_UNMEASURED = 0.05
"""Share of rows folded in since recall was last measured; with more, it is measured again."""


def fold_indices(
    db: str,
    before: Mapping[str, Mapping[str, Any]],
    *,
    seed: int = 0,
    min_rows: int = 5000,
    min_recall: float = MIN_RECALL,
) -> dict[str, dict[str, Any]]:
    """Bring the indices of the latest version of `products` and `images` to all of its rows.

    Args:
        db: folder or URI of the database; nobody else may write to it meanwhile.
        before: how each mode was searched before the change, from the release's row.
        seed: as in `build_indices`, like the others.
        min_rows: with fewer vectors a mode is searched exactly.
        min_recall: of each index.

    Returns:
        As `build_indices`.
    """
    connection = lancedb.connect(db)
    kept: dict[str, VectorIndex] = {}
    folded: list[str] = []
    built: dict[str, VectorIndex] = {}
    for mode, column in MODES.items():
        table = connection.open_table("products")
        dataset = table.to_lance()
        name = f"{column}_idx"
        rows = dataset.count_rows(filter=PRESENT[mode])
        known = {index.name for index in dataset.describe_indices()}
        found = VectorIndex(**before[mode]) if mode in before else None
        statistics = index_statistics(dataset, name) if name in known else None
        if found is None or statistics is None or _is_worn(found, statistics, rows, min_rows):
            build = partial(build_vector_index, connection, mode, seed, min_rows, min_recall)
            built[mode] = persistently(build)
            continue
        new = int(statistics["num_unindexed_rows"])
        kept[mode] = replace(found, rows=rows, folded=found.folded + new, unmeasured=found.unmeasured + new)
        folded += [name] if new else []
    _fold(connection, "products", folded)
    _fold(connection, "images", [])
    for mode, index in kept.items():
        if index.unmeasured > MOST_UNMEASURED * index.rows or index.recall_at_10 < min_recall:
            table = connection.open_table("products")
            probes, refine, recall = probe_index(
                table, mode, partitions=index.partitions, seed=seed, min_recall=min_recall
            )
            index = replace(index, probes=probes, refine=refine, recall_at_10=round(recall, 4), unmeasured=0)
        built[mode] = index
    return {mode: asdict(built[mode]) for mode in MODES}


def _is_worn(index: VectorIndex, statistics: Mapping[str, Any], rows: int, min_rows: int) -> bool:
    """Whether an index has to be built anew rather than folded."""
    new = int(statistics["num_unindexed_rows"])
    wanted = index_partitions(rows)
    return (
        index.kind == "exact"
        or rows < max(min_rows, 1)
        or len(statistics["indices"]) + (new > 0) > MOST_SEGMENTS
        or index.folded + new > MOST_FOLDED * rows
        or not index.partitions / 2 < wanted < index.partitions * 2
    )


def _fold(connection: Any, table: str, names: list[str]) -> None:
    """Fold new rows into indices of a table, its scalar ones included; those of too many segments are built anew."""
    opened = connection.open_table(table)
    dataset = opened.to_lance()
    known = {index.name: index.field_names for index in dataset.describe_indices()}
    for column, kind in scalar_columns(opened, table).items():
        name = next((name for name, columns in known.items() if columns == [column]), None)
        statistics = index_statistics(dataset, name) if name is not None else None
        if statistics is None or len(statistics["indices"]) >= MOST_SEGMENTS:
            persistently(partial(build_scalar_index, opened, column, kind))
        elif statistics["num_unindexed_rows"]:
            names = [*names, str(name)]
    if names:
        latest = connection.open_table(table).to_lance()
        # Without the number Lance would merge segments, and with them collapse the partitions of a vector index.
        persistently(partial(latest.optimize.optimize_indices, num_indices_to_merge=0, index_names=names))
