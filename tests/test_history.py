"""Recovery, rollback and pruning; and a crash at every step of each, after which nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from lance.dataset import MergeInsertBuilder, Tags
from store_tables import SCHEMAS, contents, load, rows, write

from pipeline.errors import QueryError, ReleaseRefused
from pipeline.store.commits import replace_rows
from pipeline.store.history import prune, rollback
from pipeline.store.recovery import Recovery, recover
from pipeline.store.releases import insert_row, list_releases, newest_release, publish
from pipeline.store.schemas import TABLES
from pipeline.store.tables import Database, write_rows

IDS = [f"p{number}" for number in range(12)]


class Crash(BaseException):
    """The process dies here."""


STEPS = ((lance.LanceDataset, "commit"), (lance.LanceDataset, "delete"), (lance.LanceDataset, "cleanup_old_versions"),
         (MergeInsertBuilder, "execute"), (Tags, "create"), (Tags, "delete"), (Tags, "update"))  # fmt: skip


@contextmanager
def crashing(at: int, *, after: bool) -> Iterator[None]:
    """Die before or after the call number `at` of those that change a database."""
    calls = 0
    real = {(owner, name): getattr(owner, name) for owner, name in STEPS}

    def stub(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at and not after:
                raise Crash
            result = method(*arguments, **options)
            if calls == at:
                raise Crash
            return result

        return call

    try:
        for (owner, name), method in real.items():
            is_static = isinstance(owner.__dict__[name], staticmethod)
            setattr(owner, name, staticmethod(stub(method)) if is_static else stub(method))
        yield
    finally:
        for (owner, name), method in real.items():
            setattr(owner, name, staticmethod(method) if name == "commit" else method)


def survive(db: Database, step: Callable[[], object], check: Callable[[], None]) -> int:
    """Crash before the first step and after each of them, look, and go on; returns how often it crashed."""
    for crashes in range(60):
        try:
            with crashing(max(1, crashes), after=crashes > 0):
                step()
        except Crash:
            check()
        else:
            return crashes
    raise AssertionError("it never ends")


@pytest.fixture
def db(tmp_path: Path) -> Database:
    """Three releases: 12 products, 4 of them changed, 2 more added."""
    database = Database(str(tmp_path / "db"))
    load(database, "r1", IDS)
    load(database, "r2", IDS[:4], seed=10, title="changed")
    load(database, "r3", ["p20", "p21"], seed=20)
    return database


def assert_same(db: Database, expected: dict[str, pa.Table], versions: dict[str, int] | None = None) -> None:
    found = contents(db, versions)
    for name in TABLES:
        assert found[name].equals(expected[name]), name


def assert_clean(db: Database) -> None:
    """Every release has its tags and can be read, no other tag is there, and the latest versions are the release's."""
    releases = list_releases(db)
    for table in TABLES:
        tags = db.dataset(table).tags.list()
        assert {name: tag["version"] for name, tag in tags.items()} == {
            f"release-{release.release}": release.versions[table] for release in releases
        }
    for release in releases:
        contents(db, dict(release.versions))
    assert_same(db, contents(db, dict(releases[-1].versions)))


def assert_no_orphans(db: Database) -> None:
    """Every data file belongs to a release."""
    for table in TABLES:
        named = {
            file.path
            for release in list_releases(db)
            for fragment in db.dataset(table, release.versions[table]).get_fragments()
            for file in fragment.metadata.files
        }
        assert {path.name for path in Path(db.uri_of(table), "data").iterdir()} == named


def test_nothing_is_put_right_after_a_run_that_ended(db: Database) -> None:
    recover(db, "r4")
    versions = [db.latest_version(table) for table in TABLES]
    began = time.perf_counter()
    assert recover(db, "r4") == Recovery()
    assert time.perf_counter() - began < 2  # 0.05 s alone
    assert [db.latest_version(table) for table in TABLES] == versions
    assert_clean(db)


def test_a_dead_runs_commits_tags_and_files_leave(db: Database) -> None:
    released = newest_release(db)
    assert released is not None
    recover(db, "r4")
    before = contents(db)
    files = set(Path(db.uri).rglob("data/*"))
    write(db, "dead", rows(["p0", "p99"], seed=5))
    orphans = write_rows(db, "images", SCHEMAS["images"], rows(["p5"], seed=6)["images"], is_whole=False)
    assert orphans
    db.dataset("products").tags.create("run-dead", db.latest_version("products"))
    db.dataset("products").tags.create("mine", db.latest_version("products"))
    db.dataset("images").tags.delete("release-2")
    db.dataset("rejects").tags.update("release-3", released.versions["rejects"] - 1)
    kept = db.latest_version("products")
    recovery = recover(db, "r4")
    assert recovery.tagged == ["images release-2", "rejects release-3"]
    assert recovery.untagged == ["products run-dead"]
    assert sorted(recovery.restored) == sorted(TABLES)
    assert recovery.freed_bytes > 0
    assert recovery.lost == []
    assert_same(db, before)
    assert db.dataset("products", kept).count_rows() == 15, "what a person tagged stays"
    db.dataset("products").tags.delete("mine")
    recover(db, "r4")
    assert_clean(db)
    assert set(Path(db.uri).rglob("data/*")) == files
    assert recover(db, "r5") == Recovery(), "restored once is restored"


