"""The gate over two releases that a test made: what it passes, what it refuses, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest
from query_tables import facts, make_db, random_db, release, unit

from jobs import evaluate
from pipeline.config import Config, GateConfig, ReleaseConfig, load_config
from pipeline.errors import ConfigError, QueryError, ReleaseRefused
from pipeline.evaluate.frozen import frozen_path, frozen_queries
from pipeline.evaluate.gate import compare, gate
from pipeline.model import load_model
from pipeline.query.encoder import Encoder
from pipeline.store.releases import Release, get_release
from pipeline.store.tables import Database

SETTINGS = GateConfig(on=True, queries=300)
GROUPS = 6
COUNT = 180


def catalog() -> dict[str, list[Any]]:
    """Six categories, whose names are in the titles."""
    columns = {name: values[:COUNT] for name, values in facts(COUNT).items()}
    kinds = ["dress", "coat", "shirt", "apple", "wool", "blue"]
    columns["broad_category"] = [kinds[i % GROUPS] for i in range(COUNT)]
    columns["fine_category"] = [f"{kinds[i % GROUPS]} {i // GROUPS % 2}" for i in range(COUNT)]
    columns["title"] = [f"kind {'red' if i % 4 else 'hello'} {kinds[i % GROUPS]}" for i in range(COUNT)]
    return columns


@pytest.fixture(scope="module")
def model():
    return load_model("demo", towers=("text",))


@pytest.fixture
def db(tmp_path, model) -> Database:
    """One release, in which texts lie where queries for them do and images near them."""
    columns = catalog()
    text = model.embed_texts(columns["title"])
    image = unit(text + 0.02 * np.random.default_rng(0).normal(size=text.shape))
    path = make_db(tmp_path / "db", text=text, image=image, columns=columns)
    release(path, model="demo", model_id=model.model_id)
    return Database(path)


def rewritten(db: Database, change: Any = lambda table: table, number: int = 2) -> Release:
    """A further release whose products went through `change`."""
    table = lance.dataset(db.uri_of("products")).to_table()
    lance.write_dataset(change(table), db.uri_of("products"), mode="overwrite")
    first = get_release(db, 1)
    release(db.uri, number, model="demo", model_id=first.model_id)
    return get_release(db, number)


def shuffled(share: float, *names: str) -> Any:
    """Vectors of a share of the products, dealt out among them anew."""

    def change(table):
        rows = np.arange(len(table))
        chosen = np.random.default_rng(1).permutation(len(table))[: int(share * len(table))]
        rows[chosen] = np.roll(chosen, 1)
        for name in names:
            place = table.schema.names.index(name)
            table = table.set_column(place, table.schema.field(name), table.column(name).take(rows))
        return table

    return change


def test_the_same_again_passes_with_nothing_changed(db):
    verdict = compare(db, get_release(db, 1), rewritten(db, lambda table: table.slice(50).combine_chunks()), SETTINGS)
    assert verdict.is_passed
    assert (verdict.common, verdict.added, verdict.gone) == (130, 0, 50)
    assert [line.difference.mean for line in verdict.lines] == [0.0] * 6
    assert [(line.mode, line.level) for line in verdict.lines] == [
        (mode, level) for level in ("broad", "fine") for mode in ("text", "image", "avg")
    ]
    assert verdict.sentence.startswith("search is not worse than in release 1: ")


def test_shuffled_images_are_refused_by_the_image_mode_and_its_categories(db):
    new = rewritten(db, shuffled(0.1, "image_vector"))
    verdict = compare(db, get_release(db, 1), new, SETTINGS)
    failed = {(line.mode, line.level) for line in verdict.lines if not line.is_passed}
    assert failed == {("image", "broad"), ("image", "fine")}
    with pytest.raises(ReleaseRefused) as refused:
        gate(Config(db=db.uri, release=ReleaseConfig(gate=SETTINGS)), get_release(db, 1), new)
    said = str(refused.value)
    assert "image mode, broad precision@10" in said
    assert "(worst: " in said
    assert "text mode" not in said
    assert "release.gate.margin" in said


def test_the_margin_decides(db):
    new = rewritten(db, shuffled(0.1, "image_vector"))
    wide = GateConfig(on=True, queries=300, margin=0.5)
    kept = gate(Config(db=db.uri, release=ReleaseConfig(gate=wide)), get_release(db, 1), new)
    assert kept["is_passed"]
    assert json.loads(json.dumps(kept))["lines"][1]["difference"]["mean"] < 0


def test_new_products_are_reported_and_not_gated(db):
    first = get_release(db, 1)
    less = rewritten(db, lambda table: table.slice(60))
    frozen_queries(db, less, SETTINGS)
    verdict = compare(db, less, first, SETTINGS)  # the older one has 60 products more
    assert verdict.is_passed
    assert verdict.added == 60
    assert 0.2 < verdict.added_hits["text"] < 0.8  # a third of all, and ties go to their keys
    assert compare(db, first, less, SETTINGS).added_hits == {"text": 0.0, "image": 0.0, "avg": 0.0}


def test_too_few_queries_are_said(db):
    few = GateConfig(on=True, queries=4)
    verdict = compare(db, get_release(db, 1), rewritten(db, shuffled(0.02, "image_vector")), few)
    unsure = [line for line in verdict.lines if not line.is_passed and line.difference.mean > -few.margin]
    assert all("too few queries" in line.sentence(few.margin) for line in unsure)


def test_queries_are_frozen_once_and_answer_without_the_model(db, monkeypatch):
    first = get_release(db, 1)
    frozen = frozen_queries(db, first, SETTINGS)
    assert Path(frozen_path(db, first)).is_file()
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("a model was asked"))
    again = frozen_queries(db, first, GateConfig(on=True, queries=7, seed=9))  # what is frozen counts
    assert again.queries == frozen.queries
    assert np.array_equal(again.vectors, frozen.vectors)
    assert again.model_id == frozen.model_id == first.model_id
    assert compare(db, first, rewritten(db), SETTINGS).is_passed  # of the same model: its vectors are known


def test_a_damaged_file_of_frozen_queries_is_said(db):
    first = get_release(db, 1)
    frozen_queries(db, first, SETTINGS)
    Path(frozen_path(db, first)).write_bytes(b"PAR1 nothing")
    with pytest.raises(QueryError, match="remove the file"):
        frozen_queries(db, first, SETTINGS)


def test_a_catalog_without_categories_cannot_be_gated(tmp_path):
    columns = {name: values[:20] for name, values in facts(20).items()} | {"broad_category": [None] * 20}
    vectors = unit(np.random.default_rng(0).normal(size=(20, 16)))
    release(path := make_db(tmp_path, text=vectors, image=vectors, columns=columns))
    only = get_release(path, 1)
    with pytest.raises(ReleaseRefused, match="cannot be told: No product has a broad_category"):
        gate(Config(db=path, release=ReleaseConfig(gate=SETTINGS)), only, only)


@pytest.mark.parametrize(
    ("sets", "on", "margin"),
    [([], False, 0.01), (["release.gate=true"], True, 0.01), (["release.gate.on=true"], True, 0.01),
     (["release.gate=true", "release.gate.margin=0.02"], True, 0.02),
     (["release.gate.margin=0.02", "release.gate=true"], True, 0.02),
     (["release.gate.margin=0.02", "release.gate=false"], False, 0.02)],
)  # fmt: skip
def test_the_gate_is_switched_by_a_word_or_a_section(sets, on, margin):
    found = load_config(None, sets).release.gate
    assert (found.on, found.margin) == (on, margin)


def test_the_gate_in_a_file(tmp_path):
    (tmp_path / "a.toml").write_text("[release]\ngate = true\n")
    assert load_config(str(tmp_path / "a.toml"), ["release.gate.queries=50"]).release.gate == GateConfig(True, 0.01, 50)
    with pytest.raises(ConfigError, match="gate is a section"):
        load_config(None, ["release.gate=maybe"])
    with pytest.raises(ConfigError, match="margin takes a number"):
        load_config(None, ["release.gate.margin=2"])


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    try:
        code = evaluate.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


def test_against_on_the_command_line(db, capsys):
    rewritten(db, shuffled(0.1, "image_vector"))
    code, out, _ = run(capsys, "--db", db.uri, "--against", 1, "--queries", 300)
    assert code == 1
    assert "image, broad" in out
    assert "FAILED" in out
    assert "passed" in out
    code, out, _ = run(capsys, "--db", db.uri, "--against", 1, "--margin", 0.9, "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["is_passed"] is True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--against", 1], "is the release itself"), (["--against", 7], "no release 7"), (["--qrels", "x"], "query-file"),
     (["--recipe", "best"], "no recipe 'best'"), (["--against", 1, "--query-file", "x"], "frozen queries"),
     (["--release", 5], "release 5"), (["--query-file", "none.csv"], "cannot be read"), (["--queries", 0], "from 1"),
     (["--seed", -1], "from 0")],
)  # fmt: skip
def test_what_cannot_be_measured_is_a_sentence(db, capsys, arguments, said):
    code, _, err = run(capsys, "--db", db.uri, *arguments)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_a_database_that_is_none_and_a_remote_one(tmp_path, capsys):
    assert run(capsys, "--db", tmp_path / "none")[0] == 2
    code, _, err = run(capsys, "--db", "s3://bucket/db")
    assert code == 2
    assert "--out" in err


def test_the_model_that_is_not_at_hand_is_named(tmp_path, capsys):
    path = random_db(tmp_path / "db")
    code, _, err = run(capsys, "--db", path)
    assert code == 2
    assert "model" in err
