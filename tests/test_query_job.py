"""`python -m jobs.search` on a small database with a tiny model."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile_strings import HOSTILE
from model_folder import write_folder
from query_tables import facts, jpeg, make_db, release

from jobs.cli import start_log
from jobs.search import main, parse_conditions, table
from pipeline.errors import QueryError
from pipeline.model import canary, load_model
from pipeline.query import Searcher
from pipeline.records import Hit
from pipeline.shown import as_json

TITLES = ["red dress", "blue coat \x1b[31m\x07", "wool shirt", "red coat", "blue dress", "wool dress"]


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    model = load_model(str(write_folder(folder / "model")))
    canary.write(model)  # or a warning says that there is none
    texts = [title.split(" \x1b")[0] for title in TITLES]
    image = model.embed_images([jpeg((i * 40, 255 - i * 40, i * i * 9)) for i in range(6)])
    columns = {**facts(6), "title": TITLES, "price": [10.0, 20.0, 30.0, None, 50.0, 60.0]}
    path = make_db(folder / "db", text=model.embed_texts(texts), image=image, columns=columns)
    release(path, model=str(folder / "model"), model_id=model.model_id)
    return path


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_table_of_hits(db, capsys):
    code, out, err = run(capsys, "blue coat", "--db", db, "--mode", "text", "--k", 3)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "query to description (text)"
    assert lines[1].split() == ["rank", "score", "product_id", "title", "category"]
    assert lines[2].split()[:3] == ["1", "1.0000", "p00001"]
    assert "\x1b" not in out
    assert "\\x1b[31m\\x07" in out


def test_json_hits(db, capsys):
    code, out, _ = run(capsys, "red dress", "--db", db, "--mode", "text", "--k", 2, "--json")
    hits = json.loads(out)
    assert code == 0
    assert [hit["rank"] for hit in hits] == [1, 2]
    assert hits[0]["product_id"] == "p00000"
    assert hits[0]["cluster"] is None
    assert hits[0]["fields"]["price"] == 10.0


def test_json_knows_no_nan(db, capsys, tmp_path):
    columns = {name: values[:3] for name, values in facts(3).items()} | {"price": [float("nan"), float("inf"), 1.0]}
    vectors = np.eye(3, 16, dtype=np.float32)
    release(path := make_db(tmp_path / "db", text=vectors, image=vectors, columns=columns))
    first = Searcher.open(path).search(vectors[0], k=3)
    assert [hit.fields["price"] for hit in first][2] == 1.0
    assert json.loads(as_json([dict(hit.fields) for hit in first]))[0]["price"] is None
    _, out, _ = run(capsys, "red dress", "--db", db, "--json")
    assert json.loads(out, parse_constant=pytest.fail)


def test_what_cannot_be_read_is_a_sentence_and_an_object(capsys, tmp_path):
    folder = tmp_path / "model"
    model = load_model(str(write_folder(folder)))
    canary.write(model)
    columns = {name: values[:3] for name, values in facts(3).items()}
    vectors = model.embed_texts(["red", "blue", "wool"])
    path = make_db(tmp_path / "db", text=vectors, image=vectors, columns=columns)
    release(path, model=str(folder), model_id=model.model_id)
    for file in (tmp_path / "db" / "products.lance" / "data").iterdir():
        file.unlink()
    code, out, err = run(capsys, "red dress", "--db", path, "--json")
    assert code == 2
    assert "cannot be read any more" in json.loads(out)["error"]
    assert "Traceback" not in err
    code, _, err = run(capsys, "red dress", "--db", "s3://")
    assert code == 2
    assert err.startswith("error: ")


def test_all_modes_diversified_with_a_sheet(db, capsys, tmp_path):
    sheet = tmp_path / "sheet.html"
    code, out, _ = run(capsys, "red", "--db", db, "--mode", "all", "--diversify", "--json", "--sheet", sheet)
    lists = json.loads(out)
    assert code == 0
    assert list(lists) == ["text", "image", "avg", "diversified"]
    assert {hit["cluster"] for hit in lists["avg"]} == {None}
    assert {hit["cluster"] for hit in lists["diversified"]} <= {None, *range(5)}
    assert {hit["cluster"] for hit in lists["diversified"]} != {None}
    text = sheet.read_text()
    assert text.count("<figure>") == sum(map(len, lists.values()))
    assert text.count("mean distance of two images") == 4
    assert text.count("50 candidates, 5 clusters · rank correlation with the original order") == 1
    code, out, _ = run(capsys, "red", "--db", db, "--mode", "all", "--sheet", tmp_path / "sheet.png")
    assert out.count("query to") == 3
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("display", ["", ":0"])
def test_a_sheet_is_opened_where_there_is_a_screen(db, capsys, monkeypatch, display):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    code, out, _ = run(capsys, "red", "--db", db, "--open")
    sheet = Path(out.split("contact sheet: ")[1].strip())
    assert code == 0
    assert "<figure>" in sheet.read_text()
    assert opened == ([sheet.as_uri()] if display else [])


def test_more_of_one_thing_and_less_of_another(db, capsys, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(jpeg((10, 20, 30)))
    arguments = ["--db", db, "--mode", "text", "--k", 6, "--image", tmp_path / "photo.jpg"]
    code, out, _ = run(capsys, "red dress", *arguments, "--mix", "blue=0.5", "--mix", "wool=-0.25", "--json")
    assert (code, len(json.loads(out))) == (0, 6)
    code, out, err = run(capsys, "red", *arguments, "--mix", "blue")
    assert code == 2
    assert "TEXT=WEIGHT" in err


def test_a_search_that_explains_itself(db, capsys):
    more = ["--diversify", "--method", "mmr", "--collapse-duplicates", "0.01", "--where", "price>5"]
    code, out, _ = run(capsys, "red dress", "--db", db, "--mode", "text", "--explain", *more)
    assert code == 0
    assert "rank correlation" in out
    assert "filter: 5 products pass" in out
    assert "vectors compared" in out


def test_an_image_in_place_of_words(db, capsys, tmp_path):
    (tmp_path / "q.jpg").write_bytes(jpeg((80, 175, 36)))
    code, out, _ = run(capsys, "--image", tmp_path / "q.jpg", "--db", db, "--mode", "image", "--json")
    assert code == 0
    assert json.loads(out)[0]["product_id"] == "p00002"


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["price<30"], {0, 1}),
        (["price <= 30", "price!=20"], {0, 2}),
        (["price>=50"], {4, 5}),
        (["title~dress"], {0, 4, 5}),
        (["title=red dress"], {0}),
        (["broad_category=dress", "price>5"], {0}),
        (["on_sale=true"], {2, 4}),
        (["listed<2026-01-03"], {1}),
        (["Shop name=shop 2"], {2}),
        (["title=' OR '1'='1"], set()),
        (["tags~silk"], {2}),
        (["tags~silk", "title=wool shirt"], {2}),
        (["tags~' OR '1'='1"], set()),
        (["sizes~36", "sizes~37"], {2, 3}),
    ],
)
def test_conditions(db, capsys, conditions, expected):
    options = [option for condition in conditions for option in ("--where", condition)]
    code, out, err = run(capsys, "red", "--db", db, "--json", *options)
    assert (code, err) == (0, "")
    assert {int(hit["product_id"][1:]) for hit in json.loads(out)} == expected


def test_no_condition_is_read_as_anything_else(db):
    searcher = Searcher.open(db)
    for text in HOSTILE:
        for column, sign, operator in (
            ("title", "=", "eq"),
            ("title", "!=", "ne"),
            ("title", "~", "contains"),
            ("tags", "~", "contains"),
        ):
            assert parse_conditions([f"{column}{sign}{text}"], searcher) == {
                "and": [{column: {operator: text.strip()}}]
            }
        for column in (text, f"title {text}"):
            if re.split("[=!<>~]", column)[0].strip() != "title":
                with pytest.raises(QueryError):
                    parse_conditions([f"{column} =1"], searcher)


@pytest.mark.parametrize("text", ["x' OR '1'='1", "\\' OR 1=1 --", "x\nx", "%", "\u202e'", "_rowid >= 0", "'" * 5001])
def test_hostile_values_find_what_is_called_so(db, capsys, text):
    for condition in (f"title={text}", f"title~{text}", f"tags~{text}"):
        code, out, err = run(capsys, "red", "--db", db, "--json", "--where", condition, "--where", "price>0")
        assert (code, err) == (0, "")
        assert [hit["product_id"] for hit in json.loads(out)] == (
            ["p00004"] if condition == "tags~x' OR '1'='1" else []
        )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "query text, --image FILE, or both"),
        (["red", "--image", "x.jpg"], "x.jpg cannot be read"),
        (["--image", "none.jpg"], "cannot be read"),
        ([" "], "empty"),
        (["red", "--k", "0"], "k is a whole number"),
        (["red", "--k", "-1"], "k is a whole number"),
        (["red", "--k", "1000000000"], "reach to 10000"),
        (["red", "--mode", "hybrid", "--k", "201"], "reach to 200"),
        (["red", "--release", "9" * 40], "no release 9999"),
        (["red\udcff"], "half of a surrogate pair"),
        (["x" * 20_001], "20001 characters"),
        (["red", "--device", "tpu"], "device must be cpu or cuda"),
        (["red", "--release", "7"], "no release 7"),
        (["red", "--where", "price"], "no condition"),
        (["red", "--where", "price<cheap"], "finite number"),
        (["red", "--where", "colour=red"], "No column 'colour'"),
        (["red", "--where", "sizes~x"], "finite number"),
        (["red", "--where", "sizes~3000000000"], "list of int32, which cannot hold 3000000000"),
        (["red", "--where", "tags=silk"], "only `contains` and `is_null`"),
        (["red", "--where", "colour\x1b]0;x\x07=red"], "No column 'colour\\x1b]0;x\\x07'"),
        (["red", "--diversify", "--clusters", "0"], "clusters is a whole number"),
        (["red", "--sheet", "x.gif"], "html"),
    ],
)
def test_errors_are_one_sentence_and_exit_two(db, capsys, arguments, sentence):
    code, out, err = run(capsys, *arguments, "--db", db)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1
    code, out, _ = run(capsys, *arguments, "--db", db, "--json")
    assert sentence in json.loads(out)["error"]


@pytest.mark.parametrize("option", [("--method", "mmr"), ("--trade-off", 0.7), ("--clusters", 3), ("--candidates", 9)])
def test_options_of_a_reordering_want_one(db, capsys, option):
    code, _, err = run(capsys, "red dress", "--db", db, *option)
    assert code == 2
    assert f"{option[0]} says how --diversify reorders" in err
    assert run(capsys, "red dress", "--db", db, "--diversify", *option)[0] == 0


def test_nothing_that_is_printed_steers_the_terminal(db, capsys, tmp_path):
    nasty = "\x1b]0;owned\x07\u202e\x9b31m"
    for arguments in (
        ["red", "--sheet", tmp_path / f"{nasty}.html"],
        ["red", "--sheet", tmp_path / nasty / "s.html"],
        ["red", "--sheet", f"s{nasty}"],
        [nasty, "--explain", "--diversify", "--where", "price>1"],
        ["red", "--where", f"{nasty}=1"],
        ["red", "--where", f"price={nasty}"],
        ["red", "--where", nasty],
        ["red", "--mix", nasty],
        ["red", "--model", nasty],
        ["--image", nasty],
        ["red\udcff"],
    ):
        code, out, err = run(capsys, *arguments, "--db", db)
        assert code in (0, 2)
        for line in (out + err).split("\n"):
            assert line.isprintable(), arguments
    assert main(["red", "--db", f"/none/{nasty}"]) == 2
    assert capsys.readouterr().err.strip().isprintable()
    for arguments in (["red", nasty], ["red", "--mode", nasty]):
        with pytest.raises(SystemExit, match="2"):
            main([*arguments, "--db", db])
        assert capsys.readouterr().err.strip().isprintable()


def test_titles_and_categories_are_shown_on_their_own_line():
    nasty = "a\nrank 1  \x1b[2J\x1b]8;;http://x\x07b\u202e\u2066\x9b\r\x08"
    fields = {"title": nasty, "broad_category": nasty, "fine_category": "x"}
    lines = table([Hit(nasty, 0.5, 1, fields)], width=200).split("\n")
    assert len(lines) == 2
    assert lines[1].isprintable()
    assert "\\x1b[2J" in lines[1]
    assert "\\u202e\\u2066" in lines[1]


def test_the_log_shows_escapes(capsys):
    start_log("info")
    logging.getLogger("pipeline.x").warning("the partition %s is bad", "a\x1b[31m\u202e\nb")
    assert capsys.readouterr().err.endswith("WARNING the partition a\\x1b[31m\\u202e b is bad\n")


def test_as_a_process_where_nothing_is_released(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.search", "red", "--db", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: Nothing is released in")


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_nothing_released_and_nothing_in_it(tmp_path, capsys, as_json):
    code, out, err = run(capsys, "red", "--db", tmp_path, *as_json)
    assert code == 2
    assert err.startswith("error: Nothing is released in")
    assert ("Nothing is released" in json.loads(out)["error"]) if as_json else out == ""
    model = load_model(str(write_folder(tmp_path / "model")))
    none = np.ones((0, model.card.dim), np.float32)
    path = make_db(tmp_path / "db", text=none, image=none, columns={name: [] for name in facts(0)})
    release(path, model=str(tmp_path / "model"), model_id=model.model_id)
    sheet = tmp_path / "s.html"
    code, out, _ = run(capsys, "red", "--db", path, "--mode", "all", "--diversify", "--sheet", sheet, *as_json)
    assert code == 0
    nothing = {"text": [], "image": [], "avg": [], "diversified": []}
    assert (json.loads(out) == nothing) if as_json else (out.count("nothing was found") == 4)
    assert sheet.read_text().count("Nothing was found.") == 4


def test_a_narrow_terminal_cuts_titles():
    lines = table([Hit("p1", 0.5, 1, {"title": "long " * 40, "broad_category": "dress"}, 0)], width=70).splitlines()
    assert len(lines[1]) <= 70
    assert "…" in lines[1]
    assert "cluster" in lines[0]
    assert table([], width=70) == "nothing was found"