def test_what_other_programs_committed_is_set_aside_and_kept(db: Database) -> None:
    before = contents(db)
    extra = rows(["x1"], seed=9)["products"]
    version = lance.write_dataset(extra, db.uri_of("products"), mode="append").version
    recover(db, "r4")
    assert_same(db, before)
    assert db.dataset("products", version).count_rows() == 15


def test_the_leavings_of_a_first_load_do_not_hinder_the_next(tmp_path: Path) -> None:
    db = Database(str(tmp_path / "db"))
    (Path(db.uri_of("images")) / "_versions").mkdir(parents=True)
    write_rows(db, "products", SCHEMAS["products"], rows(IDS)["products"], is_whole=True)
    assert recover(db, "r1") == Recovery()
    load(db, "r1", IDS)
    other = Database(str(tmp_path / "other"))
    write(other, "dead", rows(IDS, seed=3), is_whole=True)
    load(other, "r2", IDS)
    assert_same(other, contents(db))
    recover(other, "r3")
    assert_clean(other)


def test_versions_that_someone_cleaned_away_are_told(db: Database) -> None:
    first = list_releases(db)[0]
    db.dataset("images").tags.delete("release-1")
    db.dataset("images").cleanup_old_versions(versions=[first.versions["images"]])
    assert recover(db, "r4").lost == ["images of release 1"]
    with pytest.raises(ReleaseRefused, match="release 1 cannot be read any more"):
        rollback(db, 1, run_id="r5")


def test_back_and_forward_are_bit_for_bit_and_quick(db: Database) -> None:
    old = {release.release: contents(db, dict(release.versions)) for release in list_releases(db)}
    recover(db, "r4")
    began = time.perf_counter()
    back = rollback(db, 1, run_id="r4")
    seconds = time.perf_counter() - began
    assert seconds < 1
    assert (back.release, back.parent) == (4, 3)
    assert back.counts == {"rolled_back_to": 1, "rolled_back_from": 3}
    assert back.versions == {table: db.latest_version(table) for table in TABLES}
    first = list_releases(db)[0]
    same = ("model", "model_id", "fingerprint", "average_text_weight", "index", "checks", "model_settings")
    assert [getattr(back, name) for name in same] == [getattr(first, name) for name in same]
    assert_same(db, old[1])
    assert_clean(db)
    forward = rollback(db, 3, run_id="r5")
    assert forward.release == 5
    assert_same(db, old[3])
    assert [i.name for i in db.dataset("products").describe_indices()] == [
        i.name for i in db.dataset("products", list_releases(db)[2].versions["products"]).describe_indices()
    ]
    assert_clean(db)
    load(db, "r6", ["p30"], seed=30)
    assert db.dataset("products").count_rows() == 15


def test_back_twice_goes_back_twice(db: Database) -> None:
    old = {release.release: contents(db, dict(release.versions)) for release in list_releases(db)}
    assert rollback(db, run_id="a").counts["rolled_back_to"] == 2
    assert_same(db, old[2])
    assert rollback(db, run_id="b").counts["rolled_back_to"] == 1
    assert_same(db, old[1])
    with pytest.raises(QueryError, match=r"the release before release 1 .*--to.* there are: 1, 2, 3, 4"):
        rollback(db, run_id="c")
    load(db, "r6", ["p30"], seed=30)
    assert rollback(db, run_id="d").counts == {"rolled_back_to": 5, "rolled_back_from": 6}
    assert_same(db, old[1])


def test_a_rollback_that_cannot_be_is_refused(db: Database, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="no release 9; there are: 1, 2, 3"):
        rollback(db, 9, run_id="a")
    with pytest.raises(QueryError, match="release 3 is what readers get already"):
        rollback(db, 3, run_id="a")
    with pytest.raises(QueryError, match="nothing was released"):
        rollback(Database(str(tmp_path / "none")), run_id="a")
    first, last = list_releases(db)[0], list_releases(db)[-1]
    names = [
        {file["path"] for file in db.dataset("products", r.versions["products"]).tracked_files().read_all().to_pylist()
         if file["version"] == r.versions["products"] and file["type"] == "index file"}
        for r in (first, last)
    ]  # fmt: skip
    (Path(db.uri_of("products")) / sorted(names[0] - names[1])[0]).unlink()
    with pytest.raises(
        ReleaseRefused, match=r"release 1 cannot be read any more.*the index .* in _indices/.* bytes, not"
    ):
        rollback(db, 1, run_id="a")
    assert newest_release(db) == last
    assert_clean(db)


