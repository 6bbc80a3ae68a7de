"""Which row of the catalog speaks for which product: one pass over the ids, settled bucket by bucket."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.catalog.partitions import READ_ERRORS, Catalog
from pipeline.catalog.products import RowPlan, Rows, product_ids
from pipeline.records import Reason
from pipeline.run.spill import Spill, bucket_count, key_hashes

if TYPE_CHECKING:  # they bring Lance, which an actor need not wait for
    from pipeline.store.releases import Release
    from pipeline.store.tables import Database

COMPARED = ("title", "description", "broad_category", "fine_category")
"""What the rows of a product have to agree on, in the image shape."""

_PLAN_BATCH_ROWS = 65_536
ROW_BITS = 40  # of a place: the row in its file; what is above numbers the partition
_ID_SCHEMA = pa.schema([("product_id", pa.string())])


@dataclass(frozen=True)
class RowPlans:
    """The rows of every partition that need more than being read.

    Attributes:
        rows: by partition name; a partition that is not there is read as it stands.
        pending: names of the partitions that hold any of the rows that the run is about.
        total_rows: how many those are.
        products: how many products they speak of.
        absent: released products that the catalog does not hold, where the plan was asked for them.
    """

    rows: Mapping[str, RowPlan]
    pending: frozenset[str]
    total_rows: int
    products: int
    absent: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))

    def rows_of(self, name: str) -> RowPlan:
        """What is known of a partition's rows."""
        return self.rows.get(name, RowPlan())


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


def released_ids(db: Database, release: Release | None) -> Iterator[pa.Array]:
    """The ids of all released products, streamed."""
    if release is not None:
        dataset = db.dataset("products", release.versions["products"])
        for batch in dataset.to_batches(columns=["product_id"], batch_size=_PLAN_BATCH_ROWS):
            yield batch.column("product_id")


def plan_rows(
    catalog: Catalog,
    *,
    limit: int | None = None,
    only: Rejects | None = None,
    released: Iterable[pa.Array] = (),
) -> RowPlans:
    """Read every partition's ids (in the image shape its texts and ordinals too) and settle which row speaks.

    Args:
        catalog: the checked catalog.
        limit: only the first `limit` products, in (path, row) order.
        only: only rows that a release has rejected; None: all.
        released: ids of released products, of which `absent` is told.
    """
    buckets = bucket_count(sum(partition.rows for partition in catalog.partitions))
    with Spill(row_schema(catalog), buckets) as spill, Spill(_ID_SCHEMA, buckets) as old:
        total = 0
        for rows in _read(catalog):
            spill.add(rows, key_hashes(rows.column("product_id")))
            total += rows.num_rows
        for ids in released:
            old.add(pa.table({"product_id": ids}), key_hashes(ids))
        settled = settle(catalog, spill)
        keep = _keep(catalog, settled.firsts, limit=limit, only=only)
        skipped = _places(spill, lambda rows: ~keep(rows)) if keep is not None else np.zeros(0, np.int64)
        absent = [_absent(old.read(bucket), spill.read(bucket)) for bucket in range(buckets)] if released else []
    products = len(settled.firsts) if limit is None else min(limit, len(settled.firsts))
    of = by_partition(skipped)
    rows = row_plans(catalog, settled, of)
    pending = frozenset(p.name for i, p in enumerate(catalog.partitions) if len(of.get(i, ())) < p.rows)
    nothing = pa.array([], pa.string())
    return RowPlans(rows, pending, total - len(skipped), products, pa.concat_arrays([nothing, *absent]))


@dataclass
class Settled:
    """Rows by what they are to their product, as places (see `place_of`).

    Attributes:
        firsts: the first row of each product, in no order.
        followers: further rows of products, one more image each.
        rejected: rows that may not speak, with the reason and a sentence.
    """

    firsts: Rows
    followers: Rows
    rejected: dict[int, tuple[Reason, str]]


def settle(catalog: Catalog, spill: Spill) -> Settled:
    """What every row with an id is: its product's first, a follower, a duplicate or a conflict.

    Args:
        catalog: names the columns and the partitions.
        spill: rows of `row_schema`, in any order; null ids are passed over.
    """
    firsts, followers = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    rejected: dict[int, tuple[Reason, str]] = {}
    for bucket in range(spill.buckets):
        rows = spill.read(bucket)
        rows = rows.filter(pc.is_valid(rows.column("product_id")))
        if not rows.num_rows:
            continue
        place = rows.column("place").to_numpy()
        order, is_first = first_rows(rows.column("product_id"), place)
        first_of = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
        firsts.append(place[order[is_first]])
        later, first = order[~is_first], first_of[~is_first]
        following = np.zeros(len(later), dtype=bool)
        if catalog.shape != "product":
            following = _conflicts(catalog, rows, order[is_first], later, first, rejected)
        else:
            for at, to in zip(place[later].tolist(), place[first].tolist(), strict=True):
                detail = f"the product was already given in {place_name(catalog, to)}"
                rejected[at] = (Reason.DUPLICATE_ID, detail)
        followers.append(place[later[following]])
    return Settled(np.concatenate(firsts), np.concatenate(followers), rejected)


