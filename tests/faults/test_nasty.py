"""62 files that a real catalog can hold, as catalogs of three kinds: each as its manifest says, the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness import NOTE_END, FaultyJob, arguments
from small_catalog import Item, table, write_images, write_products
from test_model_images import REASONS, manifest, nasty

from pipeline.run.staging import file_sha256

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(not manifest(), reason="the nasty images are not beside this checkout"),
]

PEAK_BYTES = 1_500_000_000
FILES = [row["file"] for row in manifest()]


def one_each(folder: Path) -> Path:
    products = [Item(name, f"photo {name}", images=[nasty(name)]) for name in FILES]
    return write_products(folder, [products[i::4] for i in range(4)])


def many_each(folder: Path) -> Path:
    """Seven products; one batch holds everything."""
    products = [Item(f"p{i}", f"album {i}", images=[nasty(name) for name in FILES[i::7]]) for i in range(7)]
    return write_products(folder, [products])


def a_row_each(folder: Path) -> Path:
    """The albums as one row per image, shuffled over files, in row groups of seven."""
    products = [Item(f"p{i}", f"album {i}", images=[nasty(name) for name in FILES[i::9]]) for i in range(9)]
    return write_images(folder, products, files=5, seed=62)


LAYOUTS = {
    "one each": (one_each, ["pool.decode_threads=1"]),
    "many each": (many_each, ["pool.decode_threads=4"]),
    "a row each": (a_row_each, ["pool.decode_threads=2", "catalog.partition_bytes=1", "pool.torch_threads=2"]),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> dict[str, dict[str, str | np.ndarray]]:
    """By layout, then by file: the reason of its rejection, or its vector; the actors' peak memory is checked."""
    found: dict[str, dict[str, str | np.ndarray]] = {}
    sha256 = {file_sha256(str(path)): path.name for path in (nasty_path(name) for name in FILES)}
    assert len(sha256) == len(FILES)
    for layout, (write, sets) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("nasty")
        given = arguments(write(folder / "catalog"), folder / "db", tiny_model, "max_reject_share=1.0", *sets)
        with FaultyJob(given, folder / "job", [NOTE_END]) as job:
            assert job.end() == 0, job.process.log
            peak = max(event["peak_bytes"] for event in job.events("note", "after"))
        assert peak < PEAK_BYTES, f"{layout}: {peak:,} bytes"
        print(f"nasty, {layout}: peak of the embedding process {peak / 1e6:,.0f} MB")
        rejects = [row for row in table(folder / "db", "rejects").to_pylist() if row["input"] != "text"]
        found[layout] = {sha256[row["sha256"]]: row["reason"] for row in rejects}
        for row in table(folder / "db", "images").to_pylist():
            assert sha256[row["sha256"]] not in found[layout], "both rejected and embedded"
            found[layout][sha256[row["sha256"]]] = np.asarray(row["vector"])
    return found


def nasty_path(name: str) -> Path:
    from test_model_images import NASTY

    return NASTY / "files" / name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_file_comes_out_as_its_manifest_says(
    layout: str, outcomes: dict[str, dict[str, str | np.ndarray]]
) -> None:
    found = outcomes[layout]
    assert set(found) == set(FILES)
    for row in manifest():
        outcome = found[row["file"]]
        if row["expected"] == "decode":
            assert isinstance(outcome, np.ndarray), (row["file"], outcome)
        elif row["expected"] == "reject":
            reasons = next(reasons for short, reasons in REASONS.items() if row["reason_or_note"].startswith(short))
            assert outcome in reasons, row["file"]


def test_the_result_is_the_same_each_time(outcomes: dict[str, dict[str, str | np.ndarray]]) -> None:
    first, *others = outcomes.values()
    for other in others:
        for name, outcome in first.items():
            if isinstance(outcome, str):
                assert other[name] == outcome
            else:
                assert np.abs(np.asarray(other[name]) - outcome).max() <= 1e-6, name
