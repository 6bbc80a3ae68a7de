"""All staged products reduced: their rows dealt out once to buckets that fit into memory, and read bucket by bucket."""

from __future__ import annotations

import math
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import RunError, first_line
from pipeline.paths import open_file, resolve
from pipeline.run.ledger import dealt_ending
from pipeline.run.memory import give_back_freed_memory
from pipeline.run.partition import PartitionResult, Staged, grouped, staged_files
from pipeline.run.reduce import Reduction, reduce_products, write_table
from pipeline.run.scan import METADATA
from pipeline.run.signals import Stop
from pipeline.run.spill import key_hashes
from pipeline.run.staging import read_staged
from pipeline.run.tasks import run_tasks
from pipeline.store.content import content_digest
from pipeline.store.schemas import products_schema
from pipeline.store.tables import Database, write_rows

_KEYS = ("kind", "product_id", "row", "ordinal", "sha256", "vector", "reason")
_BATCH_ROWS = 4096
_PRODUCTS_PER_TASK = 100_000
"""Products of one fragment, from as many buckets as hold them: twice what a later run would count as a small one."""

_BUCKET_BYTES = 48_000_000
_ROW_BYTES = 1_000  # of an input beside its vector: hash, ids, its share of the metadata, and the arrays of reducing it
_DEALT_BYTES = 32_000_000  # rows in hand while they are dealt out, unless a bucket then gets too little of them at once
_LEAST_PIECE_BYTES, _MOST_DEALT_BYTES = 250_000, 256_000_000


@dataclass(frozen=True)
class Dealt:
    """A file of rows dealt out: for each bucket a piece of them, and then again one for each.

    A piece is an Arrow stream of its own: an Arrow file would have one dictionary for all, no checksums, and a list of
    its batches that grows with the catalog and is read whole for each bucket.

    Attributes:
        pieces: int64 (rounds, buckets, 3), where each begins, its bytes (0 where it has no rows), and their CRC-32.
    """

    path: str
    pieces: np.ndarray


@dataclass
class ReducedPart:
    """What a task made of its buckets.

    Attributes:
        fragments: of products, as JSON.
        ids: arrays of every product id that the buckets hold.
        products: how many have a vector, by partition.
        texts: of them.
        images: of them.
        content: `content_digest` of the products, not yet taken modulo 2^128.
        empty: (product_id, partition, row) of products without a single input.
        ordinals_path: a file of `Reduced.ordinals`; None where the catalog gives images their places.
    """

    fragments: list[str] = field(default_factory=list)
    ids: list[pa.Array] = field(default_factory=list)
    products: Counter[str] = field(default_factory=Counter)
    texts: int = 0
    images: int = 0
    content: int = 0
    empty: list[tuple[str, str, int]] = field(default_factory=list)
    ordinals_path: str | None = None


