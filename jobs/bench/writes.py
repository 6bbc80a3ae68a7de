"""The write path: products with three vectors into LanceDB, beside pyarrow's Parquet and LanceDB's own calls."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bench.timing import Row, in_turns

_MODES = ("text", "image", "avg")
_BATCH = 10_000
_MERGED_ROWS = 20_000  # as many as LanceDB's merge_insert takes with its default memory


def writes(folder: Path, *, rows: int, dim: int) -> Iterator[Row]:
    """Rows a second, indices aside.

    Args:
        folder: for the files; what was written is removed.
        rows: how many products.
        dim: D of each vector.
    """
    from pipeline.store.commits import replace_all
    from pipeline.store.schemas import products_schema
    from pipeline.store.tables import Database, write_rows

    table = drawn(rows, dim)
    schema = products_schema(dim)

    def ours() -> None:
        shutil.rmtree(folder / "db", ignore_errors=True)
        db = Database(str(folder / "db"))
        fragments = write_rows(db, "products", schema, iter(table.to_batches(_BATCH)), is_whole=True)
        replace_all(db, "products", schema, fragments, run_id="measured")

    def parquet() -> None:
        pq.write_table(table, folder / "products.parquet", use_dictionary=False, compression="none")

    def lancedb_add() -> None:
        import lancedb

        shutil.rmtree(folder / "added", ignore_errors=True)
        empty = lancedb.connect(str(folder / "added")).create_table("products", schema=table.schema)
        empty.add(table)

    def lancedb_merge() -> None:
        import lancedb

        shutil.rmtree(folder / "merged", ignore_errors=True)
        empty = lancedb.connect(str(folder / "merged")).create_table("products", schema=table.schema)
        merge = empty.merge_insert("product_id").when_matched_update_all().when_not_matched_insert_all()
        merge.execute(table.slice(0, _MERGED_ROWS))

    calls = {"ours": ours, "pyarrow Parquet": parquet, "lancedb add": lancedb_add}
    timed = in_turns(calls, warm=False)
    what = f"write {rows:,} x 3 x {dim}"
    yield timed.row("write", "ours", rows, "products/s", beside="pyarrow Parquet", aim=0.8, what=what)
    yield timed.row("write", "ours", rows, "products/s", beside="lancedb add", what=what)
    for name in ("pyarrow Parquet", "lancedb add"):
        yield timed.row("write", name, rows, "products/s")
    merged = min(rows, _MERGED_ROWS)
    yield in_turns({"lancedb merge_insert": lancedb_merge}, warm=False).row(
        "write", "lancedb merge_insert", merged, "products/s", what=f"lancedb merge_insert, {merged:,} rows"
    )
    for name in ("db", "added", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "products.parquet").unlink()


def drawn(rows: int, dim: int) -> pa.Table:
    """Products with drawn unit vectors and short texts, in the schema of the table."""
    from pipeline.store.schemas import products_schema

    rng = np.random.default_rng(0)
    schema = products_schema(dim)
    columns: dict[str, pa.Array] = {
        "product_id": pa.array([f"p{row:09d}" for row in range(rows)]),
        "title": pa.array([f"thing number {row}" for row in range(rows)]),
        "n_images": pa.array(np.ones(rows, np.int32)),
        "has_text": pa.array(np.ones(rows, bool)),
    }
    for mode in _MODES:
        vectors = rng.standard_normal((rows, dim), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        columns[f"{mode}_vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)
    return pa.table([columns.get(field.name, pa.nulls(rows, field.type)) for field in schema], schema=schema)
