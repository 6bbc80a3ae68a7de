"""What a plan over many rows costs: `python -m jobs.measure_plan --rows 1000000 5000000`.

For each size a process of its own compares as many (id, hash) rows of a catalog with those of a release, of which 1%
differ, and joins the hashes of the changed ones with all released ones. Told are seconds, microseconds a row, and the
process's peak memory. The rows lie in files as a scan and a release leave them; reading them is part of the time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.cli import JobParser, add_log_level, positive, run_and_tell, run_job, start_log

_PART_ROWS = 250_000
_CHANGED = 100  # one row in as many


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(prog="python -m jobs.measure_plan", description=__doc__)
    result.add_argument("--rows", type=positive, nargs="+", default=[1_000_000, 5_000_000], metavar="N", help="sizes")
    result.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    result.add_argument("--json", action="store_true", help="print one JSON object")
    add_log_level(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.child:
        start_log(arguments.log_level)
        return run_job(lambda: _measured(arguments.rows[0]), as_json=True)
    return run_and_tell(arguments, lambda: {str(rows): _in_process(rows) for rows in arguments.rows}, describe)


def describe(told: Mapping[str, Any]) -> str:
    """What was measured, a line for each size."""
    return "\n".join(
        f"{int(rows):>11,} rows  " + "  ".join(f"{name} {value}" for name, value in found.items())
        for rows, found in told.items()
    )


def _measured(rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder), rows)


def _in_process(rows: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.measure_plan", "--child", "--rows", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(folder: Path, rows: int) -> dict[str, Any]:
    """Write both sides, plan, and tell what it cost."""
    from pipeline.catalog.partitions import open_catalog
    from pipeline.config import CatalogConfig, ColumnsConfig
    from pipeline.run.changes import plan_changes
    from pipeline.run.wanted import plan_inputs
    from pipeline.store.releases import Release, now
    from pipeline.store.schemas import TABLES
    from pipeline.store.tables import Database

    parts = -(-rows // _PART_ROWS)
    sizes = [min(_PART_ROWS, rows - at * _PART_ROWS) for at in range(parts)]
    (folder / "catalog").mkdir()
    scanned: dict[str, str] = {}
    for number, size in enumerate(sizes):
        path = folder / "catalog" / f"part-{number:05d}.parquet"
        ids = [f"product-{number * _PART_ROWS + row:010d}" for row in range(size)]
        pq.write_table(pa.table({"product_id": ids, "title": ids}), path)
        scanned[str(path)] = str(folder / f"{number}.scanned.parquet")
        pq.write_table(_scanned(number, size), scanned[str(path)])
    db = Database(str(folder / "db"))
    _write_release(db, folder, sizes)
    release = Release(1, None, now(), dict.fromkeys(TABLES, 1), "m", "m", "f", 0.5, {}, {}, {"products": rows})
    catalog = open_catalog(str(folder / "catalog"), CatalogConfig(), ColumnsConfig())
    begun = time.perf_counter()
    changes = plan_changes(db, release, catalog, lambda _: scanned, settings="s", is_truth=True)
    wanted = plan_inputs(db, release, catalog, changes, folder=str(folder))
    seconds = time.perf_counter() - begun
    return {
        "seconds": round(seconds, 2),
        "us_per_row": round(seconds / rows * 1e6, 3),
        "changed": changes.averaged,
        "to_embed": wanted.texts,
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def _hashes(number: int, size: int, *, is_new: bool) -> Iterator[bytes]:
    """A sha256 of each row; of one in a hundred another one in the catalog than in the release."""
    for row in range(size):
        changed = is_new and row % _CHANGED == 0
        yield hashlib.sha256(f"{number} {row} {changed}".encode()).digest()


def _digests(number: int, size: int, *, is_new: bool) -> pa.Array:
    return pa.array([digest[:16] for digest in _hashes(number, size, is_new=is_new)], pa.binary(16))


def _texts(number: int, size: int, *, is_new: bool) -> pa.Array:
    return pa.array([digest.hex() for digest in _hashes(number, size, is_new=is_new)], pa.string())


def _ids(number: int, size: int) -> pa.Array:
    return pa.array([f"product-{number * _PART_ROWS + row:010d}" for row in range(size)])


def _scanned(number: int, size: int) -> pa.Table:
    from pipeline.run.scan import scanned_schema

    schema = scanned_schema(())
    made: dict[str, Any] = {
        "product_id": _ids(number, size),
        "row": np.arange(size),
        "digest": _digests(number, size, is_new=True),
        "text_sha256": _texts(number, size, is_new=True),
        "is_blank": np.zeros(size, bool),
        "images": pa.array([[]] * size, schema.field("images").type),
    }
    nulls = {name: pa.nulls(size, schema.field(name).type) for name in schema.names if name not in made}
    return pa.table(made | nulls).select(schema.names).cast(schema)


def _write_release(db: Any, folder: Path, sizes: Sequence[int]) -> None:
    """The tables that a plan reads, as a release leaves them; products without vectors."""
    from pipeline.store.commits import replace_all
    from pipeline.store.schemas import (
        catalog_rows_schema,
        images_schema,
        partitions_schema,
        products_schema,
        rejects_schema,
    )
    from pipeline.store.tables import write_rows

    def write(table: str, schema: pa.Schema, made: Iterator[Mapping[str, Any]]) -> None:
        def batches() -> Iterator[pa.RecordBatch]:
            for columns in made:
                size = len(next(iter(columns.values())))
                filled = dict(columns)
                for field in schema:
                    if field.name not in filled:
                        filled[field.name] = pa.nulls(size, field.type)
                yield from pa.table(filled).select(schema.names).cast(schema).to_batches(max_chunksize=65_536)

        replace_all(db, table, schema, write_rows(db, table, schema, batches(), is_whole=True), run_id="r")

    name = [str(folder / "catalog" / f"part-{number:05d}.parquet") for number in range(len(sizes))]
    write("catalog_rows", catalog_rows_schema(), (
        {"product_id": _ids(n, s), "partition": pa.array([name[n]] * s), "row": np.arange(s),
         "digest": _digests(n, s, is_new=False)} for n, s in enumerate(sizes)
    ))  # fmt: skip
    write("products", products_schema(2), (
        {"product_id": _ids(n, s), "n_images": np.zeros(s, np.int32), "has_text": np.ones(s, bool),
         "text_sha256": _texts(n, s, is_new=False)} for n, s in enumerate(sizes)
    ))  # fmt: skip
    counts = {c: np.array(sizes) for c in ("rows", "products", "texts")}
    zeros = {c: np.zeros(len(sizes), np.int64) for c in ("images", "rejected", "rejected_rows")}
    texts = {c: pa.array([c] * len(sizes)) for c in ("digest", "settings", "run_id")}
    write("partitions", partitions_schema(), iter([{"partition": pa.array(name), **texts, **counts, **zeros}]))
    for table, schema in (("images", images_schema(2)), ("rejects", rejects_schema())):
        replace_all(db, table, schema, [], run_id="r")


if __name__ == "__main__":
    raise SystemExit(main())
