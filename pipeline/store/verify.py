"""What stands before a release: the tables are read as a reader will, and everything that is wrong is told at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.errors import ReleaseRefused
from pipeline.store.content import Faults, Hashes, names_of, scan_images, scan_products
from pipeline.store.files import damaged_files
from pipeline.store.indices import MIN_RECALL, MODES, SCALAR_INDICES, index_statistics
from pipeline.store.releases import Release
from pipeline.store.schemas import (
    TABLES,
    catalog_rows_schema,
    images_schema,
    partitions_schema,
    products_schema,
    rejects_schema,
)
from pipeline.store.tables import Database


def verify(
    db: Database,
    index: Mapping[str, Mapping[str, Any]],
    *,
    versions: Mapping[str, int] | None = None,
    expected_rows: Mapping[str, int] | None = None,
    min_recall: float = MIN_RECALL,
    verified: Release | None = None,
) -> dict[str, Any]:
    """Check rows, vectors, indices and files of the tables, in batches of a few thousand rows.

    Keys and counts are compared over all rows. Vectors and metadata are read of all rows, or of those that came since a
    release that was verified: its files do not change, and that they are whole is seen by their sizes.

    Args:
        db: the database.
        index: how each mode is searched, from `build_indices` or `measure_indices`.
        versions: of the tables; the latest ones if not given.
        expected_rows: rows that each table has to have, where it is known.
        min_recall: the floor of each index's recall@10.
        verified: the release that the tables were changed from, if it was verified; None: all is read.

    Returns:
        The figures for the release row: rows, distinct keys, texts, vectors, files checked, the `content` digest.

    Raises:
        ReleaseRefused: names everything that is wrong, with figures and a few examples.
    """
    versions = versions or {table: db.latest_version(table) for table in TABLES}
    wrong = [f"{table}: {fault}" for table, n in versions.items() for fault in damaged_files(db, table, n)]
    wrong = wrong or _columns(db, versions)
    if wrong:
        raise _refused(wrong)
    datasets = {table: db.dataset(table, version) for table, version in versions.items()}
    rows = {table: int(dataset.count_rows()) for table, dataset in datasets.items()}
    for table, count in (expected_rows or {}).items():
        if rows[table] != count:
            wrong.append(f"{table} has {rows[table]:,} rows, expected {count:,}")
    figures, faults = _rows(
        datasets, {t: verified and db.dataset(t, verified.versions[t]) for t in ("products", "images")}, verified
    )
    wrong += faults
    for mode, fields in index.items():
        wrong += _vector_index(datasets["products"], mode, fields, figures["vectors"][MODES[mode]], min_recall)
    for table, dataset in datasets.items():
        wrong += _coverage(dataset, table)
    if wrong:
        raise _refused(wrong)
    return {**rows, **figures, "recall_at_10": {mode: fields["recall_at_10"] for mode, fields in index.items()}}


def _rows(
    datasets: Mapping[str, Any], before: Mapping[str, Any], verified: Release | None
) -> tuple[dict[str, Any], list[str]]:
    """Keys, nulls, vectors and counts of the rows: figures, and what is wrong."""
    faults = Faults()
    known = int(verified.checks["content"], 16) if verified and "content" in verified.checks else None
    products = scan_products(
        datasets["products"], faults, before["products"] if known is not None else None, known or 0
    )
    image_ids, owners = scan_images(datasets["images"], faults, before["images"])
    wrong = faults.sentences()
    ids, first, copies = np.unique(products.ids, return_index=True, return_counts=True)
    wrong += _told("rows of products share their product_id", ids[copies > 1], datasets["products"], "product_id")
    distinct_images, image_copies = np.unique(image_ids, return_counts=True)
    repeated = distinct_images[image_copies > 1]
    wrong += _told("rows of images share their image_id", repeated, datasets["images"], "image_id")
    owning, counts = np.unique(owners, return_counts=True)
    has_product = np.isin(owning, ids)
    wrong += _told("products of images are not in products", owning[~has_product], datasets["images"], "product_id")
    found = np.zeros(len(ids), np.int64)
    found[np.searchsorted(ids, owning[has_product])] = counts[has_product]
    miscounted = ids[found != products.n_images[first]]
    wrong += _told("products have another n_images than rows in images", miscounted, datasets["products"], "product_id")
    figures = {
        "distinct_product_ids": len(ids),
        "distinct_image_ids": len(distinct_images),
        "images_of_products": int(products.n_images.sum()),
        "images_without_product": int(counts[~has_product].sum()),
        "texts": products.texts,
        "vectors": products.vectors,
        "content": f"{products.content:032x}",
    }
    return figures, wrong


def _told(what: str, hashes: Hashes, dataset: Any, column: str) -> list[str]:
    return [f"{len(hashes):,} {what} ({', '.join(names_of(dataset, column, hashes))})"] if len(hashes) else []


def _columns(db: Database, versions: Mapping[str, int]) -> list[str]:
    """Columns that are missing, of another type, or null where they may not be."""
    wrong: list[str] = []
    products = db.dataset("products", versions["products"]).schema
    try:
        dim = products.field("avg_vector").type.list_size
    except (KeyError, AttributeError):
        return ["products has no column avg_vector of vectors"]
    schemas = (products_schema(dim), images_schema(dim), rejects_schema(), partitions_schema(), catalog_rows_schema())
    for table, schema in zip(TABLES, schemas, strict=True):
        if table not in versions:  # a release of schema version 1, gone back to
            continue
        dataset = db.dataset(table, versions[table])
        for field in schema:
            found = dataset.schema.field(field.name).type if field.name in dataset.schema.names else None
            if found != field.type:
                wrong.append(f"{table}.{field.name} is {found or 'missing'}, expected {field.type}")
            elif not field.nullable and (nulls := dataset.count_rows(filter=f"`{field.name}` IS NULL")):
                wrong.append(f"{table}.{field.name} is null in {nulls:,} rows")
    return wrong


def _vector_index(dataset: Any, mode: str, fields: Mapping[str, Any], vectors: int, min_recall: float) -> list[str]:
    """Whether a mode's index is there, as it was asked for, and finds what it should."""
    name = f"{MODES[mode]}_idx"
    wrong: list[str] = []
    if fields["rows"] != vectors:
        wrong.append(f"the {mode} index was made for {fields['rows']:,} vectors, the table has {vectors:,}")
    is_there = any(index.name == name for index in dataset.describe_indices())
    if fields["kind"] == "exact":
        if is_there:
            wrong.append(f"there is an index {name}, though {mode} is to be searched exactly")
        return wrong
    if not is_there:
        return [*wrong, f"the index {name} is missing"]
    partitions = [part["num_partitions"] for part in index_statistics(dataset, name)["indices"]]
    if set(partitions) != {fields["partitions"]}:
        wrong.append(f"the index {name} has {partitions} partitions, asked for were {fields['partitions']}")
    if not fields["recall_at_10"] >= min_recall:
        wrong.append(
            f"the {mode} index reaches recall@10 {fields['recall_at_10']:.3f} with {fields['probes']} probes and "
            f"refine {fields['refine']}, under release.min_recall {min_recall}"
        )
    return wrong


def _coverage(dataset: Any, table: str) -> list[str]:
    """Whether every index holds every row, and those that later runs need are there."""
    columns = {index.name: index.field_names for index in dataset.describe_indices()}
    wrong = []
    for name in columns:
        missing = index_statistics(dataset, name)["num_unindexed_rows"]
        if missing:
            wrong.append(f"the index {name} of {table} lacks {missing:,} rows")
    for column in SCALAR_INDICES.get(table, ()):
        if [column] not in columns.values():
            wrong.append(f"{table}.{column} has no index")
    return wrong


def _refused(wrong: list[str]) -> ReleaseRefused:
    return ReleaseRefused(f"the tables do not pass verification, nothing is released: {'; '.join(wrong)}")
