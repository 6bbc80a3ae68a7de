"""Readers beside re-indexing: whatever moment they look at, what they read is one release, whole."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import lance
import pytest
from harness import arguments, run_here
from small_catalog import Item, jpeg, write_products

from pipeline.query import Searcher
from pipeline.store.releases import Release, newest_release
from pipeline.store.schemas import TABLES

pytestmark = [pytest.mark.slow, pytest.mark.ray]

RUNS, PRODUCTS, READERS = 12, 24, 3
_PAUSE_S = 0.02  # a thousand looks are enough, and the runs need the machine too


def generation(number: int) -> list[Item]:
    """Every product's title, every image, how many there are, and the one reject tell the generation."""
    products = [
        Item(f"p{i:03d}", f"coat {i} generation-{number}", None, [jpeg(1000 * number + 10 * i + j) for j in range(n)])
        for i in range(PRODUCTS)
        for n in [1 + (i + number) % 3]
    ]
    products[number % PRODUCTS].images = [*(products[number % PRODUCTS].images or []), bad(number)]
    return products


def bad(number: int) -> bytes:
    return f"no image, generation {number}".encode()


def hashes(number: int) -> set[str]:
    images = [image for item in generation(number) for image in item.images or () if image != bad(number)]
    return {hashlib.sha256(image).hexdigest() for image in images if isinstance(image, bytes)}


HASHES = [hashes(number) for number in range(RUNS + 1)]


def whole(db: Path, release: Release) -> int:
    """Read every table at the release's versions, one after another; the generation that all of them are of."""
    read = {name: lance.dataset(f"{db}/{name}.lance", version=release.versions[name]).to_table() for name in TABLES}
    titles = {title.rpartition("-")[2] for title in read["products"].column("title").to_pylist()}
    assert len(titles) == 1, f"products of generations {titles}"
    number = int(titles.pop())
    assert read["products"].num_rows == PRODUCTS
    assert set(read["images"].column("sha256").to_pylist()) == HASHES[number], f"images are not of generation {number}"
    of = Counter(read["images"].column("product_id").to_pylist())
    products = read["products"].select(["product_id", "n_images"]).to_pylist()
    assert {row["product_id"]: row["n_images"] for row in products} == of
    assert read["rejects"].column("sha256").to_pylist() == [hashlib.sha256(bad(number)).hexdigest()]
    assert release.release == number + 1
    return number


class Reader(threading.Thread):
    """Looks again and again until it is told to stop; an error is kept."""

    def __init__(self, look: Callable[[], int], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._look, self._stop_event = look, stop
        self.seen: list[int] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stop_event.is_set():
                self.seen.append(self._look())
                time.sleep(_PAUSE_S)
        except BaseException as error:
            self.error = error


def test_no_reader_sees_half_a_release(tiny_model: str, ray_session: None, tmp_path: Path) -> None:
    db = tmp_path / "db"

    def backfill(number: int) -> None:
        products = generation(number)
        catalog = write_products(tmp_path / str(number), [products[:10], products[10:]])
        ended = run_here(arguments(catalog, db, tiny_model))
        assert (ended.code, ended.told["release"]) == (0, number + 1), ended.log

    def read_tables() -> int:
        release = newest_release(str(db))
        assert release is not None
        return whole(db, release)

    backfill(0)
    searcher = Searcher.open(db, model=tiny_model)

    def search() -> int:
        searcher.refresh()
        release = searcher.release.release
        titles = [str(hit.fields["title"]) for hit in searcher.search("a wool coat", k=PRODUCTS)]
        assert len(titles) == PRODUCTS
        assert {title.rpartition("-")[2] for title in titles} == {str(release - 1)}
        return release - 1

    stop = threading.Event()
    readers = [Reader(look, stop) for look in (read_tables, read_tables, search)]
    assert len(readers) == READERS
    for reader in readers:
        reader.start()
    try:
        for number in range(1, RUNS + 1):
            backfill(number)
    finally:
        stop.set()
        for reader in readers:
            reader.join(60)
    assert [reader.error for reader in readers] == [None] * READERS
    print(f"reads: {[len(reader.seen) for reader in readers]}, generations seen: {len(set(readers[0].seen))}")
    for reader in readers:
        assert reader.seen == sorted(reader.seen), "a reader went back"
        assert len(set(reader.seen)) > RUNS // 2, "the readers hardly met the runs"
