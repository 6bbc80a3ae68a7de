"""What a re-index costs beside the backfill: `python -m jobs.measure_reindex --products 200000 --out DIR`.

A demo catalog in which photos are shared between products is backfilled with the demo model, then re-indexed without a
change, and after one: 1% of texts edited, 0.5% of images replaced, 0.5% of products added, 0.5% removed, 2% of prices
changed. The last state is backfilled from nothing too, and the tables are compared. Ratios are of wall time of one run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.cli import JobParser, add_log_level, positive, run_and_tell

_PHOTO_PRODUCTS = 2000  # whose photos all products share
_FILE_PRODUCTS = 10_000
_MOST_IMAGES = 2
_COMPARED_ROWS = 20_000  # at once: thumbnails of all together are too much for one Arrow array
_SETTINGS = ('columns.carried=["price"]', "max_reject_share=0.05")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(prog="python -m jobs.measure_reindex", description=__doc__)
    result.add_argument("--products", type=positive, default=200_000, metavar="N", help="in the catalog")
    result.add_argument("--out", type=Path, default=Path(".demo/reindex"), metavar="DIR", help="made anew")
    result.add_argument("--seed", type=int, default=0, help="of the catalog and its changes")
    result.add_argument("--json", action="store_true", help="print one JSON object")
    add_log_level(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)

    def job() -> Mapping[str, Any]:
        return measure(arguments.out, products=arguments.products, seed=arguments.seed)

    return run_and_tell(arguments, job, describe)


def describe(told: Mapping[str, Any]) -> str:
    """What was measured, a line each."""
    return "\n".join(f"{name:<34}{value}" for name, value in told.items())


def measure(out: Path, *, products: int, seed: int) -> dict[str, Any]:
    """Run all of it; times in seconds, counts, and whether the tables came out equal."""
    from pipeline.config import load_config
    from pipeline.run.backfill import backfill, reindex
    from pipeline.run.plan import Order
    from pipeline.run.preview import preview

    shutil.rmtree(out, ignore_errors=True)
    catalog, db, whole = out / "catalog", out / "db", out / "whole"
    tables = _catalog(out / "photos", products, seed)
    _write(catalog, tables)
    config = load_config(None, _SETTINGS, catalog_uri=str(catalog), db=str(db), model_name="demo")

    def timed(run: Any) -> tuple[dict[str, Any], float]:
        begun = time.perf_counter()
        return run(), time.perf_counter() - begun

    first, first_s = timed(lambda: backfill(config))
    same, same_s = timed(lambda: reindex(config))
    expected = _change(tables, seed)
    _write(catalog, tables)
    plan, plan_s = timed(lambda: preview(config, Order("reindex", is_truth=True, is_shown=True)))
    changed, changed_s = timed(lambda: reindex(config))
    fresh = load_config(None, _SETTINGS, catalog_uri=str(catalog), db=str(whole), model_name="demo")
    last, last_s = timed(lambda: backfill(fresh))
    return {
        "products": first["products"],
        "inputs": first["inputs"],
        "embedded by the backfill": first["embedded"],
        "backfill_s": round(first_s, 1),
        "no change_s": round(same_s, 2),
        "no change / backfill": round(same_s / first_s, 4),
        "no change: released, actors": [same["released"], len(same["actors"])],
        "dry run_s": round(plan_s, 1),
        "reindex_s": round(changed_s, 1),
        "reindex / backfill": round(changed_s / first_s, 4),
        "stages of the reindex": changed["run_seconds"],
        "embedded, planned, counted": [changed["embedded"], plan["inputs"]["to_embed"], expected],
        "deleted": changed["deleted"],
        "backfill from nothing_s": round(last_s, 1),
        "products, inputs equal": [changed[n] == last[n] for n in ("products", "inputs", "rejected")],
        "tables equal": _are_equal(db, whole),
    }


def _catalog(folder: Path, products: int, seed: int) -> list[list[dict[str, Any]]]:
    """Rows of products by file: texts of their own, photos of a pool, nothing bad."""
    from pipeline.catalog.demo import write_demo_catalog

    count = min(_PHOTO_PRODUCTS, products)
    write_demo_catalog(folder, products=count, seed=seed, has_flaws=False, workers=os.cpu_count() or 1)
    drawn = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(products):
        row = dict(drawn[int(rng.integers(len(drawn)))])
        row |= {"product_id": f"p{number:08d}", "description": f"{row['description']} No. {number}."}
        row["images"] = row["images"][:_MOST_IMAGES]
        rows.append(row)
    return [rows[at : at + _FILE_PRODUCTS] for at in range(0, products, _FILE_PRODUCTS)]


def _write(folder: Path, tables: Sequence[Sequence[dict[str, Any]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(tables):
        pq.write_table(pa.Table.from_pylist(list(rows)), folder / f"part-{number:05d}.parquet", row_group_size=2000)


def _change(tables: list[list[dict[str, Any]]], seed: int) -> int:
    """Edit, replace, add, remove and price anew, in place; returns how many inputs are new, counted apart."""
    from pipeline.catalog.demo import demo_photo

    rng = np.random.default_rng(seed + 1)
    places = [(file, row) for file, rows in enumerate(tables) for row in range(len(rows))]
    total = len(places)
    shares = {"text": 0.01, "image": 0.005, "remove": 0.005, "price": 0.02, "add": 0.005}
    sizes = {what: max(1, round(share * total)) for what, share in shares.items()}
    chosen = iter([places[i] for i in rng.permutation(total)])
    photos = iter(demo_photo(seed + 7, i, 0) for i in range(sizes["image"] + sizes["add"]))
    new: set[bytes | str] = set()
    for _ in range(sizes["text"]):
        file, at = next(chosen)
        tables[file][at]["title"] = f"Edited {at} {tables[file][at]['title']}"
        new.add(f"{tables[file][at]['title']}. {tables[file][at]['description']}")
    for _ in range(sizes["image"]):
        file, at = next(chosen)
        photo = next(photos)
        tables[file][at]["images"] = [photo, *tables[file][at]["images"][1:]]
        new.add(photo)
    for _ in range(sizes["price"]):
        file, at = next(chosen)
        tables[file][at]["price"] = float(rng.integers(1, 500)) + 0.5
    removed = [next(chosen) for _ in range(sizes["remove"])]
    for number in range(sizes["add"]):
        file = int(rng.integers(len(tables)))
        photo, row = next(photos), dict(tables[file][0])
        row |= {"product_id": f"new{number:06d}", "title": f"New {number}", "images": [photo]}
        tables[file].append(row)
        new |= {photo, f"{row['title']}. {row['description']}"}
    for file, at in sorted(removed, reverse=True):
        del tables[file][at]
    return len(new)


def _are_equal(db: Path, other: Path) -> bool:
    """The design's equal tables: `products` without `partition`, `images`, and as many `rejects`."""
    import lance

    for name, key, out in (("products", "product_id", {"partition"}), ("images", "image_id", set[str]())):
        sides = [lance.dataset(f"{path}/{name}.lance") for path in (db, other)]
        orders = [np.argsort(side.to_table(columns=[key])[key].to_numpy()) for side in sides]
        if len(orders[0]) != len(orders[1]):
            return False
        columns = [column for column in sides[0].schema.names if column not in out]
        for at in range(0, len(orders[0]), _COMPARED_ROWS):
            one, two = (
                side.take(order[at : at + _COMPARED_ROWS], columns=columns)
                for side, order in zip(sides, orders, strict=True)
            )
            for column in columns:
                a, b = one[column].combine_chunks(), two[column].combine_chunks()
                if column == "vector" or column.endswith("_vector"):
                    is_equal = a.is_null().equals(b.is_null()) and np.allclose(a.flatten(), b.flatten(), 0, 1e-6)
                else:
                    is_equal = a.equals(b)
                if not is_equal:
                    return False
    rejects = [lance.dataset(f"{path}/rejects.lance").count_rows() for path in (db, other)]
    return bool(rejects[0] == rejects[1])


if __name__ == "__main__":
    raise SystemExit(main())
