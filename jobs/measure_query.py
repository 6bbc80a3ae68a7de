"""What a search costs, beside what it is made of: `python -m jobs.measure_query --products 200000 --out DIR`.

Products, texts and queries share a latent space of overlapping groups; texts and images lie apart from each other, as a
two-tower model puts them, and queries come from the side of the texts: harder than vectors of the table itself. Every
ratio is of calls that took turns in this one run. The text tower is one of the published size with seeded weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs.cli import JobParser, add_log_level, positive, run_and_tell

if TYPE_CHECKING:
    from pipeline.model.image_tower import ImageConfig
    from pipeline.model.text_tower import TextConfig

Vectors = npt.NDArray[np.float32]

_DIM, _LATENT, _GROUPS = 768, 48, 400
_GAP = 1.2
"""Length of what all vectors of a kind have in common, beside about 1 for what tells them apart."""
_RARE = (3, 20, 500)
_BLOCK = 20_000
_FIRST = """
import sys, time
import numpy as np
begun = time.perf_counter()
import lancedb
lance = time.perf_counter() - begun
from pipeline.query import Searcher
Searcher.open({db!r}).search(np.load({vector!r}))
total = time.perf_counter() - begun
heavy = [name for name in ("torch", "ray", "transformers", "sklearn", "PIL", "pandas", "polars") if name in sys.modules]
print(total, lance, ",".join(heavy))
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(prog="python -m jobs.measure_query", description=__doc__)
    result.add_argument("--products", type=positive, default=200_000, metavar="N", help="in the table")
    result.add_argument("--queries", type=positive, default=300, metavar="N", help="for each figure")
    result.add_argument("--out", type=Path, default=Path(".demo/query"), metavar="DIR", help="kept for the next time")
    result.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    result.add_argument("--json", action="store_true", help="print one JSON object")
    add_log_level(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)

    def job() -> Mapping[str, Any]:
        return measure(arguments.out, products=arguments.products, queries=arguments.queries, seed=arguments.seed)

    return run_and_tell(arguments, job, describe)


def describe(told: Mapping[str, Any]) -> str:
    """What was measured, a line each."""
    return "\n".join(f"{name:<52}{value}" for name, value in told.items())


def measure(out: Path, *, products: int, queries: int, seed: int) -> dict[str, Any]:
    """Run all of it; times are medians and 99th percentiles in milliseconds."""
    from pipeline.query import Searcher

    columns, asked = drawn(products, queries, seed)
    db, model = str(out / "db"), out / "model"
    made = {"products": products, "seed": seed}
    if not (out / "made.json").exists() or json.loads((out / "made.json").read_text()) != made:
        shutil.rmtree(out, ignore_errors=True)
        write_model(model, seed)
        write_db(db, columns, model, seed)
        (out / "made.json").write_text(json.dumps(made))
    searcher = Searcher.open(db)
    told: dict[str, Any] = {"products": products, "index": dict(searcher.release.index)}
    told |= _recall(searcher, columns, asked)
    told |= _filters(searcher, columns, asked[:50])
    told |= _against_lancedb(db, searcher, columns["avg"], asked)
    told |= _diversity(searcher, asked)
    told |= _threads(searcher, asked)
    told |= _first_answer(out, db, asked[0])
    told |= _text(searcher)
    return told


def drawn(products: int, queries: int, seed: int) -> tuple[dict[str, Vectors], Vectors]:
    """Unit vectors (products, D) by mode, and queries (queries, D) drawn as texts are."""
    rng = np.random.default_rng(seed)
    into = rng.normal(size=(_LATENT, _DIM)) / np.sqrt(_LATENT * _DIM)
    centres = rng.normal(size=(_GROUPS, _LATENT))
    gaps = {kind: _GAP * _unit(rng.normal(size=_DIM)) for kind in ("text", "image")}

    def side(kind: str, latent: npt.NDArray[Any], noise: float) -> Vectors:
        out = np.empty((len(latent), _DIM), np.float32)
        for at in range(0, len(latent), _BLOCK):
            part = latent[at : at + _BLOCK]
            own = rng.normal(size=(len(part), _DIM)) * noise / np.sqrt(_DIM)
            out[at : at + _BLOCK] = _unit(part @ into * np.sqrt(_LATENT) / np.sqrt(2) + own + gaps[kind])
        return out

    def latents(count: int) -> npt.NDArray[Any]:
        """Members spread about their group's centre as far as the centres lie apart."""
        return np.asarray(centres[rng.integers(_GROUPS, size=count)] + rng.normal(size=(count, _LATENT)))

    latent = latents(products)
    text, image = side("text", latent, 0.3), side("image", latent, 0.5)
    return {"text": text, "image": image, "avg": _unit(text + image)}, side("text", latents(queries), 0.5)


