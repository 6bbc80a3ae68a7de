from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from pipeline.catalog.demo import demo_photo, demo_rows, write_demo_catalog
from pipeline.catalog.demo_products import TRAIN_SEED, is_held_out, product
from pipeline.catalog.demo_taxonomy import BROAD, COLOURS, FINE, PATTERNS
from pipeline.catalog.demo_words import catalog_listing, training_wordings
from pipeline.records import Reason


def test_a_product_is_a_pure_function_of_seed_and_index(tmp_path: Path) -> None:
    whole = write_demo_catalog(tmp_path / "a", products=30, seed=5, partition_products=100)
    write_demo_catalog(tmp_path / "b", products=12, seed=5, start=18)
    a, b = (pq.read_table(tmp_path / name).to_pylist() for name in "ab")
    assert a[-len(b) :] == b
    assert whole.products == 30
    assert demo_photo(5, 3, 0) == demo_photo(5, 3, 0)
    assert demo_photo(5, 3, 0) != demo_photo(6, 3, 0)


def test_partitions_and_workers_change_no_row(tmp_path: Path) -> None:
    one = write_demo_catalog(tmp_path / "a", products=120, partition_products=1000)
    other = write_demo_catalog(tmp_path / "b", products=120, partition_products=60, workers=2)
    assert len(list((tmp_path / "b").iterdir())) == 2
    assert one == other
    assert pq.read_table(tmp_path / "a").equals(pq.read_table(tmp_path / "b"))


def test_the_manifest_counts_what_is_there(tmp_path: Path) -> None:
    manifest = write_demo_catalog(tmp_path, products=150)
    rows = pq.read_table(tmp_path).to_pylist()
    assert manifest.rows == len(rows)
    ids = Counter(row["product_id"] for row in rows)
    assert ids[None] == manifest.bad.get(Reason.MISSING_ID, 0)
    assert sum(n - 1 for i, n in ids.items() if i is not None) == manifest.bad.get(Reason.DUPLICATE_ID, 0)
    images = [image for row in rows for image in row["images"]]
    assert sum(image is None for image in images) == manifest.bad.get(Reason.IMAGE_NULL, 0)
    assert sum(image == b"" for image in images) == manifest.bad.get(Reason.IMAGE_EMPTY, 0)


def test_every_flaw_comes_up_and_most_products_have_none() -> None:
    from pipeline.catalog.demo import _FLAWS
    from pipeline.catalog.demo_products import stream

    found: Counter[Reason] = Counter()
    for index in range(2000):
        rng = stream(0, index, "flaws")
        found.update(reason for reason, share in _FLAWS.items() if rng.random() < share)
    assert set(found) == set(_FLAWS)
    assert sum(found.values()) < 80
    rows, reasons = demo_rows(0, 0, has_flaws=False)
    assert (len(rows), reasons) == (1, [])


def test_the_photos_are_photos() -> None:
    for index in range(8):
        item = product(0, index)
        assert 1 <= item.n_images <= 4
        photo = Image.open(io.BytesIO(demo_photo(0, index, 0)))
        assert (photo.size, photo.mode, photo.format) == ((256, 256), "RGB", "JPEG")
        assert len(photo.getcolors(1 << 20) or []) > 1000


def test_the_taxonomy_is_covered_evenly() -> None:
    items = [product(1, index) for index in range(1500)]
    assert (len(BROAD), len(FINE)) == (5, 25)
    assert {item.broad for item in items} == set(BROAD)
    assert {item.fine for item in items} == set(FINE)
    assert {item.colour for item in items} == set(COLOURS)
    assert {item.pattern for item in items} == set(PATTERNS)
    duplicates = [item for item in items if item.is_near_duplicate]
    assert 0.02 < len(duplicates) / len(items) < 0.1
    for item in duplicates[:20]:
        original = product(1, item.original)
        assert (item.fine, item.colour, item.pattern, item.look) == (
            original.fine,
            original.colour,
            original.pattern,
            original.look,
        )


def test_descriptions_vary_and_leave_things_out() -> None:
    items = [product(1, index) for index in range(400)]
    listings = [catalog_listing(1, item) for item in items]
    assert len({(listing.title, listing.description) for listing in listings}) > 380
    silent = [fact for listing in listings for fact in ("colour", "pattern", "fine") if fact not in listing.states]
    assert len(silent) > 100
    assert any(listing.description is None for listing in listings)


def test_held_out_combinations_are_few_and_stay_out() -> None:
    import random

    items = [product(TRAIN_SEED, index) for index in range(2000)]
    held = [item for item in items if is_held_out(item)]
    assert 0.04 < len(held) / len(items) < 0.2
    rng = random.Random(0)
    for item in items[:200]:
        for wording in training_wordings(item, rng):
            assert wording.text.strip()
