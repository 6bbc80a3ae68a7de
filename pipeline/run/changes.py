"""What a catalog changed since a release, by content: partitions by digest, rows by digest, inputs by hash."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.catalog.partitions import Catalog, Partition, file_of
from pipeline.catalog.products import RowPlan, Rows
from pipeline.run.rows import ROW_BITS, bools, by_partition, codes_of, place_of, row_keys, row_plans, row_schema, settle
from pipeline.run.scan import read_scanned
from pipeline.run.spill import Keys, Spill, bucket_count, key_hashes

if TYPE_CHECKING:  # they bring Lance, which an actor need not wait for
    from pipeline.store.releases import Release
    from pipeline.store.tables import Database

log = logging.getLogger(__name__)

_BATCH_ROWS = 65_536
_SUMS = ("products", "texts", "images")
_NEW_ROWS = pa.schema(
    [
        ("product_id", pa.string()),
        ("place", pa.int64()),
        ("digest", pa.binary(16)),
        ("has_text", pa.bool_()),
        ("n_images", pa.int64()),
        ("text_key", pa.uint64()),
        ("images_key", pa.uint64()),
    ]
)
_OLD_ROWS = pa.schema(
    [("product_id", pa.string()), ("source", pa.int32()), ("row", pa.int64()), ("digest", pa.binary(16))]
)
_RELEASED = pa.schema([("product_id", pa.string()), ("key", pa.uint64())])

Scan = Callable[[Sequence[Partition]], Mapping[str, str]]
"""Scans partitions; returns the path of the scanned file of each, by partition name."""


@dataclass(frozen=True)
class Known:
    """A partition as a release knows it: a row of `partitions`."""

    digest: str
    settings: str
    rows: int
    products: int
    texts: int
    images: int
    rejected: int
    rejected_rows: int


@dataclass(frozen=True)
class Changes:
    """The products that a run has to write again or take out, and why.

    Attributes:
        unread: names of partitions that are as they were.
        scanned: the other partitions, with their scanned files.
        roles: what the rows of touched products are, by partition.
        touched_rows: which rows those are, by partition.
        touched: ids of products that are written again.
        gone: ids of released products that the catalog does not hold any more; empty for an upsert.
        dropped: names of partitions that the release knows and the catalog does not hold; empty for an upsert.
        superseded: names of partitions outside the catalog whose products this run takes over.
        absent: how many released products the catalog does not hold.
        untouched: products, texts and images of the products that stay as they are, by scanned partition.
        released: how many products the release holds.
        added, averaged, relabelled: touched products that are new, that have another text or other images, and of which
            something else changed.
    """

    unread: frozenset[str]
    scanned: Mapping[str, str]
    roles: Mapping[str, RowPlan]
    touched_rows: Mapping[str, Rows]
    touched: pa.Array
    gone: pa.Array
    dropped: frozenset[str]
    superseded: frozenset[str]
    absent: int
    untouched: Mapping[str, Mapping[str, int]]
    released: int
    added: int
    averaged: int
    relabelled: int

    @property
    def is_nothing(self) -> bool:
        """Whether every product of the catalog is in the release as it should be."""
        return not (len(self.touched) or len(self.gone))


def known_partitions(db: Database, base: Release | None) -> dict[str, Known]:
    """The partitions of a release by name; empty without one."""
    if base is None:
        return {}
    names = ["partition", *Known.__dataclass_fields__]
    rows = db.dataset("partitions", base.versions["partitions"]).to_table(columns=names).to_pylist()
    return {row.pop("partition"): Known(**row) for row in rows}


def plan_changes(
    db: Database,
    base: Release | None,
    catalog: Catalog,
    scan: Scan,
    *,
    settings: str,
    is_truth: bool,
    bad: frozenset[str] = frozenset(),
    is_fresh: bool = False,
    verify_content: bool = False,
) -> Changes:
    """Compare a catalog with a release.

    Args:
        db: the database.
        base: the release; None: everything is new.
        catalog: the checked catalog.
        scan: reads partitions whose digest is another one.
        settings: digest of what decides how rows are read; a partition read with other settings is read again.
        is_truth: whether products that the catalog does not hold are gone; else they stay.
        bad: hashes of inputs that the release has rejected for what they are.
        is_fresh: write every product of the catalog again.
        verify_content: read every partition, whatever its digest says.
    """
    known = known_partitions(db, base)
    unread = {
        p.name
        for p in catalog.partitions
        if not (verify_content or is_fresh)
        and (before := known.get(p.name)) is not None
        and (before.digest, before.settings) == (p.digest, settings)
    }
    names = {partition.name for partition in catalog.partitions}
    dropped = frozenset(set(known) - names) if is_truth else frozenset[str]()
    scanned: dict[str, str] = {}
    if len(unread) == len(names) and not dropped:
        return _nothing(frozenset(unread), base, sum(k.products for name, k in known.items() if name not in names))
    while True:
        pending = [p for p in catalog.partitions if p.name not in unread and p.name not in scanned]
        if pending:
            log.info("reading %d of %d partitions, the others are as they were", len(pending), len(names))
            scanned |= scan(pending)
        found = _compare(db, base, catalog, known, unread, scanned, bad=bad, is_truth=is_truth, is_fresh=is_fresh)
        if not found.reaching:
            break
        unread -= {
            catalog.partitions[i].name for i in found.reaching
        }  # a touched product has rows there: it is made of all its rows
    roles = _settle(catalog, scanned, found.touched_rows)
    return Changes(
        unread=frozenset(unread),
        scanned=scanned,
        roles=roles,
        touched_rows=found.touched_rows,
        touched=pa.concat_arrays([pa.array([], pa.string()), *found.touched]),
        gone=pa.concat_arrays([pa.array([], pa.string()), *found.gone]),
        dropped=dropped,
        superseded=frozenset(found.superseded),
        absent=found.absent,
        untouched=found.untouched(catalog, scanned),
        released=found.released,
        added=found.added,
        averaged=found.averaged,
        relabelled=found.relabelled,
    )


def _nothing(unread: frozenset[str], base: Release | None, absent: int) -> Changes:
    none = pa.array([], pa.string())
    released = int(base.checks.get("products", 0)) if base else 0
    return Changes(unread, {}, {}, {}, none, none, frozenset(), frozenset(), absent, {}, released, 0, 0, 0)


@dataclass
class _Found:
    """What comparing has found, bucket after bucket."""

    sums: npt.NDArray[np.int64]  # (3, partitions): products, texts and images that stay
    places: list[Rows] = field(default_factory=list)
    touched: list[pa.Array] = field(default_factory=list)
    gone: list[pa.Array] = field(default_factory=list)
    reaching: set[int] = field(default_factory=set)  # unread partitions, by number, with rows of touched products
    superseded: set[str] = field(default_factory=set)
    touched_rows: Mapping[str, Rows] = field(default_factory=dict)
    absent: int = 0
    released: int = 0
    added: int = 0
    averaged: int = 0
    relabelled: int = 0

    def untouched(self, catalog: Catalog, scanned: Mapping[str, str]) -> dict[str, dict[str, int]]:
        numbers = {p.name: i for i, p in enumerate(catalog.partitions)}
        return {name: dict(zip(_SUMS, self.sums[:, numbers[name]].tolist(), strict=True)) for name in scanned}


@dataclass(frozen=True)
class _Sources:
    """The partitions of old rows, by number: where they stand in the catalog, and in the order of files."""

    names: list[str]
    number: Rows  # in the catalog, -1 for those outside
    is_kept: npt.NDArray[np.bool_]
    rank: Rows  # of the file, so that rank and row order old rows as places do


def _compare(
    db: Database,
    base: Release | None,
    catalog: Catalog,
    known: Mapping[str, Known],
    unread: set[str],
    scanned: Mapping[str, str],
    *,
    bad: frozenset[str],
    is_truth: bool,
    is_fresh: bool,
) -> _Found:
    """Products whose rows are not what they were, over all buckets."""
    found = _Found(np.zeros((len(_SUMS), len(catalog.partitions)), np.int64))
    numbers = {p.name: i for i, p in enumerate(catalog.partitions)}
    names = sorted(known)
    files = {name: rank for rank, name in enumerate(sorted({file_of(name) for name in names}))}
    sources = _Sources(
        names,
        np.array([numbers.get(name, -1) for name in names], np.int64),
        np.array([name in unread for name in names], bool),
        np.array([files[file_of(name)] for name in names], np.int64),
    )
    rejected = pa.array([], pa.string())
    if base is not None:
        rejects = db.dataset("rejects", base.versions["rejects"]).to_table(columns=["product_id"])
        rejected = rejects.column("product_id").drop_null().combine_chunks()
    total = sum(p.rows for p in catalog.partitions) + sum(k.rows for k in known.values())
    buckets = bucket_count(total)
    with Spill(_NEW_ROWS, buckets) as new, Spill(_OLD_ROWS, buckets) as old, Spill(_RELEASED, buckets) as released:
        for name, path in scanned.items():
            for rows in _new_rows(numbers[name], path, bad):
                new.add(rows, key_hashes(rows.column("product_id")))
        if base is not None:
            for rows in _old_rows(db, base, names):
                old.add(rows, key_hashes(rows.column("product_id")))
            for rows in _released(db, base):
                released.add(rows, key_hashes(rows.column("product_id")))
                found.released += rows.num_rows
        for bucket in range(buckets):
            _compare_bucket(
                found, new.read(bucket), old.read(bucket), released.read(bucket), sources, rejected,
                is_truth=is_truth, is_fresh=is_fresh,
            )  # fmt: skip
    places = np.concatenate([np.zeros(0, np.int64), *found.places])
    found.touched_rows = {catalog.partitions[i].name: rows for i, rows in by_partition(places).items()}
    return found


def _compare_bucket(
    found: _Found,
    new: pa.Table,
    old: pa.Table,
    released: pa.Table,
    sources: _Sources,
    rejected: pa.Array,
    *,
    is_truth: bool,
    is_fresh: bool,
) -> None:
    """One bucket: a product stays where its rows, in order, say what they said."""
    if not (new.num_rows or old.num_rows or released.num_rows):
        return
    ids = pa.chunked_array([*(t.column("product_id").combine_chunks() for t in (new, old, released))], pa.string())
    codes = codes_of(ids)
    of_new, of_old, of_released = np.split(codes, [new.num_rows, new.num_rows + old.num_rows])
    n = int(codes.max()) + 1
    source = old.column("source").to_numpy()
    row = old.column("row").to_numpy()
    number, is_kept = sources.number[source], sources.is_kept[source]
    # The rows that make the product now: those just read, and those of partitions that are as they were.
    now_code = np.concatenate([of_new, of_old[is_kept]])
    place = np.concatenate([new.column("place").to_numpy(), (number[is_kept] << ROW_BITS) | row[is_kept]])
    old_digest, old_has = _digests(old.column("digest"))
    new_digest, new_has = _digests(new.column("digest"))
    digest = np.concatenate([new_digest, old_digest[is_kept]])
    has_digest = np.concatenate([new_has, old_has[is_kept]])
    order = np.lexsort((place, now_code))
    old_order = np.lexsort(((sources.rank[source] << ROW_BITS) | row, of_old))
    count, old_count = np.bincount(now_code, minlength=n), np.bincount(of_old, minlength=n)
    is_same_count = (count == old_count) & (count > 0)
    mine, before = order[is_same_count[now_code[order]]], old_order[is_same_count[of_old[old_order]]]
    differs = (digest[mine] != old_digest[before]).any(axis=1) | ~has_digest[mine] | ~old_has[before]
    is_changed = ~is_same_count | (np.bincount(now_code[mine][differs], minlength=n) > 0)
    is_released = np.bincount(of_released, minlength=n) > 0
    is_retold = np.zeros(n, bool)  # its rejects name places that may have moved
    is_retold[of_new[bools(pc.is_in(new.column("product_id"), rejected))]] = True
    is_touched = (count > 0) & (is_changed | is_retold | ~is_released | is_fresh)
    is_absent = is_released & (count == 0)
    is_gone = is_absent & is_truth
    found.absent += int(is_absent.sum())

    found.reaching |= set((number[is_kept & is_touched[of_old]]).tolist())
    found.superseded |= {sources.names[i] for i in np.unique(source[(number < 0) & is_touched[of_old]])}
    found.places.append(new.column("place").to_numpy()[is_touched[of_new]])
    first_of = np.zeros(n, np.int64)
    first_of[codes[::-1]] = np.arange(len(codes))[::-1]
    all_ids = ids.combine_chunks()
    for is_wanted, target in ((is_touched, found.touched), (is_gone, found.gone)):
        target.append(all_ids.take(pa.array(first_of[np.flatnonzero(is_wanted)])))

    is_first = np.zeros(len(now_code), bool)
    is_first[order] = np.diff(now_code[order], prepend=-1) != 0
    is_first = is_first[: len(of_new)]
    stays = ~is_touched[of_new]
    partition = new.column("place").to_numpy() >> ROW_BITS
    texts = bools(new.column("has_text")) & is_first
    for at, value in enumerate((is_first, texts, new.column("n_images").to_numpy())):
        found.sums[at] += np.bincount(partition[stays], weights=value[stays], minlength=found.sums.shape[1]).astype(
            np.int64
        )

    keys = np.zeros(n, np.uint64)
    np.add.at(keys, of_new, new.column("images_key").to_numpy())
    np.add.at(keys, of_new[is_first], new.column("text_key").to_numpy()[is_first])
    old_keys = np.zeros(n, np.uint64)
    old_keys[of_released] = released.column("key").to_numpy()
    is_there = is_touched & is_released
    found.added += int((is_touched & ~is_released).sum())
    found.averaged += int((is_there & (keys != old_keys)).sum())
    found.relabelled += int((is_there & (keys == old_keys)).sum())


def _settle(catalog: Catalog, scanned: Mapping[str, str], touched: Mapping[str, Rows]) -> dict[str, RowPlan]:
    """What the rows of touched products are, from what was scanned."""
    numbers = {p.name: i for i, p in enumerate(catalog.partitions)}
    columns = ["product_id", "row", "title", "description", "broad_category", "fine_category", "images"]
    with Spill(row_schema(catalog), bucket_count(sum(map(len, touched.values())))) as spill:
        for name, rows in touched.items():
            for table in read_scanned(scanned[name], columns):
                chosen = table.filter(pa.array(is_member(table.column("row").to_numpy(), rows)))
                if chosen.num_rows:
                    place = place_of(numbers[name], chosen.column("row").to_numpy())
                    told = {role: chosen.column(role) for role in columns[2:6]} | {"image_ordinal": _ordinal(chosen)}
                    ids = chosen.column("product_id")
                    spill.add(row_keys(catalog, ids, place, told), key_hashes(ids))
        return row_plans(catalog, settle(catalog, spill), {})


def is_member(rows: Rows, of: Rows) -> npt.NDArray[np.bool_]:
    """Which of `rows` are in `of`, which is ascending."""
    at = np.searchsorted(of, rows)
    return (
        np.asarray((at < len(of)) & (of[np.minimum(at, len(of) - 1)] == rows)) if len(of) else np.zeros(len(rows), bool)
    )


def _ordinal(rows: pa.Table) -> pa.ChunkedArray:
    """The ordinal of each row's only image, for the image shape."""
    found = [images[0]["ordinal"] if images else None for images in rows.column("images").to_pylist()]
    return pa.chunked_array([pa.array(found, pa.int64())])


