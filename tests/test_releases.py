from __future__ import annotations

import threading
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from lance.dataset import MergeInsertBuilder

from pipeline.errors import QueryError, ReleaseRefused, RunError
from pipeline.store import releases as releases_module
from pipeline.store.commits import replace_all, replace_rows, restore
from pipeline.store.releases import Release, get_release, insert_row, list_releases, newest_release, now, publish
from pipeline.store.schemas import (
    TABLES,
    catalog_rows_schema,
    images_schema,
    partitions_schema,
    products_schema,
    rejects_schema,
    releases_schema,
)
from pipeline.store.tables import Database, append_row, ensure, write_rows

DIM = 4
SCHEMAS = {
    "products": products_schema(DIM),
    "images": images_schema(DIM),
    "rejects": rejects_schema(),
    "partitions": partitions_schema(),
    "catalog_rows": catalog_rows_schema(),
}


def _products(ids: list[str], title: str) -> pa.Table:
    rows = [{"product_id": i, "title": title, "n_images": 0, "has_text": True} for i in ids]
    return pa.Table.from_pylist(rows, schema=SCHEMAS["products"])


@pytest.fixture
def db(tmp_path: Path) -> Database:
    """All tables: products a to e, nothing else."""
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
    ensure(db, "releases", releases_schema())
    outcomes: list[bool] = []
    threads = [threading.Thread(target=lambda: outcomes.append(insert_row(db, _release(db, 1)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False, False, False, True]
    assert [release.release for release in list_releases(db)] == [1]


def test_a_lost_race_leaves_no_tag(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(releases_module, "insert_row", lambda *_: False)
        with pytest.raises(ReleaseRefused, match="another run published release 1"):
            publish(db, _release(db, 1), run_id="r1")
    assert not db.dataset("products").tags.list()
    publish(db, _release(db, 1), run_id="r1")
    with pytest.raises(ReleaseRefused, match="another run published release 1"):
        publish(db, _release(db, 1), run_id="r1")


def test_a_row_whose_answer_was_lost_is_looked_up(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    real = MergeInsertBuilder.execute

    def execute(*arguments: object) -> None:
        real(*arguments)
        raise OSError("connection reset")

    monkeypatch.setattr(MergeInsertBuilder, "execute", execute)
    publish(db, _release(db, 1), run_id="r1")
    assert list(db.dataset("products").tags.list()) == ["release-1"]


def test_only_what_the_run_wrote_is_published(db: Database) -> None:
    publish(db, _release(db, 1), run_id="r1")
    table = db.uri_of("products")
    lance.dataset(table).create_scalar_index("title", "BTREE")  # changes no row
    replace_rows(db, "products", {"product_id": pa.array(["a"])}, [], run_id="r2")
    mine = _release(db, 2)
    with pytest.raises(ReleaseRefused, match=r"not written by this run, but by someone else's Update of run r2"):
        publish(db, mine, run_id="r3")
    lance.write_dataset(_products(["z"], "other"), table, mode="append")
    with pytest.raises(ReleaseRefused, match=r"moved from version .* someone else writes"):
        publish(db, mine, run_id="r2")
    with pytest.raises(ReleaseRefused, match=r"by someone else's Append\."):
        publish(db, _release(db, 2), run_id="r2")
    assert [release.release for release in list_releases(db)] == [1]
    restore(db, newest_release(db).versions, run_id="r4")
    replace_rows(db, "products", {"product_id": pa.array(["b"])}, [], run_id="r4")
    publish(db, _release(db, 2), run_id="r4")
    assert set(_titles(db)) == set("acde")


def test_a_commit_on_top_of_anothers_is_told(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lance.LanceDataset.commit

    def commit(*arguments: object, **options: object) -> object:
        lance.write_dataset(_products(["z"], "other"), db.uri_of("products"), mode="append")
        return real(*arguments, **options)

    monkeypatch.setattr(lance.LanceDataset, "commit", commit)
    fragments = write_rows(db, "products", SCHEMAS["products"], _products(["f"], "new"), is_whole=False)
    with pytest.raises(RunError, match="someone else wrote to the table products"):
        replace_rows(db, "products", {"product_id": pa.array(["q"])}, fragments, run_id="r2")


def test_a_commit_whose_answer_was_lost_is_not_made_twice(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lance.LanceDataset.commit

    def commit(*arguments: object, **options: object) -> None:
        real(*arguments, **options)
        raise OSError("connection reset")

    monkeypatch.setattr(lance.LanceDataset, "commit", commit)
    before = db.latest_version("products")
    fragments = write_rows(db, "products", SCHEMAS["products"], _products(["b", "f"], "new"), is_whole=False)
    assert replace_rows(db, "products", {"product_id": pa.array(["b"])}, fragments, run_id="r2") == 6
    assert db.latest_version("products") == before + 1
    assert sorted(_titles(db)) == list("abcdef")


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
    assert list(restore(db, released.versions, run_id="r2")) == ["products"]
    assert set(_titles(db)) == set("abcde")
    assert restore(db, released.versions, run_id="r3") == {}, "what is the latest already costs no version"
    assert restore(db, {"products": db.latest_version("products")}, run_id="r3") == {}


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


def test_a_table_that_grows_takes_new_columns(tmp_path: Path) -> None:
    db = Database(str(tmp_path / "db"))
    old = pa.schema([pa.field("run_id", pa.string(), nullable=False)])
    new = old.append(pa.field("report", pa.string()))
    append_row(db, "runs", old, {"run_id": "a"})
    append_row(db, "runs", new, {"run_id": "b", "report": "told"})
    assert db.dataset("runs").to_table().to_pylist() == [
        {"run_id": "a", "report": None},
        {"run_id": "b", "report": "told"},
    ]
