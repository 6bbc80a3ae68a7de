"""Which inputs of touched products have to go through a tower: those whose hash no released vector has, each once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.catalog.partitions import Catalog
from pipeline.catalog.products import RowPlan, Rows
from pipeline.paths import open_file, resolve
from pipeline.run.changes import Changes, is_member
from pipeline.run.rows import ROW_BITS, bools, by_partition, place_of
from pipeline.run.scan import read_scanned
from pipeline.run.spill import Keys, Spill, bucket_count, key_hashes

if TYPE_CHECKING:  # they bring Lance, which an actor need not wait for
    from pipeline.store.releases import Release
    from pipeline.store.tables import Database

KINDS = ("text", "image")
_BATCH_ROWS = 65_536
_INPUTS = pa.schema([("kind", pa.int8()), ("sha256", pa.string()), ("place", pa.int64()), ("bytes", pa.int64())])
_KNOWN = pa.schema([("kind", pa.int8()), ("sha256", pa.string())])
WANTED = pa.schema([("kind", pa.string()), ("sha256", pa.string()), ("row", pa.int64()), ("is_shared", pa.bool_())])
"""A wanted file: the inputs that an actor embeds of a partition, with a row of each; shared ones are used by others."""


@dataclass(frozen=True)
class WantedFile:
    """The inputs to embed of one partition.

    Attributes:
        path: of the file, rows of `WANTED`.
        rows: of the partition that hold them.
        digest: the same for the same inputs and rows.
    """

    path: str
    rows: Rows
    digest: str
    has_shared: bool


@dataclass
class Wanted:
    """What goes through the towers, and what does not.

    Attributes:
        files: by partition name; partitions of which nothing is wanted are not there.
        texts, images: how many of each are wanted.
        bytes: of the wanted images.
        reused: inputs of touched products that have a vector, or get one from an equal input.
        rejected: inputs that are known to be bad.
    """

    files: dict[str, WantedFile] = field(default_factory=dict)
    texts: int = 0
    images: int = 0
    bytes: int = 0
    reused: int = 0
    rejected: int = 0


def plan_inputs(
    db: Database,
    release: Release | None,
    catalog: Catalog,
    changes: Changes,
    *,
    bad: frozenset[str] = frozenset(),
    folder: str = "",
) -> Wanted:
    """Settle which inputs of the touched products have to be embedded, and in which partition.

    Args:
        db: the database.
        release: whose vectors can be taken; None where there is none of this fingerprint.
        catalog: the checked catalog.
        changes: from `plan_changes`.
        bad: hashes that are known to be bad.
        folder: where the wanted files go; empty: none are written, as the plan is only to be shown.
    """
    total = sum(len(rows) for rows in changes.touched_rows.values())
    numbers = {p.name: i for i, p in enumerate(catalog.partitions)}
    wanted = Wanted()
    buckets = bucket_count(2 * total)
    parts = min(64, max(1, len(changes.touched_rows)))
    with Spill(_INPUTS, buckets) as inputs, Spill(_KNOWN, buckets) as known, Spill(_OWNED, parts) as owned:
        keys = []
        for name, rows in changes.touched_rows.items():
            for table in _inputs(numbers[name], changes.scanned[name], rows, changes.roles.get(name, RowPlan())):
                hashed = key_hashes(table.column("sha256"))
                keys.append(hashed)
                inputs.add(table, hashed)
        if release is not None and keys:
            for table, hashed in _released(db, release, np.unique(np.concatenate(keys))):
                known.add(table, hashed)
        rejected = pa.array(sorted(bad), pa.string())
        for bucket in range(buckets):
            found = _join(inputs.read(bucket), known.read(bucket), rejected, wanted)
            owned.add(found, (found.column("place").to_numpy() >> ROW_BITS).astype(np.uint64))
        if folder:
            for part in range(parts):
                _write(catalog, owned.read(part), folder, wanted)
    return wanted


_OWNED = pa.schema([("kind", pa.int8()), ("sha256", pa.string()), ("place", pa.int64()), ("is_shared", pa.bool_())])


def _inputs(number: int, path: str, touched: Rows, plan: RowPlan) -> Iterator[pa.Table]:
    """The inputs of a partition's touched rows that have a hash."""
    rejected = np.array(sorted(plan.rejected), np.int64)
    for table in read_scanned(path, ["product_id", "row", "reason", "text_sha256", "is_blank", "images"]):
        row = table.column("row").to_numpy()
        speaks = is_member(row, touched) & ~is_member(row, rejected) & bools(pc.is_null(table.column("reason")))
        rows = table.filter(pa.array(speaks))
        if not rows.num_rows:
            continue
        place = place_of(number, rows.column("row").to_numpy())
        is_text = bools(pc.is_valid(rows.column("text_sha256"))) & ~bools(rows.column("is_blank"))
        is_text &= ~is_member(rows.column("row").to_numpy(), plan.followers)
        images = rows.column("images").combine_chunks()
        flat = images.flatten()
        owner = np.repeat(place, pc.fill_null(pc.list_value_length(images), 0).to_numpy())
        texts = rows.column("text_sha256").filter(pa.array(is_text)).combine_chunks()
        has_hash = bools(pc.is_valid(flat.field("sha256")))
        hashes = flat.field("sha256").filter(pa.array(has_hash))
        yield pa.table(
            {
                "kind": np.repeat(np.array([0, 1], np.int8), [len(texts), len(hashes)]),
                "sha256": pa.concat_arrays([texts, hashes]),
                "place": np.concatenate([place[is_text], owner[has_hash]]),
                "bytes": pa.concat_arrays(
                    [pa.array(np.zeros(len(texts), np.int64)), flat.field("bytes").filter(pa.array(has_hash))]
                ),
            },
            schema=_INPUTS,
        )