def _new_rows(number: int, path: str, bad: frozenset[str]) -> Iterator[pa.Table]:
    """What a scanned file says of rows with an id."""
    columns = ["product_id", "row", "digest", "text_sha256", "is_blank", "images"]
    for table in read_scanned(path, columns):
        rows = table.filter(pc.is_valid(table.column("product_id")))
        images = rows.column("images").combine_chunks()
        counts = pc.fill_null(pc.list_value_length(images), 0).to_numpy()
        hashes = images.flatten().field("sha256")
        keys = key_hashes(hashes)
        keys[bools(pc.is_null(hashes))] = 0
        if bad:
            keys[bools(pc.is_in(hashes, pa.array(sorted(bad))))] = 0
        text = rows.column("text_sha256")
        text_keys = key_hashes(text)
        text_keys[bools(pc.fill_null(rows.column("is_blank"), fill_value=True))] = 0
        yield pa.table(
            {
                "product_id": rows.column("product_id"),
                "place": place_of(number, rows.column("row").to_numpy()),
                "digest": rows.column("digest"),
                "has_text": pc.is_valid(text),
                "n_images": counts,
                "text_key": text_keys,
                "images_key": _sums(keys, counts),
            },
            schema=_NEW_ROWS,
        )


def _old_rows(db: Database, base: Release, names: Sequence[str]) -> Iterator[pa.Table]:
    order = pa.array(names, pa.string())
    dataset = db.dataset("catalog_rows", base.versions["catalog_rows"])
    for batch in dataset.to_batches(batch_size=_BATCH_ROWS, filter="product_id IS NOT NULL"):
        rows = pa.Table.from_batches([batch])
        source = pc.index_in(rows.column("partition"), order).cast(pa.int32())
        yield pa.table(
            {"product_id": rows["product_id"], "source": source, "row": rows["row"], "digest": rows["digest"]},
            schema=_OLD_ROWS,
        )


