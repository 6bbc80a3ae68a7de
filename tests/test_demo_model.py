"""The embedded model: small, in the published layout, and good at what it was trained for on products it never saw."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from jobs.measure_demo import measure, table
from pipeline.catalog.demo_products import CATALOG_SEED, TEST_SEED, TRAIN_SEED, VALIDATION_SEED
from pipeline.model.folder import resolve

TARGETS = {
    "avg": {"broad": 0.98, "fine": 0.95, "exact": 0.95},
    "image": {"broad": 0.95, "fine": 0.90, "exact": 0.90},
    "text": {"broad": 0.98, "fine": 0.90, "exact": 0.88},
}


def test_the_folder_is_small_and_of_the_published_layout() -> None:
    folder = resolve("demo")
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "canary.json"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "jina_clip"
    with safe_open(folder / "model.safetensors", "pt") as file:
        prefixes = {key.split(".")[0] for key in file.keys()}  # noqa: SIM118
    assert prefixes == {"text_model", "vision_model", "logit_scale"}


def test_no_seed_is_used_twice() -> None:
    assert len({TRAIN_SEED, VALIDATION_SEED, TEST_SEED, CATALOG_SEED}) == 4


def test_it_finds_unseen_products_and_the_untrained_towers_do_not() -> None:
    result = measure("demo", products=400, seed=VALIDATION_SEED, workers=2)
    for mode, least in TARGETS.items():
        # With 400 products a combination occurs about once, so fine hits run out: broad and exact stay meaningful.
        assert result["trained"][mode]["broad"] >= least["broad"] - 0.08, table(result)
        assert result["trained"][mode]["exact"] >= least["exact"] - 0.08, table(result)
    assert result["untrained"]["image"]["exact"] < 0.2
    assert result["chance"]["exact"] < 0.1


@pytest.mark.slow
def test_it_reaches_its_targets_on_eight_thousand() -> None:
    result = measure("demo", products=8000, seed=TEST_SEED, workers=2)
    print(table(result))
    for mode, targets in TARGETS.items():
        for name, least in targets.items():
            assert result["trained"][mode][name] >= least, table(result)
