"""What a product costs as catalogs and actors become more: whole backfills of drawn products through tiny towers.

Each backfill is a job of its own, as a user runs it, so that its memory is its own. Start-up and index are left out:
the one does not depend on the catalog, and an index over n vectors needs about n times the root of n distances.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bench.timing import TURNS, Row, Timed
from pipeline.errors import RunError

_FILE_PRODUCTS = 10_000
_PHOTOS, _PHOTO_PX = 200, 32
_WORDS = ("red", "blue", "green", "wool", "cotton", "coat", "dress", "shirt", "skirt", "long", "short", "plain")
_SAMPLE_S = 0.5
_NO_INDEX = "release.index_min_rows=1000000000"


def by_products(
    folder: Path, sizes: Sequence[int], *, turns: int = TURNS, settings: Sequence[str] = ()
) -> Iterator[Row]:
    """Backfills of catalogs of these sizes, in turns, each rate beside the first's.

    Args:
        folder: for catalogs and databases, which are removed.
        sizes: products, from the smallest.
        turns: how often each size is backfilled.
        settings: of the backfills.
    """
    model = _tiny_model(folder / "tiny")
    seconds: dict[int, list[float]] = defaultdict(list)
    peaks: dict[int, list[float]] = defaultdict(list)
    for size in sizes:
        write_catalog(folder / f"catalog-{size}", size)
    for _ in range(turns):
        for size in sizes:
            spent, peak = _backfill(folder / f"catalog-{size}", folder / "db", model, [_NO_INDEX, *settings])
            seconds[size].append(spent)
            peaks[size].append(peak)
    first = sizes[0]
    for size in sizes:
        # Seconds of as many products each, or the turns' ratios would be of catalogs.
        timed = Timed({f"{n:,} products": tuple(s * size / n for s in seconds[n]) for n in {first, size}})
        what = f"backfill of {size:,} products, tiny towers"
        yield timed.row("scaling", f"{size:,} products", size, "products/s", beside=f"{first:,} products", what=what)
    for size in sizes:
        ratio = statistics.median(peaks[size]) / statistics.median(peaks[first])
        what = f"peak memory, {size:,} products"
        row = Row("scaling", what, statistics.median(peaks[size]), min(peaks[size]), max(peaks[size]), "MB")
        yield replace(row, ratio=ratio, beside=f"{first:,} products")
    for size in sizes:
        shutil.rmtree(folder / f"catalog-{size}")


def by_actors(
    folder: Path, products: int, actors: Sequence[int], *, turns: int = TURNS, settings: Sequence[str] = ()
) -> Iterator[Row]:
    """Backfills of one catalog by these numbers of actors, each with one thread for its towers and one to decode."""
    model, catalog = _tiny_model(folder / "tiny"), folder / f"catalog-{products}"
    write_catalog(catalog, products)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(turns):
        for count in actors:
            own = [_NO_INDEX, f"pool.actors={count}", "pool.torch_threads=1", "pool.decode_threads=1", *settings]
            seconds[f"actors: {count}"].append(_backfill(catalog, folder / "db", model, own)[0])
    shutil.rmtree(catalog)
    timed = Timed({name: tuple(found) for name, found in seconds.items()})
    for name in seconds:
        what = f"backfill of {products:,} products, {name}"
        yield timed.row("scaling", name, products, "products/s", beside=f"actors: {actors[0]}", what=what)


def write_catalog(folder: Path, products: int) -> None:
    """Partitions of 10,000 products with a text of their own and one of 200 photos, drawn with seed 0."""
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    photos = []
    for _ in range(_PHOTOS):
        out = io.BytesIO()
        pixels = np.kron(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((4, 4, 1), np.uint8))
        Image.fromarray(pixels).save(out, "JPEG")
        photos.append(out.getvalue())
    for at in range(0, products, _FILE_PRODUCTS):
        numbers = range(at, min(at + _FILE_PRODUCTS, products))
        words = rng.integers(len(_WORDS), size=(len(numbers), 2))
        table = {
            "product_id": [f"p{number:08d}" for number in numbers],
            "title": [f"{_WORDS[a]} {_WORDS[b]} {n}" for n, (a, b) in zip(numbers, words, strict=True)],
            "images": [[photos[photo]] for photo in rng.integers(_PHOTOS, size=len(numbers))],
        }
        pq.write_table(pa.table(table), folder / f"part-{at // _FILE_PRODUCTS:05d}.parquet")


def _tiny_model(folder: Path) -> Path:
    """Two seeded layers a tower, 64-d, 32-pixel images."""
    from jobs.measure_query import write_model
    from pipeline.model.image_tower import ImageConfig
    from pipeline.model.text_tower import TextConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    image = ImageConfig(width=64, layers=2, head_width=32, image_size=_PHOTO_PX, patch_size=16, rope_grid=2)
    write_model(folder, 0, TextConfig(**sizes), image)
    return folder


def _backfill(catalog: Path, db: Path, model: Path, settings: Sequence[str]) -> tuple[float, float]:
    """Seconds from the plan to the release without the actors' start, and peak MB of driver and actors.

    Raises:
        RunError: the backfill failed.
    """
    shutil.rmtree(db, ignore_errors=True)
    command = [sys.executable, "-m", "jobs.backfill", "--json", "--log-level", "error"]
    command += ["--catalog", str(catalog), "--db", str(db), "--model", str(model)]
    command += [part for setting in settings for part in ("--set", setting)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        watch = Watch(job.pid)
        try:
            said, _ = job.communicate()
        finally:
            peak = watch.stop()
    shutil.rmtree(db, ignore_errors=True)
    if job.returncode:
        raise RunError(f"a backfill of the benchmark ended with exit code {job.returncode}: {said.strip()[-500:]}")
    told: Mapping[str, Any] = json.loads(said)
    stages = told["run_seconds"]
    return stages["plan"] + told["usage"]["embedding_s"] + stages["reduce"] + stages["release"], peak


class Watch:
    """Looks at a process and the Ray actors under it twice a second, for the most memory they have held at once.

    Args:
        pid: the process.
    """

    def __init__(self, pid: int) -> None:
        self._pid, self._peak_mb, self._over = pid, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Peak resident MB, as far as moments tell; a page that several of them map counts for each."""
        self._over.set()
        self._thread.join()
        return self._peak_mb

    def _look(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            self._peak_mb = max(self._peak_mb, sum(_resident_mb(pid) for pid in _own(self._pid)))


def _own(pid: int) -> set[int]:
    """The process, and those below it that are Ray actors."""
    parents: dict[int, int] = {}
    actors: set[int] = set()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_text()
            command = Path(entry.path, "cmdline").read_text(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
        if re.match(r"ray::(?!IDLE)", command):
            actors.add(int(entry.name))

    def is_below(child: int) -> bool:
        while child in parents and child != pid:
            child = parents[child]
        return child == pid

    return {pid} | {actor for actor in actors if is_below(actor)}


def _resident_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))
