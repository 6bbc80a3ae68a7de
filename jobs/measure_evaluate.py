"""What an evaluation costs, and what the demo catalog says by several seeds: `python -m jobs.measure_evaluate --db DB`.

The exact search of 1,000 queries in three modes over 200,000 products, read from the table block by block, takes turns
with the bare matrix products of numpy and their top 100 over vectors that are in memory already. Each runs in processes
of its own, so that peak memory is its own. With --db both experiments run on that database by several seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.cli import JobParser, add_log_level, count, positive, run_and_tell
from jobs.measure_query import describe, drawn
from pipeline.evaluate.summary import SIGNIFICANCE

_MODES = ("text", "image", "avg")
_K = 100
_ROWS = 10_000
_TURNS = 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(prog="python -m jobs.measure_evaluate", description=__doc__)
    result.add_argument("--products", type=positive, default=200_000, metavar="N", help="in the table")
    result.add_argument("--queries", type=positive, default=1000, metavar="N", help="asked at once, and of each seed")
    result.add_argument("--out", type=Path, default=Path(".demo/evaluate"), metavar="DIR", help="made anew")
    result.add_argument("--seed", type=count, default=0, help="of the drawn vectors")
    result.add_argument("--db", help="a database for both experiments; without it only the speed is measured")
    result.add_argument("--seeds", type=positive, default=5, metavar="N", help="how many draws of queries")
    result.add_argument("--recipe", default="article", help="of the queries; see jobs.evaluate")
    result.add_argument("--part", choices=("ours", "bare"), help=argparse.SUPPRESS)
    result.add_argument("--json", action="store_true", help="print one JSON object")
    add_log_level(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.part is not None:
        print(json.dumps(_ours(arguments.out) if arguments.part == "ours" else _bare(arguments.out)))
        return 0

    def job() -> Mapping[str, Any]:
        told = _speed(arguments.out, products=arguments.products, queries=arguments.queries, seed=arguments.seed)
        if arguments.db:
            told |= _seeds(arguments.db, seeds=arguments.seeds, queries=arguments.queries, recipe=arguments.recipe)
        return told

    return run_and_tell(arguments, job, describe)


def _speed(out: Path, *, products: int, queries: int, seed: int) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    _write(out, products, queries, seed)
    runs: dict[str, list[dict[str, float]]] = {"bare": [], "ours": []}
    for _ in range(_TURNS):
        for part, found in runs.items():
            command = [sys.executable, "-m", "jobs.measure_evaluate", "--out", str(out), "--part", part]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    middle = {
        (part, name): statistics.median(run[name] for run in found) for part, found in runs.items() for name in found[0]
    }
    ours, bare = middle["ours", "seconds"], middle["bare", "seconds"]
    each = {part: " ".join(f"{run['seconds']:.1f}" for run in found) for part, found in runs.items()}
    return {
        f"{queries:,} queries x 3 modes over {products:,}, table read": f"{ours:.2f} s ({each['ours']})",
        "of that reading": f"{middle['ours', 'reading']:.2f} s",
        "bare numpy, vectors in memory": f"{bare:.2f} s ({each['bare']})",
        "ratio": f"{ours / bare:.2f}; reading aside {(ours - middle['ours', 'reading']) / bare:.2f}",
        "peak memory": f"{middle['ours', 'peak']:.2f} GB, bare {middle['bare', 'peak']:.2f} GB",
        "hits that agree": f"{_agreement(out):.5f}",
    }


def _write(out: Path, products: int, queries: int, seed: int) -> None:
    """The table, through the project's own store, and the queries."""
    from pipeline.store.commits import replace_all
    from pipeline.store.schemas import products_schema
    from pipeline.store.tables import Database, write_rows

    columns, asked = drawn(products, queries, seed)
    out.mkdir(parents=True)
    np.save(out / "asked.npy", asked)
    schema, db = products_schema(asked.shape[1], []), Database(str(out / "db"))

    def batches() -> Iterator[pa.RecordBatch]:
        for at in range(0, products, _ROWS):
            count = min(_ROWS, products - at)
            known: dict[str, pa.Array] = {
                f"{mode}_vector": pa.FixedSizeListArray.from_arrays(
                    pa.array(columns[mode][at : at + count].ravel()), asked.shape[1]
                )
                for mode in _MODES
            }
            known["product_id"] = pa.array([f"p{row:09d}" for row in range(at, at + count)])
            known |= {"n_images": pa.array([1] * count, pa.int32()), "has_text": pa.array([True] * count)}
            arrays = [known.get(field.name, pa.nulls(count, field.type)) for field in schema]
            yield pa.record_batch(arrays, schema=schema)

    replace_all(db, "products", schema, write_rows(db, "products", schema, batches(), is_whole=True), run_id="measured")