def write_db(db: str, columns: Mapping[str, Vectors], model: Path, seed: int) -> None:
    """A release with all indices, through the project's own store."""
    from pipeline.model import describe_model
    from pipeline.store.commits import replace_all
    from pipeline.store.indices import build_indices
    from pipeline.store.releases import Release, insert_row, now
    from pipeline.store.schemas import images_schema, products_schema, rejects_schema, releases_schema
    from pipeline.store.tables import Database, ensure, write_rows

    count = len(columns["text"])
    rare = np.full(count, "common", object)
    where = np.random.default_rng(seed).permutation(count)
    for number in _RARE:
        rare[where[:number]] = str(number)
        where = where[number:]
    carried = [pa.field("price", pa.float64()), pa.field("rare", pa.string())]
    schema = products_schema(_DIM, carried)

    def batches() -> Iterator[pa.RecordBatch]:
        for at in range(0, count, _BLOCK):
            rows = range(at, min(at + _BLOCK, count))
            plain = {
                "product_id": [_key(i) for i in rows],
                "title": [f"product number {i} in colour {i % 11}" for i in rows],
                "description": [f"a thing of kind {i % 400}, size {i % 13}, made of {i % 29} parts" for i in rows],
                "broad_category": [f"broad {i % 5}" for i in rows],
                "fine_category": [f"fine {i % 31}" for i in rows],
                "price": [float(i % 500) for i in rows],
                "rare": [str(rare[i]) for i in rows],
                "n_images": [1] * len(rows),
                "has_text": [True] * len(rows),
                "text_sha256": [f"{i:064x}" for i in rows],
                "images_sha256": [[f"{i:064x}"] for i in rows],
                "partition": ["part"] * len(rows),
            }
            part = {f"{mode}_vector": vectors[at : at + len(rows)] for mode, vectors in columns.items()}
            arrays = {n: pa.FixedSizeListArray.from_arrays(pa.array(v.ravel()), _DIM) for n, v in part.items()}
            yield from pa.table(plain | arrays, schema=schema).to_batches()

    store, run_id = Database(db), "measure"
    fragments = write_rows(store, "products", schema, batches(), is_whole=True)
    replace_all(store, "products", schema, fragments, run_id=run_id)
    images = images_schema(_DIM)
    pictures = pa.table(
        {
            "image_id": [f"{_key(0)}/0"],
            "product_id": [_key(0)],
            "ordinal": [0],
            "sha256": [f"{0:064x}"],
            "vector": [columns["image"][0].tolist()],
            "width_px": [1],
            "height_px": [1],
            "thumbnail": [None],
        },
        schema=images,
    )
    replace_all(store, "images", images, write_rows(store, "images", images, pictures, is_whole=True), run_id=run_id)
    ensure(store, "rejects", rejects_schema())
    index = build_indices(db, seed=seed)
    release = Release(
        release=1, parent=None, created_at=now(),
        versions={table: store.latest_version(table) for table in ("products", "images", "rejects")},
        model=str(model.absolute()), model_id=describe_model(str(model)).model_id, fingerprint="measure",
        average_text_weight=0.5, index=index, counts={}, checks={},
    )  # fmt: skip
    ensure(store, "releases", releases_schema())
    insert_row(store, release)


