from __future__ import annotations

import threading
from pathlib import Path

import lance
import pyarrow as pa
import pytest

from pipeline.errors import QueryError, ReleaseRefused
from pipeline.store.releases import Release, get_release, list_releases, newest_release, now, publish
from pipeline.store.schemas import TABLES, images_schema, products_schema, rejects_schema
from pipeline.store.tables import Database, append_row, replace_all, replace_rows, restore, write_rows

DIM = 4
SCHEMAS = {"products": products_schema(DIM), "images": images_schema(DIM), "rejects": rejects_schema()}


def _products(ids: list[str], title: str) -> pa.Table:
    rows = [{"product_id": i, "title": title, "n_images": 0, "has_text": True} for i in ids]
    return pa.Table.from_pylist(rows, schema=SCHEMAS["products"])


@pytest.fixture
def db(tmp_path: Path) -> Database:
    """Three tables: products a to e, nothing else."""
    database = Database(str(tmp_path / "db"))
    for table in TABLES:
        rows = _products(list("abcde"), "old") if table == "products" else SCHEMAS[table].empty_table()
        fragments = write_rows(database, table, SCHEMAS[table], rows, is_whole=True)
        replace_all(database, table, SCHEMAS[table], fragments, run_id="r1")
    return database


def _release(db: Database, number: int) -> Release:
    versions = {table: db.latest_version(table) for table in TABLES}
    parent = number - 1 or None
    return Release(number, parent, now(), versions, "demo", "m", "f", 0.5, {"text": {"kind": "exact"}}, {"a": 1}, {})


def _titles(db: Database) -> dict[str, str]:
    table = db.dataset("products").to_table()
    return dict(zip(table.column("product_id").to_pylist(), table.column("title").to_pylist(), strict=True))


def test_nothing_released_is_no_release(tmp_path: Path) -> None:
    assert newest_release(str(tmp_path / "none")) is None
    assert list_releases(str(tmp_path / "none")) == []


def test_a_release_reads_back_and_tags_its_versions(db: Database) -> None:
    written = publish(db, _release(db, 1), run_id="r1")
    assert newest_release(db.uri) == written
    assert get_release(db.uri, 1) == written
    for table in TABLES:
        assert list(db.dataset(table).tags.list()) == ["release-1"]
        assert db.dataset(table).tags.list()["release-1"]["version"] == written.versions[table]
    with pytest.raises(QueryError, match="no release 7; there are: 1"):
        get_release(db.uri, 7)


def test_one_of_many_writers_wins_a_number(db: Database) -> None:
    outcomes: list[str] = []

    def write(run: int) -> None:
        try:
            publish(db, _release(db, 1), run_id=f"r{run}")
            outcomes.append("won")
        except ReleaseRefused:
            outcomes.append("lost")

    threads = [threading.Thread(target=write, args=(run,)) for run in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost", "lost", "lost", "won"]
    assert [release.release for release in list_releases(db)] == [1]
    assert list(db.dataset("products").tags.list()) == ["release-1"]


def test_rows_are_replaced_in_one_commit(db: Database) -> None:
    before = db.latest_version("products")
    fragments = write_rows(db, "products", SCHEMAS["products"], _products(["b", "f"], "new"), is_whole=False)
    assert db.latest_version("products") == before, "fragments alone are not visible"
    ids = pa.array(["b", "c", "f"])
    replace_rows(db, "products", {"product_id": ids}, fragments, run_id="r2")
    assert db.latest_version("products") == before + 1
    assert _titles(db) == {"a": "old", "d": "old", "e": "old", "b": "new", "f": "new"}
    transaction = db.dataset("products").get_transactions(1)[0]
    assert transaction.transaction_properties == {"run_id": "r2"}


def test_all_rows_of_a_fragment_may_leave(db: Database) -> None:
    replace_rows(db, "products", {"product_id": pa.array(list("abcde"))}, [], run_id="r2")
    assert _titles(db) == {}


def test_restore_takes_back_what_was_not_released(db: Database) -> None:
    released = publish(db, _release(db, 1), run_id="r1")
    replace_rows(db, "products", {"product_id": pa.array(["a"])}, [], run_id="dead")
    restore(db, released.versions)
    assert set(_titles(db)) == set("abcde")
    version = db.latest_version("products")
    restore(db, {"products": version})
    assert db.latest_version("products") == version, "what is the latest already costs no version"


def test_the_key_is_known_to_lance(db: Database) -> None:
    dataset = lance.dataset(db.uri_of("products"))
    again = _products(["a"], "again")
    result = dataset.merge_insert("product_id").when_not_matched_insert_all().execute(again)
    assert result["num_inserted_rows"] == 0


def test_rows_appended_at_once_all_stay(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("n", pa.int64())])
    database = Database(str(tmp_path))
    threads = [threading.Thread(target=append_row, args=(database, "runs", schema, {"n": n})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(database.dataset("runs").to_table().column("n").to_pylist()) == [0, 1, 2, 3]
