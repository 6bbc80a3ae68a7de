"""Staged partitions into the tables: reduced and written by tasks, committed by the driver, verified before release."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import RunError
from pipeline.paths import open_file, resolve
from pipeline.run.memory import give_back_freed_memory
from pipeline.run.partition import PartitionResult, Staged, grouped, staged_files
from pipeline.run.reduce import (
    Reduction,
    average_vectors,
    empty_product_rejects,
    image_rows,
    reject_rows,
)
from pipeline.run.scan import read_scanned
from pipeline.run.shuffle import reduce_all
from pipeline.run.signals import Stop
from pipeline.run.staging import read_staged
from pipeline.run.tasks import run_tasks
from pipeline.store.commits import replace_all, replace_rows
from pipeline.store.schemas import (
    TABLES,
    catalog_rows_schema,
    images_schema,
    partitions_schema,
    products_schema,
    rejects_schema,
)
from pipeline.store.tables import READ_AHEAD_BYTES, Database, write_rows

BRIEF_INPUTS = 20_000
"""As many are reduced and written within a second or two, which no task would be quicker at."""

_BATCH_ROWS = 4096


@dataclass(frozen=True)
class Extent:
    """Which rows a run writes, and which leave for them.

    Attributes:
        whole: tables that the fragments become; of the others they take the place of what leaves.
        gone: products that leave though nothing takes their place.
        partitions: names of partitions whose rejects and rows leave: those that were read, and those dropped.
        taken_over: partitions outside of the catalog; the rows there of products that this run writes leave.
    """

    whole: frozenset[str]
    gone: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    partitions: tuple[str, ...] = ()
    taken_over: tuple[str, ...] = ()


@dataclass
class Loaded:
    """What the tasks wrote, before anything is committed.

    Attributes:
        fragments: per table, the fragments' metadata as JSON.
        ids: products that the staged partitions speak of; they leave the tables before the fragments come in.
        products: how many have a vector, by partition.
        content: `content_digest` of the products written.
    """

    fragments: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    ids: list[pa.Array] = field(default_factory=list)
    products: Counter[str] = field(default_factory=Counter)
    texts: int = 0
    images: int = 0
    content: int = 0
    rejects: pa.Table = field(default_factory=lambda: rejects_schema().empty_table())

    @property
    def reasons(self) -> Mapping[str, int]:
        """Rejects by reason, the commonest first."""
        return dict(Counter(self.rejects.column("reason").to_pylist()).most_common())


def load(
    db: Database,
    results: Sequence[PartitionResult],
    how: Reduction,
    extent: Extent,
    *,
    folder: str,
    run_id: str,
    stop: Stop,
    join: Callable[[], None],
) -> Loaded:
    """Reduce the staged partitions and write fragments of products, images and rejects; nothing is visible yet.

    Args:
        db: the database.
        results: the staged partitions.
        how: dimension, weights and carried columns.
        extent: which tables will be whole.
        folder: where tasks leave what they hand on, for all machines to read; removed by the caller.
        run_id: goes into the rejects.
        stop: ends the work when it is set.
        join: called before the first task.

    Raises:
        RunError: the rows written are not the inputs counted.
    """
    check_counts(results)
    results = sorted(results, key=lambda result: result.name)
    inputs = sum(result.counts["embedded"] + result.counts["reused"] for result in results)
    is_brief = inputs <= BRIEF_INPUTS
    if not is_brief:
        join()
        give_back_freed_memory()  # of embedding: what tasks need is beside it
    reduced = reduce_all(db, results, how, folder, is_whole="products" in extent.whole, is_brief=is_brief, stop=stop)
    loaded = Loaded()
    empty: list[tuple[str, str, int]] = []
    for part in reduced:
        loaded.fragments["products"] += part.fragments
        loaded.ids += part.ids
        loaded.products.update(part.products)
        loaded.texts += part.texts
        loaded.images += part.images
        loaded.content = (loaded.content + part.content) % (1 << 128)
        empty += part.empty
    ordinal_paths = [part.ordinals_path for part in reduced if part.ordinals_path]
    rejects = [empty_product_rejects(empty, run_id)]
    images = 0
    is_whole = "images" in extent.whole
    groups = [
        (db, group, how, is_whole, ordinal_paths, run_id)
        for group in grouped(staged_files(results), results, ("images",))
    ]
    for fragments, count, rejected in run_tasks(_write_images, groups, stop=stop, is_brief=is_brief):
        loaded.fragments["images"] += fragments
        images += count
        rejects.append(rejected)
    loaded.rejects = pa.concat_tables(rejects)
    rejected = sum(result.counts["rejected"] for result in results)
    told = loaded.rejects.num_rows - (pc.sum(pc.equal(loaded.rejects.column("input"), "row")).as_py() or 0)
    if (loaded.texts + loaded.images, images, told) != (inputs, loaded.images, rejected):
        raise RunError(
            f"{inputs} inputs were embedded or reused and {rejected} rejected, but {loaded.texts} texts and "
            f"{loaded.images} images reached the products, {images} the images table and {told} the rejects; nothing "
            "was committed. Please report this fault"
        )
    is_whole = "rejects" in extent.whole
    loaded.fragments["rejects"] = write_rows(db, "rejects", rejects_schema(), loaded.rejects, is_whole=is_whole)
    return loaded


def check_counts(results: Sequence[PartitionResult]) -> None:
    """See that inputs = texts + images = embedded + reused + rejected, for every partition.

    Raises:
        RunError: an input was lost, or counted twice.
    """
    for result in results:
        counts = result.counts
        inputs = counts["texts"] + counts["images"]
        if inputs != counts["embedded"] + counts["reused"] + counts["rejected"]:
            raise RunError(
                f"{result.name} has {inputs} inputs, but {counts['embedded']} were embedded, {counts['reused']} reused "
                f"and {counts['rejected']} rejected; nothing was committed. Please report this fault"
            )


def write_catalog_rows(
    db: Database, rows: Iterator[pa.Table], partitions: pa.Table, loaded: Loaded, extent: Extent
) -> None:
    """Write fragments of what a later run compares: the catalog's rows, and its partitions.

    Args:
        db: the database.
        rows: of `catalog_rows`, from `staged_rows` or `scanned_rows`.
        partitions: of `partitions`.
        loaded: told of the fragments.
        extent: which tables will be whole.
    """
    schema = catalog_rows_schema()
    batches = (batch for table in rows for batch in table.select(schema.names).cast(schema).to_batches())
    loaded.fragments["catalog_rows"] = write_rows(
        db, "catalog_rows", schema, batches, is_whole="catalog_rows" in extent.whole
    )
    loaded.fragments["partitions"] = write_rows(
        db, "partitions", partitions_schema(), partitions, is_whole="partitions" in extent.whole
    )


def staged_rows(results: Sequence[PartitionResult]) -> Iterator[pa.Table]:
    """Rows of `catalog_rows` from staged files."""
    for source in staged_files(results):
        for batch in read_staged(source.path, ["kind", "product_id", "row", "digest"]):
            yield _named(
                pa.Table.from_batches([batch.filter(pc.equal(batch.column("kind"), "seen"))]), source.partition
            )


def scanned_rows(scanned: Mapping[str, str]) -> Iterator[pa.Table]:
    """Rows of `catalog_rows` from scanned files, by partition name."""
    for partition, path in scanned.items():
        for table in read_scanned(path, ["product_id", "row", "digest"]):
            yield _named(table.filter(pc.is_valid(table.column("product_id"))), partition)


def _named(rows: pa.Table, partition: str) -> pa.Table:
    return rows.append_column("partition", pa.array([partition] * rows.num_rows, pa.string()))


def keep_products(
    db: Database, version: int, leaving: Sequence[pa.Array], how: Reduction, *, stop: Stop, join: Callable[[], None]
) -> list[str]:
    """Write the released products that stay once more, averaged with other weights: fragments of a whole table.

    Args:
        db: the database.
        version: of the released products.
        leaving: ids of products that are written from staged files, or are gone.
        how: the weight; dimension and columns are the table's own.
        stop: ends the work when it is set.
        join: called before the first task.
    """
    ids = pa.concat_arrays([pa.array([], pa.string()), *leaving])
    fragments = [fragment.fragment_id for fragment in db.dataset("products", version).get_fragments()]
    rows = int(db.dataset("products", version).count_rows())
    if rows > BRIEF_INPUTS:
        join()
    tasks = [(db, version, fragment, ids, how) for fragment in fragments]
    return [written for part in run_tasks(_keep, tasks, stop=stop, is_brief=rows <= BRIEF_INPUTS) for written in part]


def commit(
    db: Database,
    loaded: Loaded,
    how: Reduction,
    extent: Extent,
    *,
    run_id: str,
    check: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """One commit a table, one after another.

    Args:
        db: the database.
        loaded: what was written.
        how: dimension and carried columns.
        extent: what the fragments take the place of.
        run_id: kept with the transactions.
        check: called before each commit; what it raises ends the row of them.

    Returns:
        The rows that each table has to have now.
    """
    schemas = {
        "products": products_schema(how.dim, how.carried),
        "images": images_schema(how.dim),
        "rejects": rejects_schema(),
        "partitions": partitions_schema(),
        "catalog_rows": catalog_rows_schema(),
    }
    written = pa.concat_arrays([pa.array([], pa.string()), *loaded.ids])
    ids = pa.concat_arrays([written, extent.gone])
    partitions = pa.array(extent.partitions, pa.string())
    taken_over = pa.array(extent.taken_over, pa.string())
    keys = {
        "products": {"product_id": ids},
        "images": {"product_id": ids},
        "rejects": {"product_id": ids, "partition": partitions},
        "partitions": {"partition": pa.concat_arrays([partitions, taken_over])},
        "catalog_rows": {"partition": partitions},
    }
    both = {"catalog_rows": {"product_id": written, "partition": taken_over}} if len(taken_over) else {}
    rows: dict[str, int] = {}
    for table in TABLES:
        check()
        fragments = loaded.fragments[table]
        if table in extent.whole:
            rows[table] = replace_all(db, table, schemas[table], fragments, run_id=run_id)
        elif fragments or any(len(values) for values in keys[table].values()):
            rows[table] = replace_rows(db, table, keys[table], fragments, run_id=run_id, both=both.get(table))
        else:
            rows[table] = int(db.dataset(table).count_rows())
    return rows


def _keep(db: Database, version: int, fragment_id: int, leaving: pa.Array, how: Reduction) -> list[str]:
    """The task of one fragment whose products are averaged anew."""
    dataset = db.dataset("products", version)
    fragment = dataset.get_fragment(fragment_id)

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in fragment.to_batches(batch_size=_BATCH_ROWS, io_buffer_size=READ_AHEAD_BYTES):
            stays = batch.filter(pc.invert(pc.is_in(batch.column("product_id"), leaving)))
            if stays.num_rows:
                at = stays.schema.get_field_index("avg_vector")
                yield stays.set_column(at, stays.schema.field(at), average_vectors(stays, how))

    return write_rows(db, "products", dataset.schema, batches(), is_whole=True)


def _write_images(
    db: Database, sources: Sequence[Staged], how: Reduction, is_whole: bool, ordinal_paths: Sequence[str], run_id: str
) -> tuple[list[str], int, pa.Table]:
    """The task of some staged files: their images as fragments, and their rejects."""
    ordinals = None if how.has_ordinals else _ordinals_of({source.partition for source in sources}, ordinal_paths)
    places = [None if ordinals is None else ordinals[source.partition] for source in sources]
    count = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal count
        for source, own in zip(sources, places, strict=True):
            for batch in image_rows(source, how.dim, own):
                count += batch.num_rows
                yield batch
            give_back_freed_memory()

    fragments = write_rows(db, "images", images_schema(how.dim), batches(), is_whole=is_whole)
    rejects = [reject_rows(source, own, run_id) for source, own in zip(sources, places, strict=True)]
    return fragments, count, pa.concat_tables(rejects)


def _ordinals_of(partitions: Set[str], paths: Sequence[str]) -> Mapping[str, Mapping[int, int]]:
    """Row to ordinal, for the images of each of some partitions."""
    result: dict[str, dict[int, int]] = {name: {} for name in partitions}
    for path in paths:
        filesystem, inside = resolve(path)
        with open_file(filesystem, inside) as file:
            table = pq.read_table(file, filters=[("partition", "in", partitions)])
        for name, row, ordinal in zip(*(table.column(n).to_pylist() for n in table.schema.names), strict=True):
            result[name][row] = ordinal
    return result