def first_rows(ids: pa.ChunkedArray, place: Rows) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """Row numbers by product and place, and which of them is its product's first."""
    codes = codes_of(ids)
    order = np.lexsort((place, codes))
    return order, np.diff(codes[order], prepend=-1) != 0


def codes_of(ids: pa.ChunkedArray) -> Rows:
    """int64 (N,): equal ids, and nulls, have equal numbers from 0."""
    encoded = ids.combine_chunks().dictionary_encode(null_encoding="encode")
    return np.asarray(encoded.indices.to_numpy(), dtype=np.int64)


def row_plans(catalog: Catalog, settled: Settled, skipped: Mapping[int, Rows]) -> dict[str, RowPlan]:
    """A plan for each partition that has anything but rows to be read as they stand."""
    rejected: dict[int, dict[int, tuple[Reason, str]]] = defaultdict(dict)
    for place, told in settled.rejected.items():
        rejected[place >> ROW_BITS][place & ((1 << ROW_BITS) - 1)] = told
    followers = by_partition(settled.followers)
    nothing = np.zeros(0, np.int64)
    return {
        catalog.partitions[i].name: RowPlan(rejected.get(i, {}), followers.get(i, nothing), skipped.get(i, nothing))
        for i in sorted({*rejected, *followers, *skipped})
    }


def row_schema(catalog: Catalog) -> pa.Schema:
    """What settling needs of a row: id and place; in the image shape hashes of what is compared, and the ordinal."""
    fields = [("product_id", pa.string()), ("place", pa.int64())]
    fields += [(f"hash.{role}", pa.int64()) for role in _compared(catalog)]
    fields += [("ordinal", pa.int64())] if _has_ordinal(catalog) else []
    return pa.schema(fields)


def row_keys(catalog: Catalog, ids: pa.Array, place: Rows, columns: Mapping[str, pa.ChunkedArray]) -> pa.Table:
    """Rows of `row_schema`.

    Args:
        catalog: names the columns.
        ids: product ids, null for none.
        place: int64 (rows,), from `place_of`.
        columns: the compared columns and `image_ordinal`, by role.
    """
    made: dict[str, object] = {"product_id": ids, "place": place}
    for role in _compared(catalog):  # Python's hash: 64 bits, another one in each process, as nobody else reads them
        values = columns[role].to_pylist()
        made[f"hash.{role}"] = np.fromiter((0 if v is None else hash(v) or 1 for v in values), np.int64, len(values))
    if _has_ordinal(catalog):
        made["ordinal"] = columns["image_ordinal"].cast(pa.int64()).fill_null(-1)
    return pa.table(made, schema=row_schema(catalog))


def place_of(partition: int, rows: Rows) -> Rows:
    """int64: the partition's number in the catalog above, the row in its file below, so that places sort as rows."""
    return (np.int64(partition) << np.int64(ROW_BITS)) | rows.astype(np.int64)


def by_partition(places: Rows) -> dict[int, Rows]:
    """Row numbers of each partition, ascending."""
    places = np.sort(places)
    numbers, starts = np.unique(places >> ROW_BITS, return_index=True)
    parts = np.split(places & ((1 << ROW_BITS) - 1), starts[1:])
    return dict(zip(numbers.tolist(), parts, strict=True)) if len(places) else {}


def place_name(catalog: Catalog, place: int) -> str:
    """A place as people read it."""
    return f"row {place & ((1 << ROW_BITS) - 1)} of {catalog.partitions[place >> ROW_BITS].name}"


def _compared(catalog: Catalog) -> list[str]:
    return [role for role in COMPARED if catalog.shape == "image" and getattr(catalog.columns, role)]


def _has_ordinal(catalog: Catalog) -> bool:
    return catalog.shape == "image" and bool(catalog.columns.image_ordinal)


