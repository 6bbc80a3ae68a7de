"""The benchmark: its arithmetic, that what it compares computes the same, and what it writes. No time is asserted."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_catalog import items, write_products

from jobs import benchmark
from jobs.bench import limits, peers, queries, ray_data, runs, scaling, towers, writes
from jobs.bench.timing import Row, Timed, in_turns
from pipeline.errors import MissingExtra
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
    rows = list(towers.plain_loop({"float32": model}, TEXTS, [limits.photo(64, seed) for seed in range(3)]))
    assert [(row.what, row.beside) for row in rows] == [
        ("text tower, float32", "plain loop, float32"), ("plain loop, float32, texts", ""),
        ("image tower, float32", "plain loop, float32"), ("plain loop, float32, images", ""),
    ]  # fmt: skip
    assert all(row.rate > 0 and math.isfinite(row.rate) for row in rows)


def test_towers_that_do_not_agree_are_not_compared(model):
    with pytest.raises(RuntimeError, match="other vectors"):
        towers.agree(model.embed_texts(["red"]), -model.embed_texts(["red"]))


def test_towers_as_a_share_of_the_limit(model, monkeypatch):
    called = []

    def two_seconds_each_and_one_for_the_product(calls, **_):
        for name, call in calls.items():
            call()
            called.append(name)
        return Timed({name: (1.0 if "matrix" in name else 2.0,) * 3 for name in calls})

    monkeypatch.setattr(towers, "in_turns", two_seconds_each_and_one_for_the_product)
    rows = list(towers.towers({"float32": model}, TEXTS))
    assert [row.what.split(",")[0] for row in rows] == ["image tower"] * 3 + ["text tower"]
    assert [name for name in called if "matrix" in name] == ["this machine's matrix product"] * 2
    _, product_gflop = limits.matrix_product("cpu", "float32")  # in its one second
    for row in rows[:3]:
        assert row.ratio == pytest.approx(row.rate * towers.image_flops(model.image_tower.config) / 1e9 / product_gflop)
    tokens = sum(towers.text_flops(model.text_tower.config, len(ids)) for ids in model.tokenize(TEXTS).ids)
    assert rows[3].ratio == pytest.approx(tokens / 2.0 / 1e9 / product_gflop)


def test_inputs_are_those_of_the_catalog(tmp_path, model):
    write_products(tmp_path, [items(6), items(3, seed=1)])
    inputs = runs.read_inputs(str(tmp_path))
    assert (len(inputs.texts), len(inputs.images)) == (9, 18)
    assert len(runs.read_inputs(str(tmp_path), limit=4).texts) == 4
    mixed = runs.mixed_texts(str(tmp_path), 8)
    assert sorted(len(text) for text in mixed) != [len(text) for text in mixed]  # in no order of lengths
    whole = set(inputs.texts)
    assert [sum(text in whole for text in mixed), len(mixed)] == [4, 8]
    assert all(any(text in one for one in whole) for text in mixed)  # the others are titles


def test_decoding_beside_the_decoder(model):
    images = [limits.photo(64, seed) for seed in range(3)]
    rows = list(runs.decoding(model, [*images, b"no image"], sides=[100]))
    ours, more, draft = "decode and preprocess, ", "the same, and a thumbnail, ", ", images.jpeg_draft=true"
    whose, alone = "the catalog's JPEG images", ["the decoder alone, ", "Pillow's steps, "]
    assert [row.what for row in rows] == [
        f"{ours}{whose}", f"{ours}{whose}", f"{more}{whose}", *(name + whose for name in alone),
        f"{ours}100 px", f"{ours}100 px", f"{more}100 px", f"{ours}100 px{draft}", f"{more}100 px{draft}",
        *(f"{name}100 px" for name in alone),
    ]  # fmt: skip
    assert [row.beside for row in rows[:5]] == ["Pillow's steps", *["the decoder alone"] * 2, "", ""]


def test_what_is_written_is_read_back_alike_by_all(tmp_path):
    rows = list(writes.writes(tmp_path, rows=300, dim=8))
    assert [row.beside for row in rows] == ["pyarrow Parquet", "lancedb add", "", "", ""]
    assert list(tmp_path.iterdir()) == []  # cleared away
    table = writes.drawn(5, 8)
    assert table["text_vector"].null_count == 0
    assert table.num_rows == 5


def test_an_embedder_beside_its_towers(tmp_path, tiny_model):
    write_products(tmp_path / "catalog", [items(8), items(8, seed=1)])
    ours, towers_alone = runs.embedder_beside_towers(str(tmp_path / "catalog"), tiny_model, tmp_path, rows=5)
    assert (ours.what, ours.beside) == ("embedder, 15 inputs to a staged file", towers_alone.what)
    assert [path.name for path in tmp_path.iterdir()] == ["catalog"]


def test_searches_beside_lancedb_and_a_scan(tmp_path, tiny_model):
    rows = list(queries.queries(tmp_path, Path(tiny_model), products=600, count=5))
    assert [row.what for row in rows[::2]] == ["search, 600 products, k=10"] * 2 + ["diversified search"]
    assert all(row.rate > 0 for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(peers.importlib, "import_module", absent)
    with pytest.raises(MissingExtra, match=r"the peer timm is not installed \(timm\): pip install 'twotower\[peers\]'"):
        peers._peer("timm")


def test_onnx_runtime_computes_what_the_towers_do(model, tmp_path):
    for name in ("onnxruntime", "onnx", "onnxscript"):
        pytest.importorskip(name)
    rows = list(peers.beside_onnx(model, TEXTS, [limits.photo(64, seed) for seed in range(3)], tmp_path))
    besides = ["ONNX Runtime", "ONNX Runtime, sorted by length", "ONNX Runtime"]
    assert [row.beside for row in rows if row.beside] == besides


def test_timm_computes_what_the_image_tower_does(model):
    peers._whole_torchvision()
    pytest.importorskip("timm")
    rows = list(peers.beside_timm(model, [limits.photo(64, seed) for seed in range(3)]))
    assert [row.beside for row in rows if row.beside] == ["timm, batch 8", "timm, batch 32"]


def test_sentence_transformers_computes_what_our_loader_does(tmp_path, monkeypatch):
    peers._whole_torchvision()
    pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(peers, "_LAYERS", 1)
    rows = list(peers.beside_sentence_transformers(TEXTS, [limits.photo(300, seed) for seed in range(3)], tmp_path))
    assert [row.beside for row in rows if row.beside] == ["sentence-transformers"] * 2


@pytest.mark.ray
def test_fixed_cost_of_ten_products(tmp_path, tiny_model, ray_session):
    write_products(tmp_path / "catalog", [items(12)])
    settings = ["ray.address=auto", "pool.gpus_per_actor=0"]
    whole, start = runs.fixed_cost(str(tmp_path / "catalog"), tiny_model, tmp_path, settings=settings, turns=1)
    assert (whole.unit, start.unit) == ("s", "s")
    assert start.rate < whole.rate


@pytest.mark.slow
@pytest.mark.ray
def test_ray_data_gives_the_vectors_that_the_model_does(tmp_path, model, tiny_model, ray_session):
    rows = items(5)
    write_products(tmp_path / "catalog", [rows[:3], rows[3:]])
    ray_data.write_tables(str(tmp_path / "catalog"), tiny_model, model.recipe.size, tmp_path / "out")
    inputs = runs.read_inputs(str(tmp_path / "catalog"))
    images = pq.read_table(tmp_path / "out" / "images")
    found = dict(zip(images["sha256"].to_pylist(), images["vector"].to_pylist(), strict=True))
    for data, vector in zip(inputs.images, model.embed_images(list(inputs.images)), strict=True):
        assert np.allclose(found[hashlib.sha256(data).hexdigest()], vector, atol=1e-5)
    assert images["thumbnail"].null_count == 0
    products = pq.read_table(tmp_path / "out" / "products")
    ray_data.write_vectors(str(tmp_path / "catalog"), tiny_model, model.recipe.size, tmp_path / "vectors")
    alone = pq.read_table(tmp_path / "vectors")
    texts = dict(zip(products["text"].to_pylist(), products["text_vector"].to_pylist(), strict=True))
    assert texts.keys() == set(inputs.texts) == set(alone["text"].to_pylist())
    for text, vector in zip(inputs.texts, model.embed_texts(list(inputs.texts)), strict=True):
        assert np.allclose(texts[text], vector, atol=1e-5)


@pytest.mark.slow
@pytest.mark.ray
def test_what_a_product_costs_by_products_and_by_actors(tmp_path):
    rows = list(scaling.by_products(tmp_path, [20, 40], turns=1))
    assert [row.beside for row in rows] == ["20 products"] * 4
    assert rows[0].ratio == 1.0
    assert rows[1].ratio == pytest.approx(rows[1].rate / rows[0].rate)  # products a second, so cost the other way
    assert 100 < rows[2].rate < 10_000  # MB of a driver and an actor with torch
    rows = list(scaling.by_actors(tmp_path, 20, [1, 2], turns=1))
    assert [row.what for row in rows] == [f"backfill of 20 products, actors: {n}" for n in (1, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.ray
def test_a_backfill_beside_its_towers(tmp_path, tiny_model, ray_session):
    write_products(tmp_path / "catalog", [items(8)])
    catalog = str(tmp_path / "catalog")
    found = list(
        runs.backfill_beside_towers(
            catalog, tiny_model, tmp_path, limit=5, settings=["ray.address=auto", "pool.gpus_per_actor=0"], turns=1
        )
    )
    assert [row.what for row in found] == ["whole backfill, 15 inputs, float32", "towers alone, float32"]
    assert found[0].ratio == pytest.approx(found[0].rate / found[1].rate)


def test_the_results_are_told_as_lines_json_and_a_page(tmp_path, capsys, tiny_model):
    write_products(tmp_path / "catalog", [items(3)])
    arguments = ["--out", str(tmp_path / "out"), "--parts", "decode", "--model", tiny_model]
    assert benchmark.main([*arguments, "--catalog", str(tmp_path / "catalog")]) == 0
    told = capsys.readouterr().out
    assert "x the decoder alone (aim 0.7)" in told
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [Row(**row).part for row in found["rows"]] == ["decode"] * (5 + 7 * len(limits.SIDES))
    assert "decode and preprocess, the catalog" in (tmp_path / "out" / "benchmark.html").read_text()
    assert benchmark.main([*arguments, "--parts", "nothing"]) == 2
    assert "--parts knows no 'nothing'" in capsys.readouterr().err
