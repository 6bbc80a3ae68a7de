"""The benchmark: its arithmetic, that what it compares computes the same, and what it writes. No time is asserted."""

from __future__ import annotations

import json
import math

import pytest
from small_catalog import items, write_products

from jobs import benchmark
from jobs.bench import limits, runs, towers, writes
from jobs.bench.timing import Row, Timed, in_turns
from pipeline.model import load_model
from pipeline.model.image_tower import ImageConfig
from pipeline.model.text_tower import TextConfig

TEXTS = ["red dress", "a wool coat of wool, red and blue, " * 5, "shirt", "a red coat"]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model)


def test_ratios_are_of_turns_and_rates_are_medians():
    timed = Timed({"ours": (1.0, 2.0, 4.0), "theirs": (2.0, 2.0, 2.0)})
    assert timed.ratio("ours", "theirs") == 1.0  # of 2, 1 and 0.5
    row = timed.row("part", "ours", 8, "things/s", beside="theirs", aim=2.0)
    assert (row.rate, row.low, row.high, row.ratio, row.aim) == (4.0, 2.0, 8.0, 1.0, 2.0)


def test_calls_take_turns():
    called = []
    timed = in_turns({name: lambda name=name: called.append(name) for name in "ab"}, turns=3)
    assert "".join(called) == "ab" * 4  # once to warm up
    assert [len(seconds) for seconds in timed.seconds.values()] == [3, 3]


def test_flops_of_the_published_sizes():
    assert towers.image_flops(ImageConfig()) / 1e9 == pytest.approx(35.1, abs=0.2)
    short, long = (towers.text_flops(TextConfig(), tokens) for tokens in (64, 128))
    assert short / 1e9 == pytest.approx(2 * 64 * 12 * (4 * 768**2 + 3 * 768 * 3072) / 1e9, rel=0.02)
    assert 2.0 < long / short < 2.05  # attention alone grows faster than the text


def test_the_plain_loop_computes_what_the_towers_do(model):
    rows = list(towers.plain_loop(model, TEXTS, [limits.photo(64, seed) for seed in range(3)]))
    assert [(row.what, row.beside) for row in rows] == [
        ("text tower, float32", "plain loop"), ("plain loop, texts", ""),
        ("image tower, float32", "plain loop"), ("plain loop, images", ""),
    ]  # fmt: skip
    assert all(row.rate > 0 and math.isfinite(row.rate) for row in rows)


def test_towers_that_do_not_agree_are_not_compared(model):
    with pytest.raises(RuntimeError, match="other vectors"):
        towers._agree(model.embed_texts(["red"]), -model.embed_texts(["red"]))


def test_towers_as_a_share_of_the_limit(model):
    rows = list(towers.towers({"float32": model}, TEXTS, {"float32": 100.0}))
    assert [row.what.split(",")[0] for row in rows] == ["image tower"] * 3 + ["text tower"]
    image = rows[0]
    assert image.ratio == pytest.approx(image.rate * towers.image_flops(model.image_tower.config) / 1e9 / 100.0)


def test_inputs_are_those_of_the_catalog(tmp_path, model):
    write_products(tmp_path, [items(6), items(3, seed=1)])
    inputs = runs.read_inputs(str(tmp_path))
    assert (len(inputs.texts), len(inputs.images)) == (9, 18)
    assert len(runs.read_inputs(str(tmp_path), limit=4).texts) == 4
    ours, library = runs.decoding(model, [*inputs.images, b"no image"])
    assert ours.beside == library.what == "the decoder alone"
    assert ours.ratio < 1.0  # it does the same, and more


def test_what_is_written_is_read_back_alike_by_all(tmp_path):
    rows = list(writes.writes(tmp_path, rows=300, dim=8))
    assert [row.beside for row in rows] == ["pyarrow Parquet", "lancedb add", "", "", ""]
    assert list(tmp_path.iterdir()) == []  # cleared away
    table = writes.drawn(5, 8)
    assert table["text_vector"].null_count == 0
    assert table.num_rows == 5


@pytest.mark.ray
def test_a_backfill_beside_its_towers(tmp_path, tiny_model, ray_session):
    write_products(tmp_path / "catalog", [items(8)])
    catalog = str(tmp_path / "catalog")
    found = list(
        runs.backfill_beside_towers(
            catalog, tiny_model, tmp_path, limit=5, settings=["ray.address=auto", "pool.gpus_per_actor=0"], turns=1
        )
    )
    assert [row.what for row in found] == ["whole backfill, 15 inputs", "towers alone"]
    assert found[0].ratio == pytest.approx(found[0].rate / found[1].rate)


def test_the_results_are_told_as_lines_json_and_a_page(tmp_path, capsys, tiny_model):
    write_products(tmp_path / "catalog", [items(3)])
    arguments = ["--out", str(tmp_path / "out"), "--parts", "decode", "--model", tiny_model]
    assert benchmark.main([*arguments, "--catalog", str(tmp_path / "catalog")]) == 0
    told = capsys.readouterr().out
    assert "x the decoder alone (aim 0.7)" in told
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [Row(**row).part for row in found["rows"]] == ["decode", "decode"]
    assert "decode and preprocess, one core" in (tmp_path / "out" / "benchmark.html").read_text()
    assert benchmark.main([*arguments, "--parts", "nothing"]) == 2
    assert "--parts knows no 'nothing'" in capsys.readouterr().err