def write_model(folder: Path, seed: int, text: TextConfig | None = None, image: ImageConfig | None = None) -> None:
    """A model folder with seeded weights, by default of the published size, and the demo model's tokenizer."""
    import torch
    from tokenizers import Tokenizer

    import pipeline.model
    from jobs.train_demo import Pair, Recipe, write_folder
    from pipeline.model.image_tower import ImageConfig
    from pipeline.model.text_tower import TextConfig

    torch.manual_seed(seed)
    text, image = text or TextConfig(), image or ImageConfig()
    demo = Path(pipeline.model.__file__).parent / "demo"
    pair = Pair(text, image, Recipe.first_scale)
    write_folder(folder, pair, text, image, Tokenizer.from_file(str(demo / "tokenizer.json")))


def _recall(searcher: Any, columns: Mapping[str, Vectors], asked: Vectors) -> dict[str, Any]:
    told = {}
    for mode, vectors in columns.items():
        scores = vectors @ asked.T  # (products, queries)
        for k in (10, 50):
            shares = []
            for query, to_all in zip(asked, scores.T, strict=True):
                last = np.partition(to_all, -k)[-k]
                found = {hit.product_id for hit in searcher.search(query, mode=mode, k=k, columns=["product_id"])}
                # What scores as well as the last of the exact k is as right as that one.
                right = {_key(int(i)) for i in np.flatnonzero(to_all >= last - 1e-6)}
                shares.append(len(found & right) / k)
            told[f"recall@{k} {mode}"] = round(statistics.fmean(shares), 4)
    return told


def _filters(searcher: Any, columns: Mapping[str, Vectors], asked: Vectors) -> dict[str, Any]:
    """Of the rows that pass a rare filter and belong among the first ten, the share that is found."""
    members = {
        str(number): [
            int(hit.product_id[1:])
            for hit in searcher.search(asked[0], k=5000, exact=True, where={"rare": str(number)})
        ]
        for number in _RARE
    }
    told = {}
    for number, rows in members.items():
        right = 0
        wanted = 0
        for mode, vectors in columns.items():
            for query in asked:
                order = np.argsort(-(vectors[rows] @ query), kind="stable")[:10]
                expected = {_key(rows[place]) for place in order}
                found = {hit.product_id for hit in searcher.search(query, mode=mode, k=10, where={"rare": number})}
                right, wanted = right + len(found & expected), wanted + len(expected)
        told[f"filter that {number} rows pass: found of {wanted}"] = right
    return told


def bare_search(db: str, searcher: Any) -> Callable[[Vectors], object]:
    """LanceDB's own call for the ten nearest by average, with the columns, probes and refinement of a search."""
    import lancedb

    table = lancedb.connect(db).open_table("products")
    table.checkout(searcher.release.versions["products"])
    index = searcher.release.index["avg"]
    columns = [*searcher.search(np.ones(_DIM, np.float32), k=1)[0].fields, "product_id", "_distance"]

    def bare(query: Vectors) -> object:
        search = table.search(query, vector_column_name="avg_vector").distance_type("cosine")
        if index["kind"] != "exact":
            search = search.nprobes(index["probes"]).refine_factor(index["refine"])
        return search.select(columns).limit(10).to_list()

    return bare


def scan_of(vectors: Vectors) -> Callable[[Vectors], object]:
    """The ten nearest by one product of all vectors in memory."""

    def scan(query: Vectors) -> object:
        scores = vectors @ query
        best = np.argpartition(-scores, 10)[:10]
        return best[np.argsort(-scores[best])]

    return scan


def _against_lancedb(db: str, searcher: Any, vectors: Vectors, asked: Vectors) -> dict[str, Any]:
    """A search beside LanceDB's bare call that returns the same columns, and beside a scan of all vectors in memory."""
    bare, scan = bare_search(db, searcher), scan_of(vectors)
    times = _in_turns({"search": searcher.search, "lancedb": bare, "numpy": scan}, asked)
    told: dict[str, Any] = {f"{name} k=10: p50, p99 ms": _told(spent) for name, spent in times.items()}
    told["search / lancedb, p50"] = round(statistics.median(times["search"]) / statistics.median(times["lancedb"]), 3)
    told["search / numpy scan, p50"] = round(statistics.median(times["search"]) / statistics.median(times["numpy"]), 3)
    return told