def reduce_all(
    db: Database,
    results: Sequence[PartitionResult],
    how: Reduction,
    folder: str,
    *,
    is_whole: bool,
    is_brief: bool,
    stop: Stop,
) -> list[ReducedPart]:
    """Reduce all products of staged partitions, and write them as fragments; nothing is visible yet.

    Where they are more than a bucket holds, their rows are dealt out first: each staged file is read once and each
    bucket reads its own rows, so that a product costs the same in whatever catalog.

    Args:
        db: the database.
        results: the staged partitions.
        how: dimension, weights and carried columns.
        folder: where tasks leave what they hand on, for all machines to read; removed by the caller.
        is_whole: whether the fragments will be the whole table.
        is_brief: whether all of it takes a second or two.
        stop: ends the work when it is set.
    """
    sources = staged_files(results)
    inputs = sum(result.counts["embedded"] + result.counts["reused"] for result in results)
    buckets = 1 if is_brief else bucket_count(inputs, how.dim)
    if buckets == 1:
        reads = [partial(read_staged_rows, sources, how.carried)]
        return run_tasks(_reduce, [(db, reads, how, is_whole, folder)], stop=stop, is_brief=is_brief)
    groups = grouped(sources, results, ("embedded", "reused"))
    ending = dealt_ending(db.uri)
    files = run_tasks(deal, [(group, how.carried, buckets, folder, ending) for group in groups], stop=stop)
    products = sum(result.counts["products"] for result in results)
    shares = np.array_split(np.arange(buckets), min(buckets, max(1, products // _PRODUCTS_PER_TASK)))
    reads = [partial(read_bucket, [(file.path, file.pieces[:, bucket]) for file in files]) for bucket in range(buckets)]
    tasks = [(db, [reads[bucket] for bucket in share], how, is_whole, folder) for share in shares]
    reduced = run_tasks(_reduce, tasks, stop=stop)
    for file in files:  # as large as the staged vectors: not to lie there while indices are built
        filesystem, inside = resolve(file.path)
        filesystem.delete_file(inside)
    return reduced


def bucket_count(inputs: int, dim: int) -> int:
    """How many buckets keep what is made of each under some 100 to 200 MB.

    Args:
        inputs: of all products together.
        dim: of their vectors.
    """
    return max(1, math.ceil(inputs * (dim * 4 + _ROW_BYTES) / _BUCKET_BYTES))


def bucket_of(product_ids: pa.ChunkedArray | pa.Array, buckets: int) -> np.ndarray:
    """int64 (N,): the bucket of each id, by a hash that is the same in every process."""
    return (key_hashes(product_ids) % np.uint64(buckets)).astype(np.int64)


def deal(
    sources: Sequence[Staged], carried: Sequence[pa.Field], buckets: int, folder: str, ending: str = ".arrow"
) -> Dealt:
    """Read staged files once, and write their rows by bucket, so that no bucket needs to read more than its own.

    Args:
        sources: the staged files.
        carried: columns beside the product's own.
        buckets: how many.
        folder: where the file goes, for all machines to read.
        ending: of its name.

    Returns:
        The file and where its pieces lie.
    """
    path = f"{folder.rstrip('/')}/{uuid.uuid4().hex[:12]}{ending}"  # a second try of a task must not meet the first
    filesystem, inside = resolve(path)
    handful = min(max(_DEALT_BYTES, buckets * _LEAST_PIECE_BYTES), _MOST_DEALT_BYTES)
    rounds: list[list[tuple[int, int, int]]] = []
    at = 0
    with filesystem.open_output_stream(inside) as sink:
        for rows in _handfuls(_rows(sources, carried), handful):
            bucket = bucket_of(rows.column("product_id"), buckets)
            order = np.argsort(bucket, kind="stable")
            rounds.append([])
            for places in np.split(order, np.searchsorted(bucket[order], np.arange(1, buckets))):
                piece = _to_bytes(rows.take(pa.array(places))) if len(places) else b""
                sink.write(piece)
                rounds[-1].append((at, len(piece), zlib.crc32(piece)))
                at += len(piece)
            give_back_freed_memory()
    return Dealt(path, np.array(rounds, np.int64).reshape(len(rounds), buckets, 3))


def _to_bytes(rows: pa.RecordBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_batch(rows)
    return sink.getvalue()


def read_staged_rows(sources: Sequence[Staged], carried: Sequence[pa.Field]) -> pa.Table:
    """All products' rows of some staged files, without thumbnails: the one bucket of a small run."""
    tables = list(_rows(sources, carried))
    return pa.concat_tables(tables) if tables else pa.table({})


def read_bucket(files: Sequence[tuple[str, np.ndarray]]) -> pa.Table:
    """The rows of one bucket's products; a product is wholly in one bucket.

    Args:
        files: paths, and of each the bucket's own part of `Dealt.pieces`: int64 (rounds, 3).

    Raises:
        RunError: a file is gone or damaged.
    """
    tables = []
    for path, pieces in files:
        filesystem, inside = resolve(path)
        try:
            with open_file(filesystem, inside) as source:
                for begin, size, checksum in pieces[pieces[:, 1] > 0].tolist():
                    source.seek(begin)
                    data = source.read(size)
                    if zlib.crc32(data) != checksum:
                        raise OSError(f"{size:,} bytes from {begin:,} on are others")
                    tables.append(pa.ipc.open_stream(data).read_all())
        except OSError as error:
            raise RunError(
                f"the file {path}, which this run wrote a moment ago, cannot be read as it was written "
                f"({first_line(error)}); nothing was released: see that nothing else writes to the staging folder, and "
                "run the same command again"
            ) from error
    return pa.concat_tables(tables).unify_dictionaries() if tables else pa.table({})


def _reduce(
    db: Database, reads: Sequence[Callable[[], pa.Table]], how: Reduction, is_whole: bool, folder: str
) -> ReducedPart:
    """The task of some buckets, one after another into one fragment."""
    told = ReducedPart()
    ordinals: list[pa.Table] = []

    def batches() -> Iterator[pa.RecordBatch]:
        for read in reads:
            reduced = reduce_products(read(), how)
            products = reduced.products
            told.ids.append(reduced.ids)
            told.products.update(products.column("partition").to_pylist())
            told.texts += pc.sum(products.column("has_text")).as_py() or 0
            told.images += pc.sum(products.column("n_images")).as_py() or 0
            told.content += content_digest(products)
            told.empty += reduced.empty
            if reduced.ordinals is not None:
                ordinals.append(reduced.ordinals)
            yield from products.to_batches(max_chunksize=_BATCH_ROWS)
            del reduced, products  # before the next bucket is made
            give_back_freed_memory()

    schema = products_schema(how.dim, how.carried)
    told.fragments = write_rows(db, "products", schema, batches(), is_whole=is_whole)
    if ordinals:
        told.ordinals_path = f"{folder.rstrip('/')}/{uuid.uuid4().hex[:12]}.ordinals.parquet"
        write_table(told.ordinals_path, pa.concat_tables(ordinals))
    return told


def _rows(sources: Sequence[Staged], carried: Sequence[pa.Field]) -> Iterator[pa.Table]:
    """What staged files say of products, with the partition that says it."""
    columns = [*_KEYS, *METADATA, *(f"carried.{field.name}" for field in carried)]
    for source in sources:
        for batch in read_staged(source.path, columns):
            is_part = pc.and_(pc.is_valid(batch.column("product_id")), pc.not_equal(batch.column("kind"), "seen"))
            rows = pa.Table.from_batches([batch]).filter(is_part)
            if rows.num_rows:
                place = rows.schema.get_field_index("vector")
                rows = rows.set_column(place, "vector", _without_nulls(rows.column("vector").combine_chunks()))
                yield rows.append_column("partition", pa.array([source.partition] * rows.num_rows, pa.string()))


def _without_nulls(vectors: pa.FixedSizeListArray) -> pa.ListArray:
    """Lists of any length, of which a null takes no room: a third of the rows are metadata and have no vector."""
    is_there = vectors.is_valid().to_numpy(zero_copy_only=False)
    ends = np.cumsum(is_there, dtype=np.int32) * np.int32(vectors.type.list_size)
    offsets = pa.array(np.concatenate([[np.int32(0)], ends]), pa.int32())
    return pa.ListArray.from_arrays(offsets, vectors.drop_null().flatten(), mask=pa.array(~is_there))


def _handfuls(tables: Iterator[pa.Table], most_bytes: int) -> Iterator[pa.RecordBatch]:
    """The same rows, in batches of about so many bytes."""
    held: list[pa.Table] = []
    size = 0
    for table in chain(tables, [None]):
        if table is not None:
            held.append(table)
            size += table.nbytes
        if held and (table is None or size >= most_bytes):
            (batch,) = pa.concat_tables(held).combine_chunks().to_batches()
            held, size = [], 0
            yield batch
