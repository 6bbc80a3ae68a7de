"""The command line of releases: list, show, publish, rollback, prune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lance
import pytest
from store_tables import contents, load, rows, write

from jobs import release
from pipeline.store.lease import Lease, read_lease
from pipeline.store.releases import list_releases, newest_release
from pipeline.store.schemas import runs_schema
from pipeline.store.tables import Database, append_row

IDS = [f"p{number}" for number in range(8)]


@pytest.fixture
def db(tmp_path: Path) -> Database:
    """Two releases; the first one's run is known."""
    database = Database(str(tmp_path / "db"))
    first = load(database, "r1", IDS)
    load(database, "r2", ["p0", "p9"], seed=4)
    run = {"run_id": "r1", "job": "backfill", "status": "released", "started_at": first.created_at, "seconds": 1.0,
           "release": 1}  # fmt: skip
    append_row(database, "runs", runs_schema(), run)
    return database


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = release.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out.splitlines()[-1])


def test_releases_are_listed_and_shown(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = run_json(capsys, "list", "--db", db.uri)
    assert (code, told["release"]) == (0, 2)
    assert [(r["release"], r["products"], r["images"], r["made_by"]) for r in told["releases"]] == [
        (2, 9, 18, "unknown"),
        (1, 8, 16, "backfill r1"),
    ]
    code, out, _ = run(capsys, "list", "--db", db.uri)
    assert (code, [line[:6] for line in out.splitlines()]) == (0, ["*    2", "     1"])
    code, told = run_json(capsys, "show", "1", "--db", db.uri)
    assert code == 0
    assert told["checks"]["distinct_product_ids"] == 8
    assert told["index"]["avg"]["kind"] == "exact"
    assert told["versions"] == list_releases(db)[0].versions
    code, out, _ = run(capsys, "show", "--db", db.uri)
    assert code == 0
    assert "release                    2" in out
    assert "recall_at_10             text 1.0, image 1.0, avg 1.0" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "9", "--db", "{}"], "there is no release 9; there are: 1, 2"),
        (["list", "--db", "{}/none"], "there is no database at"),
        (["rollback", "--db", "{}", "--to", "7"], "there is no release 7"),
        (["rollback", "--db", "{}", "--to", "0"], "takes a whole number from 1"),
        (["prune", "--db", "{}", "--keep", "1"], "--younger-than-days"),
        (["prune", "--db", "{}", "--keep", "1", "--younger-than-days", "nan"], "takes a number from 0"),
        (["publish", "--db", "{}", "--versions", "product=7"], "takes products=7,images=5,rejects=3"),
        (["publish", "--db", "{}", "--versions", "products=99"], "--versions products=99: the table has 1, 2"),
        (["prune"], "--db"),
        (["delete", "--db", "{}"], "invalid choice: 'delete'"),
    ],
)  # fmt: skip
def test_wrong_arguments_end_with_a_sentence(
    db: Database, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    filled = [argument.format(db.uri) for argument in arguments]
    code, told = run_json(capsys, *filled)
    assert (code, said in told["error"]) == (2, True), told
    assert [release.release for release in list_releases(db)] == [1, 2]
    code, _, err = run(capsys, *filled)
    assert code == 2
    assert err.startswith("error: ")


def test_back_and_forward(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    first = contents(db, dict(list_releases(db)[0].versions))
    code, told = run_json(capsys, "rollback", "--db", db.uri)
    assert (code, told["release"], told["made_by"], told["released"]) == (0, 3, "rollback to 1", True)
    assert contents(db)["products"].equals(first["products"])
    code, out, _ = run(capsys, "rollback", "--db", db.uri, "--to", 2)
    assert (code, out) == (0, f"release 4 in {db.uri}: rollback to 2\n")
    assert db.dataset("products").count_rows() == 9
    assert read_lease(db) is None


def test_the_tables_are_put_right(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = run_json(capsys, "publish", "--db", db.uri)
    assert (code, told["release"], told["restored"]) == (0, 2, {})
    write(db, "dead", rows(["p0"], seed=9))
    db.dataset("images").tags.delete("release-2")
    code, out, _ = run(capsys, "publish", "--db", db.uri)
    assert code == 0
    assert "put right: tagged images release-2; restored products" in out
    assert "release 2 is what readers get" in out
    assert run(capsys, "publish", "--db", db.uri)[1].startswith("there was nothing to put right")


def test_versions_that_someone_wrote_are_verified_and_released(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    products = lance.dataset(db.uri_of("products"))
    version = lance.write_dataset(
        products.to_table(filter="product_id = 'p1'"), db.uri_of("products"), mode="append"
    ).version
    code, told = run_json(capsys, "publish", "--db", db.uri, "--versions", f"products={version}")
    assert code == 1
    assert "1 rows of products share their product_id (p1)" in told["error"]
    assert [release.release for release in list_releases(db)] == [1, 2]
    first = list_releases(db)[0].versions
    given = ",".join(f"{table}={version}" for table, version in first.items())
    code, told = run_json(capsys, "publish", "--db", db.uri, "--versions", given)
    assert (code, told["release"], told["products"], told["made_by"]) == (0, 3, 8, "publish of given versions")
    newest = newest_release(db)
    assert newest is not None
    assert newest.versions == {table: db.latest_version(table) for table in first}
    assert newest.fingerprint == "f"


def test_old_releases_go(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    keep = ("prune", "--db", db.uri, "--keep", 1, "--younger-than-days")
    young = run_json(capsys, *keep, 1)[1]
    assert (young["releases"], young["kept"]) == ([], [1, 2])
    code, told = run_json(capsys, *keep, 0, "--dry-run")
    assert (code, told["releases"], told["kept"], told["dry_run"]) == (0, [1], [2], True)
    code, out, _ = run(capsys, *keep, 0)
    assert code == 0
    assert out.startswith("gone       1\nkept       2\nfreed      ")
    assert [release.release for release in list_releases(db)] == [2]


@pytest.mark.parametrize(
    "arguments",
    [["publish"], ["rollback"], ["rollback", "--wait-s", "0.5"], ["prune", "--keep", "1", "--younger-than-days", "0"]],
)
def test_a_held_database_is_left_alone(db: Database, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with Lease(db, run_id="busy", job="backfill") as lease:
        lease.acquire()
        code, told = run_json(capsys, *arguments, "--db", db.uri)
        assert (code, told["kind"]) == (1, "LeaseHeld")
        assert "another run holds the database" in told["error"]
        assert "backfill busy on host" in told["error"]
        lease.check()
        assert run(capsys, "list", "--db", db.uri)[0] == 0, "looking needs no lease"
    assert [release.release for release in list_releases(db)] == [1, 2]
