"""The rejects job on real tables: counted, shown, and replayed after a repair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_catalog import Item, items, jpeg, write_products

from jobs.backfill import main as backfill
from jobs.rejects import describe_rows, main

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

SETTINGS = ["--set", "pool.gpus_per_actor=0", "--set", "max_reject_share=0.5"]


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_list_show_and_replay(tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    bad = Item("bad", "a text", None, [jpeg(1), b"broken"])
    products = [*items(3), bad, Item("blank", " ", None, [jpeg(2)])]
    catalog, db = write_products(tmp_path / "a", [products]), str(tmp_path / "db")
    run = ["--catalog", str(catalog), "--db", db, "--model", tiny_model, *SETTINGS, "--json"]
    assert backfill(run) == 0
    capsys.readouterr()

    assert main(["list", "--db", db, "--json"]) == 0
    assert told(capsys)["reasons"] == {"image_not_an_image": 1, "text_empty": 1}
    assert main(["show", "--db", db, "--reason", "text_empty", "--json"]) == 0
    (row,) = told(capsys)["rejects"]
    assert (row["product_id"], row["input"], row["row"]) == ("blank", "text", 4)
    assert main(["show", "--db", db, "--product", "bad"]) == 0
    shown = capsys.readouterr().out
    assert "bad  image/1  image_not_an_image: " in shown
    assert f"row 3 of {catalog}" in shown
    assert main(["list", "--db", db]) == 0
    assert "2 rejects in release 1" in capsys.readouterr().out

    bad.images = [jpeg(1), jpeg(3)]
    write_products(catalog, [products])
    assert main(["replay", *run]) == 0
    replayed = told(capsys)
    assert (replayed["release"], replayed["embedded"], replayed["reused"], replayed["rejected"]) == (2, 1, 3, 1)
    assert main(["list", "--db", db, "--json"]) == 0
    assert told(capsys)["reasons"] == {"text_empty": 1}
    assert main(["list", "--db", db, "--release", "1", "--json"]) == 0
    assert told(capsys)["total"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "--db", "nowhere"], "nothing is released in nowhere"),
        (["show", "--db", "nowhere", "--reason", "ugly"], "there is no reason 'ugly'; the reasons are missing_id"),
        (["sing"], "invalid choice"),
    ],
)
def test_wrong_arguments_end_with_a_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2
    told_so = capsys.readouterr().err
    assert said in told_so
    assert "Traceback" not in told_so


def test_what_a_catalog_said_stays_on_its_line() -> None:
    nasty = "p\x1b]0;owned\x07\n1 of 1\u202e"
    row = {"product_id": nasty, "input": "text", "reason": "text_empty", "detail": nasty, "row": 1}
    told = {"rejects": [row | {"partition": nasty, "run_id": "r", "attempts": 1}], "total": 1, "release": 1}
    lines = describe_rows(told).split("\n")
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
