"""Real catalogs, real runs, the demo model: measured, measured again, gated, and beside other models."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_model_clip import write as write_clip

from jobs import backfill, baselines, evaluate
from pipeline.catalog.demo import write_demo_catalog
from pipeline.store.releases import list_releases, newest_release
from pipeline.store.tables import Database

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
PRODUCTS = 240
GATED = ["--set", "release.gate=true", "--set", "release.gate.queries=400"]


@pytest.fixture(scope="module")
def released(tmp_path_factory, ray_session) -> tuple[Path, Path]:
    """A catalog and its database, released behind the gate."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_demo_catalog(folder / "catalog", products=PRODUCTS, seed=3, workers=2)
    assert run_backfill(folder / "catalog", folder / "db", *GATED) == 0
    return folder / "catalog", folder / "db"


def run_backfill(catalog: Path, db: Path, *more: str) -> int:
    return backfill.main(
        ["--catalog", str(catalog), "--db", str(db), "--model", "demo", "--set", "ray.address=auto", *more]
    )


def copied(catalog: Path, out: Path, *, shuffled: float = 0.0) -> Path:
    """The catalog in another folder, with the images of a share of the products dealt out anew."""
    out.mkdir()
    for file in sorted(catalog.glob("*.parquet")):
        table = pq.read_table(file)
        images = table["images"].to_pylist()
        chosen = random.Random(1).sample(range(len(images)), int(shuffled * len(images)))
        for to, source in zip(chosen, [*chosen[1:], *chosen[:1]], strict=True):
            images[to] = table["images"][source].as_py()
        place = table.schema.names.index("images")
        column = pa.array(images, table.schema.field("images").type)
        pq.write_table(table.set_column(place, table.schema.field("images"), column), out / file.name)
    return out


def test_two_evaluations_are_equal_to_the_byte_times_aside(released, tmp_path, capsys):
    _, db = released
    for name in ("a", "b"):
        assert evaluate.main(["--db", str(db), "--queries", "200", "--index", "--out", str(tmp_path / name)]) == 0
    told = capsys.readouterr().out
    assert "By broad category, precision@10: " in told
    assert "through the index" in told
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    differing = [str(f) for f in files if (tmp_path / "a" / f).read_bytes() != (tmp_path / "b" / f).read_bytes()]
    assert differing == ["times.json"]
    rows = pq.read_table(tmp_path / "a" / "queries.parquet")
    assert rows.num_rows == 200
    figures = json.loads((tmp_path / "a" / "figures.json").read_text())["figures"]
    found = {(f["level"], f["mode"], f["measure"], f["k"]): f for f in figures}
    at_10 = found["broad", "text", "precision", 10]
    assert at_10["micro"]["mean"] == pytest.approx(sum(rows["broad_text_precision_10"].to_pylist()) / 200)
    assert at_10["micro"]["mean"] > 0.7 > at_10["floor"]  # the demo model knows dresses from jackets
    assert at_10["index"] == pytest.approx(at_10["micro"]["mean"])  # so few vectors are searched exactly anyway


def test_the_gate_passes_the_same_and_refuses_shuffled_images(released, tmp_path, capsys):
    catalog, db = released
    assert (db / "_evaluation" / "release-1.parquet").is_file()
    assert run_backfill(copied(catalog, tmp_path / "same"), db, *GATED) == 0
    newest = newest_release(Database(str(db)))
    assert newest is not None
    assert newest.checks["gate"]["is_passed"] is True
    assert [line["difference"]["mean"] for line in newest.checks["gate"]["lines"]] == [0.0] * 6
    assert evaluate.main(["--db", str(db), "--against", "1", "--json"]) == 0
    capsys.readouterr()

    before = Database(str(db)).dataset("products").to_table()
    assert run_backfill(copied(catalog, tmp_path / "worse", shuffled=0.1), db, *GATED, "--json") == 1
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert "image mode, broad precision@10" in error
    assert "text mode" not in error
    assert newest_release(Database(str(db))) == newest
    assert Database(str(db)).dataset("products").to_table() == before  # the latest version is the release again

    assert run_backfill(tmp_path / "worse", db) == 0  # without the gate the same is released
    assert len(list_releases(Database(str(db)))) == newest.release + 1
    assert evaluate.main(["--db", str(db), "--against", str(newest.release)]) == 1


def test_other_models_beside_this_one(released, tmp_path, capsys):
    catalog, _ = released
    write_clip(tmp_path / "clip", "clip")
    arguments = ["--catalog", str(catalog), "--out", str(tmp_path / "out"), "--model", "demo", "--queries", "100"]
    arguments += ["--beside", f"clip={tmp_path / 'clip'}", "--set", "ray.address=auto"]
    assert baselines.main([*arguments, "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert list(rows) == ["demo", "texts alone", "clip", "texts alone and clip for images"]
    assert rows["demo"]["precision"]["fine"]["image"] > rows["clip"]["precision"]["fine"]["image"]  # random weights
    assert set(rows["texts alone"]["precision"]["broad"]) == {"text"}
    assert rows["texts alone and clip for images"]["models"] == 2
    assert rows["demo"]["bytes_per_product"] > 3 * 128 * 4 > rows["texts alone"]["bytes_per_product"] >= 128 * 4
    assert all(row["seconds"] > 0 for row in rows.values())
    assert baselines.main([*arguments, "--beside", "x"]) == 2
    assert "NAME=MODEL" in capsys.readouterr().err


def test_a_real_catalog(shared, tmp_path, capsys):
    assert run_backfill(shared / "data" / "catalog" / "luma", tmp_path / "db") == 0
    assert evaluate.main(["--db", str(tmp_path / "db")]) == 0
    told = capsys.readouterr().out
    assert "fine precision" in told
    assert (tmp_path / "db" / "_evaluation" / "report" / "report.html").is_file()
    assert evaluate.main(["--db", str(tmp_path / "db"), "--fine", "type", "--recipe", "description"]) == 0