def _ours(out: Path) -> dict[str, float]:
    """One exact search as an evaluation does it."""
    from pipeline.evaluate.exact import exact_search
    from pipeline.evaluate.products import Block, read_blocks, read_products
    from pipeline.store.tables import Database

    db, asked = Database(str(out / "db")), np.load(out / "asked.npy")
    version = db.latest_version("products")
    products = read_products(db, version)
    reading = 0.0

    def blocks() -> Iterator[Block]:
        nonlocal reading
        source = read_blocks(db, version, products, _MODES)
        while True:
            begun = time.perf_counter()
            block = next(source, None)
            reading += time.perf_counter() - begun
            if block is None:
                return
            yield block

    begun = time.perf_counter()
    found = exact_search(blocks(), asked, modes=_MODES, k=_K)
    seconds = time.perf_counter() - begun
    np.savez(out / "ours.npz", **{mode: ranking.places for mode, ranking in found.items()})  # type: ignore[arg-type]
    return {"seconds": seconds, "reading": reading, "peak": _peak_gb()}


def _bare(out: Path) -> dict[str, float]:
    """What one would write by hand: a matrix product for each mode, the top 100 of its rows, and their order."""
    from pipeline.store.tables import Database

    asked, found, seconds = np.load(out / "asked.npy"), {}, 0.0
    dataset = Database(str(out / "db")).dataset("products")
    for mode in _MODES:
        column = dataset.to_table(columns=[f"{mode}_vector"]).column(0).combine_chunks()
        vectors = column.flatten().to_numpy().reshape(len(column), -1)
        begun = time.perf_counter()
        scores = asked @ vectors.T
        best = np.argpartition(scores, -_K, axis=1)[:, -_K:]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
        found[mode] = np.take_along_axis(best, order, axis=1)
        seconds += time.perf_counter() - begun
    np.savez(out / "bare.npz", **found)  # type: ignore[arg-type]
    return {"seconds": seconds, "reading": 0.0, "peak": _peak_gb()}


def _peak_gb() -> float:
    """Of this process alone: what getrusage tells begins with the size of the one that started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6


def _agreement(out: Path) -> float:
    """Share of places in which both lists name the same product; the rest are ties."""
    ours, bare = np.load(out / "ours.npz"), np.load(out / "bare.npz")
    return float(np.mean([(ours[mode] == bare[mode]).mean() for mode in _MODES]))


def _seeds(db: str, *, seeds: int, queries: int, recipe: str) -> dict[str, Any]:
    """Both experiments by several draws of queries."""
    from pipeline.evaluate.answers import Settings
    from pipeline.evaluate.evaluation import evaluate
    from pipeline.evaluate.results import Evaluation
    from pipeline.query import Searcher

    searcher = Searcher.open(db)
    found: list[Evaluation] = [
        evaluate(searcher, Settings(recipe=recipe, queries=queries, seed=seed))[0] for seed in range(seeds)
    ]
    told: dict[str, Any] = {"": "", f"{seeds} seeds": f"{queries:,} queries each, recipe {recipe}, {db}"}
    for level in found[0].levels:
        for k in (10, 20, 50, 100):
            values = {
                mode: statistics.mean(e.figure(level, mode, "precision", k).micro.mean for e in found)
                for mode in _MODES
            }
            told[f"{level} precision@{k}"] = ", ".join(f"{mode} {value:.4f}" for mode, value in values.items())
            for other in ("text", "image"):
                told[f"  {level} @{k}: avg less {other}"] = _compared(found, level, k, other)
        told[f"{level}: kept of the 50's precision, k-means 5"] = _across(
            [next(d for d in e.diversity if d.method == "kmeans-5").kept[level] for e in found]
        )
    for name in ("near_duplicates_5", "near_duplicates_10", "distance"):
        for method in ("text", "kmeans-5"):
            told[f"{name}, {method}"] = _across(
                [getattr(next(d for d in e.diversity if d.method == method), name) for e in found]
            )
    return told


def _compared(found: Sequence[Any], level: str, k: int, other: str) -> str:
    rows = [
        next(c for c in e.comparisons if (c.level, c.k, c.first, c.second) == (level, k, "avg", other)) for e in found
    ]
    wins = sum(row.difference.mean > 0 and row.p_holm <= SIGNIFICANCE for row in rows)
    losses = sum(row.difference.mean < 0 and row.p_holm <= SIGNIFICANCE for row in rows)
    return f"{_across([row.difference for row in rows])}; wins {wins}, loses {losses} of {len(rows)}"


def _across(intervals: Sequence[Any]) -> str:
    """The mean of the seeds, and the widest of their intervals' bounds."""
    mean = statistics.mean(interval.mean for interval in intervals)
    return f"{mean:.4f} ({min(i.low for i in intervals):.4f} to {max(i.high for i in intervals):.4f})"


if __name__ == "__main__":
    raise SystemExit(main())