def test_a_crash_at_any_step_of_a_run_leaves_the_old_release(db: Database) -> None:
    expected = contents(db)
    runs = iter(range(1000))

    def step() -> None:
        load(db, f"x{next(runs)}", ["p1", "p40"], seed=40, title="new")

    def check() -> None:
        """Either the old release or the whole new one, and a clean state after recovery."""
        for release in list_releases(db)[2:]:
            contents(db, dict(release.versions))
        recover(db, f"y{next(runs)}")
        assert_clean(db)
        now = newest_release(db)
        assert now is not None
        if now.checks["products"] == 15:
            rollback(db, 3, run_id=f"z{next(runs)}")
        assert_same(db, expected)
        recover(db, f"y{next(runs)}")
        assert_no_orphans(db)

    assert survive(db, step, check) > 10


def test_a_crash_at_any_step_of_a_rollback_leaves_one_of_both(db: Database) -> None:
    old = {1: contents(db, dict(list_releases(db)[0].versions)), 3: contents(db)}
    runs = iter(range(1000))

    def check() -> None:
        recover(db, f"y{next(runs)}")
        assert_clean(db)
        newest = newest_release(db)
        assert newest is not None
        is_back = newest.counts.get("rolled_back_to") == 1
        assert_same(db, old[1 if is_back else 3])
        if is_back:
            rollback(db, 3, run_id=f"z{next(runs)}")

    assert survive(db, lambda: rollback(db, 1, run_id=f"x{next(runs)}"), check) > 5


def age(db: Database, days: dict[int, float]) -> None:
    """Make releases as many days old."""
    releases = list_releases(db)
    db.dataset("releases").delete("release > 0")
    for release in releases:
        older = release.created_at - timedelta(days=days.get(release.release, 0))
        assert insert_row(db, replace(release, created_at=older))


def test_pruning_keeps_the_newest_and_the_young(db: Database) -> None:
    age(db, {1: 30, 2: 8, 3: 7.5})
    before = contents(db)
    size = sum(path.stat().st_size for path in Path(db.uri).rglob("*") if path.is_file())
    assert prune(db, 1, 9, dry_run=True).releases == [1]
    assert [release.release for release in list_releases(db)] == [1, 2, 3]
    young = prune(db, 1, 9)
    assert (young.releases, young.kept) == ([1], [2, 3])
    assert prune(db, 2, 0).releases == []
    assert prune(db, 1, 0).releases == [2]
    assert prune(db, 1, 0).releases == []
    assert young.freed_bytes > 0
    assert sum(path.stat().st_size for path in Path(db.uri).rglob("*") if path.is_file()) < size
    assert_same(db, before)
    assert_clean(db)
    with pytest.raises(QueryError, match="the newest release always stays"):
        prune(db, 0, 0)
    with pytest.raises(QueryError, match="the release before release 3 is not there any more"):
        rollback(db, run_id="a")
    load(db, "r9", ["p50"], seed=50)


def test_pruning_spares_what_a_later_release_shares(db: Database) -> None:
    first = contents(db, dict(list_releases(db)[0].versions))
    rollback(db, 1, run_id="a")
    age(db, {1: 9, 2: 9, 3: 9, 4: 9})
    assert prune(db, 1, 5).releases == [1, 2, 3]
    assert_same(db, first)
    assert_clean(db)
    with pytest.raises(QueryError, match="not there any more"):
        rollback(db, run_id="b")


def test_versions_that_two_releases_name_stay_with_the_second(db: Database) -> None:
    last = newest_release(db)
    assert last is not None
    publish(db, replace(last, release=4, parent=3), run_id="r4")
    age(db, dict.fromkeys(range(1, 5), 9.0))
    assert prune(db, 1, 5).releases == [1, 2, 3]
    assert_clean(db)


def test_a_crash_at_any_step_of_pruning_leaves_readable_releases(db: Database) -> None:
    age(db, {1: 9, 2: 9, 3: 9})
    expected = contents(db)
    runs = iter(range(1000))

    def check() -> None:
        for release in list_releases(db):
            contents(db, dict(release.versions))
        recover(db, f"y{next(runs)}")
        assert_clean(db)
        assert_same(db, expected)

    assert survive(db, lambda: prune(db, 1, 5), check) >= 2
    assert [release.release for release in list_releases(db)] == [3]


def test_rows_of_a_run_that_was_repeated_are_not_doubled(db: Database) -> None:
    tables = rows(["p1", "p60"], seed=60)
    fragments = write_rows(db, "products", SCHEMAS["products"], tables["products"], is_whole=False)
    keys = {"product_id": tables["products"]["product_id"].combine_chunks()}
    with pytest.raises(Crash), crashing(1, after=True):
        replace_rows(db, "products", keys, fragments, run_id="dead")
    assert db.dataset("products").count_rows() == 15
    recover(db, "next")
    load(db, "next", ["p1", "p60"], seed=60)
    assert db.dataset("products").count_rows() == 15
