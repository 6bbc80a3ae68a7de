"""Staged partitions into the tables: reduced and written by tasks, committed by the driver, verified before release."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import RunError
from pipeline.paths import open_file, resolve
from pipeline.run.partition import PartitionResult
from pipeline.run.reduce import (
    Reduction,
    Staged,
    empty_product_rejects,
    image_rows,
    read_bucket,
    reduce_products,
    reject_rows,
    staged_files,
    write_table,
)
from pipeline.run.signals import Stop
from pipeline.run.tasks import run_tasks
from pipeline.store.commits import replace_all, replace_rows
from pipeline.store.content import content_digest
from pipeline.store.schemas import TABLES, images_schema, products_schema, rejects_schema
from pipeline.store.tables import Database, write_rows

_BUCKET_BYTES = 256_000_000
_IMAGES_PER_TASK = 200_000
_BRIEF_INPUTS = 20_000  # as many are reduced and written within a second or two


@dataclass
class Loaded:
    """What the tasks wrote, before anything is committed.

    Attributes:
        fragments: per table, the fragments' metadata as JSON.
        ids: products that the staged partitions speak of; they leave the tables before the fragments come in.
        content: `content_digest` of the products written.
    """

    fragments: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    ids: list[pa.Array] = field(default_factory=list)
    products: int = 0
    texts: int = 0
    images: int = 0
    content: int = 0
    rejects: pa.Table = field(default_factory=lambda: rejects_schema().empty_table())

    @property
    def reasons(self) -> Mapping[str, int]:
        """Rejects by reason, the commonest first."""
        return dict(Counter(self.rejects.column("reason").to_pylist()).most_common())


@dataclass(frozen=True)
class _Bucket:
    """A reduced bucket, as its task reports it."""

    fragments: list[str]
    ids: pa.Array
    products: int
    texts: int
    images: int
    content: int
    empty: list[tuple[str, str, int]]
    ordinals_path: str | None


def load(
    db: Database,
    results: Sequence[PartitionResult],
    how: Reduction,
    *,
    folder: str,
    run_id: str,
    is_whole: bool,
    stop: Stop,
) -> Loaded:
    """Reduce the staged partitions and write fragments of all tables; nothing is visible yet.

    Args:
        db: the database.
        results: the staged partitions.
        how: dimension, weights and carried columns.
        folder: where tasks may leave small files, beside the staged ones.
        run_id: names those files, and goes into the rejects.
        is_whole: whether the rows will be the whole tables.
        stop: ends the work when it is set.

    Raises:
        RunError: the rows written are not the inputs counted.
    """
    check_counts(results)
    sources = staged_files(sorted(results, key=lambda result: result.name))
    inputs = sum(result.counts["embedded"] + result.counts["reused"] for result in results)
    buckets = max(1, math.ceil(inputs * how.dim * 4 / _BUCKET_BYTES))
    loaded = Loaded()
    tasks = [
        (db, sources, how, is_whole, bucket, buckets, f"{folder.rstrip('/')}/{run_id}-{bucket}")
        for bucket in range(buckets)
    ]
    empty: list[tuple[str, str, int]] = []
    ordinal_paths: list[str] = []
    for reduced in run_tasks(_reduce_bucket, tasks, stop=stop, is_brief=inputs <= _BRIEF_INPUTS):
        loaded.fragments["products"] += reduced.fragments
        loaded.ids.append(reduced.ids)
        loaded.products += reduced.products
        loaded.texts += reduced.texts
        loaded.images += reduced.images
        loaded.content = (loaded.content + reduced.content) % (1 << 128)
        empty += reduced.empty
        ordinal_paths += [reduced.ordinals_path] if reduced.ordinals_path else []
    rejects = [empty_product_rejects(empty, run_id)]
    images = 0
    groups = [(db, group, how, is_whole, ordinal_paths, run_id) for group in _groups(sources, results)]
    for fragments, count, rejected in run_tasks(_write_images, groups, stop=stop, is_brief=inputs <= _BRIEF_INPUTS):
        loaded.fragments["images"] += fragments
        images += count
        rejects.append(rejected)
    loaded.rejects = pa.concat_tables(rejects)
    for path in ordinal_paths:
        filesystem, inside = resolve(path)
        filesystem.delete_file(inside)
    rejected = sum(result.counts["rejected"] for result in results)
    told = loaded.rejects.num_rows - (pc.sum(pc.equal(loaded.rejects.column("input"), "row")).as_py() or 0)
    if (loaded.texts + loaded.images, images, told) != (inputs, loaded.images, rejected):
        raise RunError(
            f"{inputs} inputs were embedded or reused and {rejected} rejected, but {loaded.texts} texts and "
            f"{loaded.images} images reached the products, {images} the images table and {told} the rejects; nothing "
            "was committed. Please report this fault"
        )
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


def commit(
    db: Database,
    loaded: Loaded,
    how: Reduction,
    *,
    is_whole: bool,
    partitions: Sequence[str],
    run_id: str,
    check: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """One commit a table, one after another.

    Args:
        db: the database.
        loaded: what was written.
        how: dimension and carried columns.
        is_whole: whether the fragments become the whole tables; else they take the place of their products' rows.
        partitions: whose rejects the new ones replace.
        run_id: kept with the transactions.
        check: called before each commit; what it raises ends the row of them.

    Returns:
        The rows that each table has to have now.
    """
    schemas = {
        "products": products_schema(how.dim, how.carried),
        "images": images_schema(how.dim),
        "rejects": rejects_schema(),
    }
    ids = pa.concat_arrays(loaded.ids) if loaded.ids else pa.array([], pa.string())
    rows: dict[str, int] = {}
    for table in TABLES:
        check()
        if is_whole:
            rows[table] = replace_all(db, table, schemas[table], loaded.fragments[table], run_id=run_id)
            continue
        keys = {"product_id": ids}
        if table == "rejects":
            keys["partition"] = pa.array(partitions, pa.string())
        rows[table] = replace_rows(db, table, keys, loaded.fragments[table], run_id=run_id)
    return rows | ({"products": loaded.products, "images": loaded.images} if is_whole else {})


def _reduce_bucket(
    db: Database, sources: Sequence[Staged], how: Reduction, is_whole: bool, bucket: int, buckets: int, path: str
) -> _Bucket:
    """The task of one bucket."""
    reduced = reduce_products(read_bucket(sources, how.carried, bucket, buckets), how)
    products = reduced.products
    fragments = write_rows(db, "products", products_schema(how.dim, how.carried), products, is_whole=is_whole)
    ordinals_path = None
    if reduced.ordinals is not None:
        ordinals_path = f"{path}.ordinals.parquet"
        write_table(ordinals_path, reduced.ordinals)
    return _Bucket(
        fragments,
        reduced.ids,
        products.num_rows,
        pc.sum(products.column("has_text")).as_py() or 0,
        pc.sum(products.column("n_images")).as_py() or 0,
        content_digest(products),
        reduced.empty,
        ordinals_path,
    )


def _write_images(
    db: Database, sources: Sequence[Staged], how: Reduction, is_whole: bool, ordinal_paths: Sequence[str], run_id: str
) -> tuple[list[str], int, pa.Table]:
    """The task of some staged files: their images as fragments, and their rejects."""
    places = [_ordinals_of(source, ordinal_paths) if not how.has_ordinals else None for source in sources]
    count = 0
    unreadable: list[RunError] = []

    def batches() -> Any:
        nonlocal count
        try:
            for source, ordinals in zip(sources, places, strict=True):
                for batch in image_rows(source, how.dim, ordinals):
                    count += batch.num_rows
                    yield batch
        except RunError as error:
            unreadable.append(error)
            raise

    try:
        fragments = write_rows(db, "images", images_schema(how.dim), batches(), is_whole=is_whole)
    except (OSError, RuntimeError) as error:  # Lance wraps what its source raises into words of its own
        raise (unreadable[0] if unreadable else error) from None
    rejects = [reject_rows(source, ordinals, run_id) for source, ordinals in zip(sources, places, strict=True)]
    return fragments, count, pa.concat_tables(rejects)


def _ordinals_of(source: Staged, paths: Sequence[str]) -> dict[int, int]:
    """Row to ordinal, for the images of one partition."""
    result: dict[int, int] = {}
    for path in paths:
        filesystem, inside = resolve(path)
        with open_file(filesystem, inside) as file:
            table = pq.read_table(file, filters=[("partition", "=", source.partition)])
        result |= zip(table.column("row").to_pylist(), table.column("ordinal").to_pylist(), strict=True)
    return result


def _groups(sources: Sequence[Staged], results: Sequence[PartitionResult]) -> list[list[Staged]]:
    """Staged files in groups of about as many images as a fragment should hold."""
    images = {result.name: result.counts["images"] for result in results}
    groups: list[list[Staged]] = [[]]
    size = 0
    for source in sources:
        if size and size + images[source.partition] > _IMAGES_PER_TASK:
            groups.append([])
            size = 0
        groups[-1].append(source)
        size += images[source.partition]
    return [group for group in groups if group]