def _released(db: Database, release: Release, keys: Keys) -> Iterator[tuple[pa.Table, Keys]]:
    """Hashes of released inputs that may be among those with `keys`, which are sorted."""
    for kind, table, column in ((0, "products", "text_sha256"), (1, "images", "sha256")):
        dataset = db.dataset(table, release.versions[table])
        for batch in dataset.to_batches(columns=[column], batch_size=_BATCH_ROWS):
            values = batch.column(column)
            hashed = key_hashes(values)
            at = np.minimum(np.searchsorted(keys, hashed), len(keys) - 1)
            is_near = (keys[at] == hashed) & bools(pc.is_valid(values))
            found = values.filter(pa.array(is_near))
            if len(found):
                yield (
                    pa.table({"kind": np.full(len(found), kind, np.int8), "sha256": found}, schema=_KNOWN),
                    hashed[is_near],
                )


def _join(inputs: pa.Table, known: pa.Table, bad: pa.Array, wanted: Wanted) -> pa.Table:
    """The inputs of a bucket that no vector is known of, each with its first place; the counts go to `wanted`."""
    chosen: list[pa.Table] = [_OWNED.empty_table()]
    for kind in (0, 1):
        mine = inputs.filter(pc.equal(inputs.column("kind"), kind))
        theirs = known.filter(pc.equal(known.column("kind"), kind)).column("sha256").combine_chunks()
        if not mine.num_rows:
            continue
        is_bad = bools(pc.is_in(mine.column("sha256"), bad))
        is_known = bools(pc.is_in(mine.column("sha256"), theirs)) & ~is_bad
        wanted.rejected += int(is_bad.sum())
        rest = mine.filter(pa.array(~is_bad & ~is_known))
        wanted.reused += int(is_known.sum())
        if not rest.num_rows:
            continue
        codes = rest.column("sha256").combine_chunks().dictionary_encode().indices.to_numpy()
        place = rest.column("place").to_numpy()
        order = np.lexsort((place, codes))
        is_first = np.diff(codes[order], prepend=-1) != 0
        starts = np.flatnonzero(is_first)
        last = order[np.append(starts[1:], len(order)) - 1]  # sorted by place: another partition shows at the end
        first = order[starts]
        is_shared = (place[first] >> ROW_BITS) != (place[last] >> ROW_BITS)
        owners = rest.take(pa.array(first))
        wanted.reused += rest.num_rows - len(first)
        if kind == 0:
            wanted.texts += len(first)
        else:
            wanted.images += len(first)
            wanted.bytes += int(pc.sum(owners.column("bytes")).as_py() or 0)
        chosen.append(owners.drop_columns(["bytes"]).append_column("is_shared", pa.array(is_shared)))
    return pa.concat_tables(chosen)


def _write(catalog: Catalog, owned: pa.Table, folder: str, wanted: Wanted) -> None:
    """A wanted file for each partition of a part."""
    place = owned.column("place").to_numpy()
    for number, rows in by_partition(place).items():
        name = catalog.partitions[number].name
        mine = owned.filter(pa.array((place >> ROW_BITS) == number))
        mine = mine.sort_by([("place", "ascending"), ("kind", "ascending"), ("sha256", "ascending")])
        kinds = pa.array(KINDS, pa.string()).take(mine.column("kind").combine_chunks())
        row = pa.array(mine.column("place").to_numpy() & ((1 << ROW_BITS) - 1))
        table = pa.table(
            {"kind": kinds, "sha256": mine["sha256"], "row": row, "is_shared": mine["is_shared"]}, schema=WANTED
        )
        path = f"{folder.rstrip('/')}/{number}.wanted.parquet"
        filesystem, inside = resolve(path)
        with filesystem.open_output_stream(inside) as sink:
            pq.write_table(table, sink)
        odd = row.to_numpy().astype(np.uint64) * np.uint64(2) + np.uint64(1)
        digest = int(np.bitwise_xor.reduce(key_hashes(table["sha256"]) * odd))
        has_shared = bool(pc.any(table["is_shared"]).as_py())
        wanted.files[name] = WantedFile(path, np.unique(rows), f"{digest:016x}-{table.num_rows}", has_shared)


def read_wanted(path: str) -> pa.Table:
    """A wanted file, rows of `WANTED`."""
    filesystem, inside = resolve(path)
    with open_file(filesystem, inside) as source:
        return pq.read_table(source, schema=WANTED)


def shared_inputs(files: Mapping[str, WantedFile]) -> dict[str, WantedFile]:
    """Those partitions of which other partitions use an input."""
    return {name: file for name, file in files.items() if file.has_shared}