def _diversity(searcher: Any, asked: Vectors) -> dict[str, Any]:
    """What diversifying adds to the same page of ten, and to a page of all its candidates."""
    from pipeline.query import Diversify

    calls: dict[str, Callable[[Vectors], Any]] = {
        "ten": lambda query: searcher.search(query, mode="text", k=10),
        "fifty": lambda query: searcher.search(query, mode="text", k=50),
        "diversified": lambda query: searcher.search(query, mode="text", k=10, diversify=Diversify()),
    }
    times = _in_turns(calls, asked)
    told = {}
    for name in ("ten", "fifty"):
        added = [after - before for after, before in zip(times["diversified"], times[name], strict=True)]
        told[f"diversity adds to a page of {name}: p50, p99 ms"] = _told(added)
    return told


def _threads(searcher: Any, asked: Vectors) -> dict[str, Any]:
    """2,000 queries by one thread and by eight."""
    queries = [asked[i % len(asked)] for i in range(2000)]

    def ids(query: Vectors) -> list[str]:
        return [hit.product_id for hit in searcher.search(query, columns=["product_id"])]

    begun = time.perf_counter()
    alone = [ids(query) for query in queries]
    middle = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ids, queries))
    ended = time.perf_counter()
    return {
        "2,000 queries by 8 threads: equal to those by one": alone == together,
        "2,000 queries: 8 threads / 1 thread, throughput": round((middle - begun) / (ended - middle), 2),
        "2,000 queries by 8 threads: queries/s": round(2000 / (ended - middle), 1),
    }


def _first_answer(out: Path, db: str, query: Vectors) -> dict[str, Any]:
    """Of fresh processes: until the first answer to a vector, and until LanceDB is imported."""
    np.save(out / "query.npy", query)
    script = _FIRST.format(db=db, vector=str(out / "query.npy"))
    spent, imports, heavy = [], [], ""
    for _ in range(5):
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
        total, lance, heavy = run.stdout.split(" ")
        spent.append(float(total))
        imports.append(float(lance))
    return {
        "first answer in a fresh process: s": round(statistics.median(spent), 2),
        "of that LanceDB's import: s": round(statistics.median(imports), 2),
        "of torch, sklearn and the like it imports": heavy.strip() or "none",
    }


def _text(searcher: Any) -> dict[str, Any]:
    """New texts through the whole search, in turns with the text tower alone."""
    from pipeline.model import load_model

    tower = load_model(searcher.release.model, towers=("text",))
    texts = [f"red dress number {i} with long sleeves" for i in range(40)]
    searcher.search("warm")
    tower.embed_texts(["warm"])
    vectors = tower.embed_texts(texts)
    calls: dict[str, Callable[[Any], Any]] = {
        "search": lambda i: searcher.search(texts[i]),
        "tower": lambda i: tower.embed_texts([texts[i]]),
        "vector": lambda i: searcher.search(vectors[i]),
    }
    times = _in_turns(calls, range(len(texts)))
    added = [after - before for after, before in zip(times["search"], times["tower"], strict=True)]
    return {
        "one text through the tower: p50, p99 ms": _told(times["tower"]),
        "a text query adds to that: p50, p99 ms": _told(added),
        "of that the search for its vector: p50, p99 ms": _told(times["vector"]),
    }


def _in_turns(calls: Mapping[str, Callable[[Any], Any]], arguments: Any) -> dict[str, list[float]]:
    """Seconds of each call for each argument; who comes first moves on, so that nobody always finds a warm cache."""
    names = list(calls)
    for call in calls.values():
        call(arguments[0])
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn, argument in enumerate(arguments):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = time.perf_counter()
            calls[name](argument)
            times[name].append(time.perf_counter() - begun)
    return times


def _told(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.median(seconds):.2f}, {1000 * float(np.quantile(seconds, 0.99)):.2f}"


def _unit(rows: npt.NDArray[Any]) -> Vectors:
    units: Vectors = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    return units


def _key(row: int) -> str:
    return f"p{row:07d}"


if __name__ == "__main__":
    raise SystemExit(main())