def _released(db: Database, base: Release) -> Iterator[pa.Table]:
    """Released products with a number that is the same for the same text and images, in whatever order."""
    dataset = db.dataset("products", base.versions["products"])
    for batch in dataset.to_batches(columns=["product_id", "text_sha256", "images_sha256"], batch_size=_BATCH_ROWS):
        rows = pa.Table.from_batches([batch])
        images = rows.column("images_sha256").combine_chunks()
        counts = pc.fill_null(pc.list_value_length(images), 0).to_numpy()
        keys = key_hashes(rows.column("text_sha256")) + _sums(key_hashes(images.flatten()), counts)
        yield pa.table({"product_id": rows.column("product_id"), "key": keys}, schema=_RELEASED)


def _sums(values: Keys, counts: npt.NDArray[np.int64]) -> Keys:
    """uint64: the sum of each list's values, modulo 2^64."""
    total = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values, out=total[1:])
    ends = np.cumsum(counts)
    return np.asarray(total[ends] - total[ends - counts])


def _digests(column: pa.ChunkedArray) -> tuple[Keys, npt.NDArray[np.bool_]]:
    """Digests as uint64 (N, 2), and which rows have one."""
    array = column.combine_chunks()
    has_digest = bools(pc.is_valid(array))
    filled = pc.fill_null(array, pa.scalar(bytes(16), pa.binary(16)))
    raw = np.frombuffer(filled.buffers()[1], np.uint64)[2 * filled.offset : 2 * (filled.offset + len(filled))]
    return raw.reshape(-1, 2), has_digest
