"""What a run will read: one pass over the ids finds duplicate, conflicting and skipped rows."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.catalog.partitions import READ_ERRORS, Catalog
from pipeline.catalog.products import RowPlan, product_ids
from pipeline.records import Reason
from pipeline.store.releases import Release
from pipeline.store.tables import Database

_COMPARED = ("title", "description", "broad_category", "fine_category")
_PLAN_BATCH_ROWS = 8192


@dataclass(frozen=True)
class Plan:
    """The rows of every partition that need more than being read.

    Attributes:
        rows: by partition name; a partition that is not there is read as it stands.
        product_ids: the products that the run is about, in the order of their first rows.
        pending: names of the partitions that hold any of their rows.
        total_rows: rows of those products.
    """

    rows: Mapping[str, RowPlan]
    product_ids: pa.Array
    pending: frozenset[str]
    total_rows: int

    def rows_of(self, name: str) -> RowPlan:
        """What is known of a partition's rows."""
        return self.rows.get(name, RowPlan())


@dataclass
class _Columns:
    """The id pass, one value a row of the catalog in (path, row) order."""

    ids: np.ndarray  # int64: code of the product id, -1 for none
    partition: np.ndarray  # int32
    row: np.ndarray  # int64: row number in the file
    ordinal: np.ndarray | None  # int64, -1 for none
    hashes: dict[str, np.ndarray]  # int64 per compared column, 0 for null


@dataclass(frozen=True)
class Rejects:
    """What a release has rejected, as far as it says which rows to take again.

    Attributes:
        product_ids: products with a rejected input or row.
        partitions: names of partitions in which rows without a known product were rejected.
        released: all products of the release; a row of `partitions` with another id is one that was repaired.
    """

    product_ids: pa.Array
    partitions: frozenset[str]
    released: pa.Array


def rejected_rows(db: Database, release: Release | None) -> Rejects:
    """What to take again from a release; nothing where there is none."""
    if release is None:
        nothing = pa.array([], pa.string())
        return Rejects(nothing, frozenset(), nothing)
    rejects = db.dataset("rejects", release.versions["rejects"]).to_table(columns=["product_id", "partition"])
    ids = rejects.column("product_id")
    nameless = rejects.filter(pc.is_null(ids)).column("partition")
    released = db.dataset("products", release.versions["products"]).to_table(columns=["product_id"])
    return Rejects(
        ids.drop_null().unique(), frozenset(nameless.to_pylist()), released.column("product_id").combine_chunks()
    )


def plan_rows(catalog: Catalog, *, limit: int | None = None, only: Rejects | None = None) -> Plan:
    """Read every partition's ids (in the image shape its texts and ordinals too) and settle which row speaks.

    Args:
        catalog: the checked catalog.
        limit: only the first `limit` products, in (path, row) order.
        only: only rows that a release has rejected; None: all.
    """
    columns, ids = _read(catalog)
    known = np.flatnonzero(columns.ids >= 0)
    order = known  # already in (path, row) order
    codes = columns.ids[order]
    unique, first_index = np.unique(codes, return_index=True)
    first_of = np.full(len(unique), -1, dtype=np.int64)
    first_of[unique] = order[first_index]
    rejected: dict[int, dict[int, tuple[Reason, str]]] = defaultdict(dict)
    followers: dict[int, set[int]] = defaultdict(set)
    skipped: dict[int, set[int]] = defaultdict(set)
    kept = len(unique)
    if limit is not None and limit < kept:
        kept = limit
        last = int(np.sort(first_of)[limit - 1])
        is_beyond = np.zeros(len(columns.ids), dtype=bool)
        is_beyond[known] = first_of[codes] > last
        is_beyond[columns.ids < 0] = np.flatnonzero(columns.ids < 0) > last
        for index in np.flatnonzero(is_beyond):
            skipped[int(columns.partition[index])].add(int(columns.row[index]))
    if only is not None:
        is_wanted = _wanted(catalog, columns, ids, only)
        for index in np.flatnonzero(~is_wanted):
            skipped[int(columns.partition[index])].add(int(columns.row[index]))
    later = order[first_of[codes] != order]
    for place, (reason, detail) in _later_rows(catalog, columns, first_of, later).items():
        partition, row = int(columns.partition[place]), int(columns.row[place])
        if reason is None:
            followers[partition].add(row)
        else:
            rejected[partition][row] = (reason, detail)
    rows = {
        partition.name: RowPlan(rejected[i], frozenset(followers[i]), frozenset(skipped[i]))
        for i, partition in enumerate(catalog.partitions)
        if rejected[i] or followers[i] or skipped[i]
    }
    pending = frozenset(p.name for i, p in enumerate(catalog.partitions) if len(skipped[i]) < p.rows)
    planned = pa.array(ids[:kept], pa.string())
    if only is not None:
        planned = planned.take(pa.array(np.unique(columns.ids[is_wanted & (columns.ids >= 0) & (columns.ids < kept)])))
    return Plan(rows, planned, pending, len(columns.ids) - sum(map(len, skipped.values())))