def _read(catalog: Catalog) -> Iterator[pa.Table]:
    """The id pass: rows of `row_schema`."""
    names = catalog.columns
    roles = [*_compared(catalog), *(["image_ordinal"] if _has_ordinal(catalog) else [])]
    wanted = list(dict.fromkeys([names.product_id, *(getattr(names, role) for role in roles)]))
    for number, partition in enumerate(catalog.partitions):
        row = partition.first_row
        try:
            for table in catalog.read(partition, wanted, batch_rows=_PLAN_BATCH_ROWS):
                place = place_of(number, np.arange(row, row + table.num_rows))
                columns = {role: table.column(getattr(names, role)) for role in roles}
                yield row_keys(catalog, product_ids(table.column(names.product_id)), place, columns)
                row += table.num_rows
        except READ_ERRORS:
            continue  # embedding reads the same pages, and says which rows are lost


def _conflicts(
    catalog: Catalog, rows: pa.Table, firsts: Rows, later: Rows, first: Rows, rejected: dict[int, tuple[Reason, str]]
) -> npt.NDArray[np.bool_]:
    """Which later rows are one more image of their product; the others are rejected."""
    place = rows.column("place").to_numpy()
    is_fine = np.ones(len(later), dtype=bool)
    differing: dict[int, list[str]] = defaultdict(list)
    for role in _compared(catalog):
        hashes = rows.column(f"hash.{role}").to_numpy()
        # A null says nothing, so it does not contradict; a value that is not the first row's does.
        differs = (hashes[later] != 0) & (hashes[later] != hashes[first])
        is_fine &= ~differs
        for at in np.flatnonzero(differs).tolist():
            differing[at].append(getattr(catalog.columns, role))
    for at, names in differing.items():
        detail = f"{', '.join(names)} differ from the product's first row, {place_name(catalog, int(place[first[at]]))}"
        rejected[int(place[later[at]])] = (Reason.CONFLICTING_ROW, detail)
    if _has_ordinal(catalog):
        codes = codes_of(rows.column("product_id"))
        ordinal = rows.column("ordinal").to_numpy()
        candidates = np.concatenate([firsts, later[is_fine]])
        candidates = candidates[ordinal[candidates] >= 0]
        order = candidates[np.lexsort((place[candidates], ordinal[candidates], codes[candidates]))]
        is_taken = (np.diff(codes[order], prepend=-1) == 0) & (np.diff(ordinal[order], prepend=-1) == 0)
        for index in order[is_taken].tolist():
            detail = f"image_ordinal {ordinal[index]} was already given to an earlier image of the product"
            rejected[int(place[index])] = (Reason.CONFLICTING_ROW, detail)
        is_fine &= ~np.isin(later, order[is_taken])
    return is_fine


def _keep(
    catalog: Catalog, firsts: Rows, *, limit: int | None, only: Rejects | None
) -> Callable[[pa.Table], npt.NDArray[np.bool_]] | None:
    """What tells which rows of a bucket the run is about; None where it is about all."""
    if only is not None:
        is_nameless = np.array([partition.name in only.partitions for partition in catalog.partitions], dtype=bool)

        def is_wanted(rows: pa.Table) -> npt.NDArray[np.bool_]:
            ids = rows.column("product_id")
            is_rejected = bools(pc.is_in(ids, only.product_ids.drop_null()))
            is_new = ~bools(pc.is_in(ids, only.released)) | bools(pc.is_null(ids))
            return np.asarray(is_rejected | (is_nameless[rows.column("place").to_numpy() >> ROW_BITS] & is_new))

        return is_wanted
    if limit is None or limit >= len(firsts):
        return None
    last = int(np.partition(firsts, limit - 1)[limit - 1])

    def is_within(rows: pa.Table) -> npt.NDArray[np.bool_]:
        place = rows.column("place").to_numpy()
        order, is_first = first_rows(rows.column("product_id"), place)
        begins = place[order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]]
        first_place = np.empty_like(place)
        first_place[order] = begins
        is_nameless = bools(pc.is_null(rows.column("product_id")))
        return np.asarray(np.where(is_nameless, place, first_place) <= last)

    return is_within


def _places(spill: Spill, condition: Callable[[pa.Table], npt.NDArray[np.bool_]]) -> Rows:
    """Places of all rows for which a condition holds."""
    found = [np.zeros(0, np.int64)]
    for bucket in range(spill.buckets):
        rows = spill.read(bucket)
        if rows.num_rows:
            found.append(rows.column("place").to_numpy()[condition(rows)])
    return np.concatenate(found)


def _absent(old: pa.Table, new: pa.Table) -> pa.Array:
    ids = old.column("product_id")
    return ids.filter(pc.invert(pc.is_in(ids, new.column("product_id").combine_chunks()))).combine_chunks()


def bools(column: pa.ChunkedArray | pa.Array) -> npt.NDArray[np.bool_]:
    """A column of booleans without nulls, as numpy has them."""
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=bool)