def _wanted(catalog: Catalog, columns: _Columns, ids: list[str], only: Rejects) -> np.ndarray:
    """Bool per row: whether the row's product has a reject, or the row itself may have been one without a product."""
    known = pa.array(ids, pa.string())
    is_rejected = np.append(pc.is_in(known, only.product_ids).to_numpy(zero_copy_only=False), False)  # -1: no product
    is_new = np.append(~pc.is_in(known, only.released).to_numpy(zero_copy_only=False), True)
    is_nameless = np.array([partition.name in only.partitions for partition in catalog.partitions], dtype=bool)
    return np.asarray(is_rejected[columns.ids] | (is_nameless[columns.partition] & is_new[columns.ids]))


def _read(catalog: Catalog) -> tuple[_Columns, list[str]]:
    """The id pass, and the product ids by code: codes are given in the order of first rows."""
    names = catalog.columns
    is_image_shape = catalog.shape == "image"
    compared = [getattr(names, role) for role in _COMPARED if is_image_shape and getattr(names, role)]
    wanted = list(dict.fromkeys([names.product_id, *compared, *([names.image_ordinal] if names.image_ordinal else [])]))
    code_of: dict[str, int] = {}
    ids, partitions, rows, ordinals = array("q"), array("i"), array("q"), array("q")
    hashes = {name: array("q") for name in compared}
    for number, partition in enumerate(catalog.partitions):
        row = partition.first_row
        try:
            for table in catalog.read(partition, wanted, batch_rows=_PLAN_BATCH_ROWS):
                values = {name: table.column(name).to_pylist() for name in wanted if name != names.product_id}
                found = product_ids(table.column(names.product_id))
                ids.extend(-1 if i is None else code_of.setdefault(i, len(code_of)) for i in found)
                partitions.extend([number] * len(found))
                rows.extend(range(row, row + len(found)))
                row += len(found)
                for name in compared:
                    hashes[name].extend(0 if v is None else hash(v) or 1 for v in values[name])
                if names.image_ordinal:
                    ordinals.extend(-1 if v is None else v for v in values[names.image_ordinal])
        except READ_ERRORS:
            continue  # embedding reads the same pages, and says which rows are lost
    columns = _Columns(
        np.frombuffer(ids, dtype=np.int64),
        np.frombuffer(partitions, dtype=np.int32),
        np.frombuffer(rows, dtype=np.int64),
        np.frombuffer(ordinals, dtype=np.int64) if names.image_ordinal else None,
        {name: np.frombuffer(values, dtype=np.int64) for name, values in hashes.items()},
    )
    return columns, list(code_of)


def _later_rows(
    catalog: Catalog, columns: _Columns, first_of: np.ndarray, later: np.ndarray
) -> dict[int, tuple[Reason | None, str]]:
    """What each row that is not its product's first is: a duplicate, a conflict, or (None) one more image."""
    result: dict[int, tuple[Reason | None, str]] = {}
    taken: set[tuple[int, int]] = set()
    if columns.ordinal is not None:
        taken = {(int(columns.ids[i]), int(columns.ordinal[i])) for i in first_of if columns.ordinal[i] >= 0}
    for index in map(int, later):
        first = int(first_of[columns.ids[index]])
        partition = catalog.partitions[columns.partition[first]]
        place = f"row {columns.row[first]} of {partition.name}"
        if catalog.shape == "product":
            result[index] = (Reason.DUPLICATE_ID, f"the product was already given in {place}")
            continue
        # A null says nothing, so it does not contradict; a value that is not the first row's does.
        differing = [n for n, h in columns.hashes.items() if h[index] not in (0, h[first])]
        if differing:
            detail = f"{', '.join(differing)} differ from the product's first row, {place}"
            result[index] = (Reason.CONFLICTING_ROW, detail)
            continue
        if columns.ordinal is not None and columns.ordinal[index] >= 0:
            key = (int(columns.ids[index]), int(columns.ordinal[index]))
            if key in taken:
                detail = f"image_ordinal {key[1]} was already given to an earlier image of the product"
                result[index] = (Reason.CONFLICTING_ROW, detail)
                continue
            taken.add(key)
        result[index] = (None, "")
    return result
