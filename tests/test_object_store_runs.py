"""Whole runs on an S3 server that fails on purpose; Ray's workers know it by their environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from job_process import JobProcess, run_backfill
from s3_server import Faults, S3Server, upload
from small_catalog import PRODUCT_SCHEMA, Item, assert_equal_tables, items, jpeg, table, write_products

from pipeline.config import Config, load_config
from pipeline.errors import ReleaseRefused
from pipeline.paths import open_file, resolve
from pipeline.query import Searcher
from pipeline.run.backfill import backfill, reindex
from pipeline.run.ledger import Ledger
from pipeline.run.staging import write_atomically
from pipeline.store import history
from pipeline.store.lease import Lease
from pipeline.store.releases import list_releases, newest_release
from pipeline.store.tables import Database

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

REFERENCES = pa.schema([*list(PRODUCT_SCHEMA)[:-1], pa.field("images", pa.list_(pa.string()))])
FAULTS = ("throttle", "drop", "lose", "error", "cut", "delay")
ALL_FAULTS = Faults(
    throttle_every=19, drop_every=23, lose_every=31, error_every=37, cut_every=41, delay_every=43, delay_s=0.5
)
SETTINGS = ("pool.gpus_per_actor=0", "columns.carried=['price']")


def settings(catalog: Path | str, db: Path | str, model: str, *sets: str) -> Config:
    return load_config(None, [*SETTINGS, *sets], catalog_uri=str(catalog), db=str(db), model_name=model)


def run(catalog: Path | str, db: Path | str, model: str, *sets: str, **kwargs: Any) -> dict[str, Any]:
    return backfill(settings(catalog, db, model, *sets), **kwargs)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, ray_session: None) -> Path:
    """A catalog whose images are files beside it, one of them missing, and its database."""
    folder = tmp_path_factory.mktemp("disk")
    products = [*items(9), Item("odd", "odd one", None, [b"not an image", jpeg(900)]), Item("blank", " ")]
    (folder / "catalog" / "img").mkdir(parents=True)
    for item in products:
        for number, data in enumerate(item.images or ()):
            assert isinstance(data, bytes)
            (folder / "catalog" / "img" / f"{item.product_id}-{number}.jpg").write_bytes(data)
        item.images = [f"img/{item.product_id}-{number}.jpg" for number in range(len(item.images or ()))]
    products[0].images = [*(products[0].images or ()), "img/late.jpg"]
    write_products(folder / "catalog", [products[:4], products[4:8], products[8:]], REFERENCES)
    run(folder / "catalog", folder / "db", tiny_model, "max_reject_share=0.5")
    return folder


@pytest.fixture(scope="module")
def on_s3(s3: S3Server, on_disk: Path, tiny_model: str) -> tuple[str, str]:
    """The same on the store, with faults: first refused for its rejects, then taken from what was staged."""
    s3.make_bucket("shop-catalog")
    s3.make_bucket("shop-tables")
    catalog, db = "s3://shop-catalog/all", "s3://shop-tables/db"
    upload(on_disk / "catalog", catalog)
    with (
        s3.failing(ALL_FAULTS) as met,
        pytest.raises(ReleaseRefused, match=f"the rejects are in {db}/_staging/") as refused,
    ):
        run(catalog, db, tiny_model, "max_reject_share=0")
    assert all(met[fault] for fault in FAULTS), met
    filesystem, inside = resolve(str(refused.value).rpartition(" in ")[2])
    with open_file(filesystem, inside) as file:
        assert pq.read_table(file).num_rows == 3
    assert len(Ledger(f"{db}/_staging").entries()) == 3
    assert newest_release(db) is None
    before = len(s3.log)
    with s3.failing(ALL_FAULTS) as met:
        report = run(catalog, db, tiny_model, "max_reject_share=0.5")
    assert all(met[fault] > 3 for fault in FAULTS), met
    assert report["released"]
    assert report["actors"] == [], "every partition was staged"
    assert not [line for line in s3.log[before:] if "/img/" in line]
    return catalog, db


def test_the_tables_are_those_of_a_run_on_disk(on_disk: Path, on_s3: tuple[str, str], s3: S3Server) -> None:
    db = on_s3[1]
    assert_equal_tables(on_disk / "db", db)
    assert {r["reason"] for r in table(db, "rejects").to_pylist()} == {
        "image_not_found", "image_not_an_image", "text_empty",
    }  # fmt: skip
    statuses = Database(db).dataset("runs").to_table().column("status").to_pylist()
    assert sorted(statuses) == ["failed", "released"], "one row a run"
    left = [key for key in s3.keys("shop-tables", "db/_staging/") if not key.endswith("/")]
    assert [key.rpartition("/")[2][:8] for key in left] == ["rejects-"], "kept for a week for people to look at"


def test_a_second_run_changes_nothing(on_s3: tuple[str, str], tiny_model: str) -> None:
    again = run(*on_s3, tiny_model, "max_reject_share=0.5")
    assert (again["released"], again["embedded"], again["release"]) == (False, 0, 1)
    searcher = Searcher.open(on_s3[1])
    hits = searcher.search("title 3 of 0. a wool coat number 3", mode="text", k=1)
    assert (searcher.release.release, hits[0].product_id) == (1, "p0-0003")


def test_a_reindex_follows_the_catalog_as_on_disk(s3: S3Server, tiny_model: str, tmp_path: Path) -> None:
    s3.make_bucket("shop-index")
    remote, db = "s3://shop-index/catalog", "s3://shop-index/db"
    groups = [items(6, seed=seed) for seed in range(4)]
    catalog = write_products(tmp_path / "catalog", groups)
    upload(catalog, remote)
    for where, into in ((catalog, tmp_path / "db"), (remote, db)):
        run(where, into, tiny_model)
    groups[0][0].title = "edited"
    groups[0][1].images = [jpeg(800)]
    groups[1][0].price = 0.5
    del groups[2][:2]
    groups[2].append(Item("added", "added", None, [jpeg(801)]))
    write_products(catalog, groups[:3])
    upload(catalog, remote)
    on_disk = reindex(settings(catalog, tmp_path / "db", tiny_model))
    with s3.failing(ALL_FAULTS) as met:
        on_store = reindex(settings(remote, db, tiny_model))
    assert all(met[fault] for fault in FAULTS), met
    assert (on_disk["release"], on_disk["embedded"]) == (2, 4)
    for count in ("release", "embedded", "reused", "deleted", "products"):
        assert on_store[count] == on_disk[count], count
    assert_equal_tables(tmp_path / "db", db)
    with s3.failing(ALL_FAULTS):
        assert reindex(settings(remote, db, tiny_model))["released"] is False


def test_replayed_rolled_back_and_pruned(on_disk: Path, on_s3: tuple[str, str], tiny_model: str, s3: S3Server) -> None:
    catalog, uri = on_s3
    searcher = Searcher.open(uri)
    write_atomically(f"{catalog}/img/late.jpg", jpeg(901))
    replayed = run(catalog, uri, tiny_model, "max_reject_share=0.9", replay=True)
    assert (replayed["released"], replayed["release"], replayed["embedded"]) == (True, 2, 1)
    assert "image_not_found" not in table(uri, "rejects").column("reason").to_pylist()

    db = Database(uri)
    assert searcher.refresh()
    with Lease(db, run_id="r", job="rollback") as lease:
        lease.acquire()
        assert history.rollback(db, run_id="back").release == 3
        assert searcher.refresh()
        assert_equal_tables(on_disk / "db", uri)
        history.prune(db, 1, 0)
    assert [release.release for release in list_releases(db)] == [3]
    assert_equal_tables(on_disk / "db", uri)
    assert len(s3.keys("shop-tables", "db/products.lance/_versions/")) == 1


def test_the_command_needs_nothing_but_the_environment(on_s3: tuple[str, str], tmp_path: Path) -> None:
    code, told, log = run_backfill(
        ["--catalog", on_s3[0], "--db", "s3://shop-tables/command", "--model", "demo", "--set", "max_reject_share=0.5"],
        tmp_path / "run",
    )
    assert (code, told["released"]) == (0, True), log
    for command in (
        ["-m", "jobs.search", "a wool coat", "--db", "s3://shop-tables/command", "--json"],
        ["-m", "jobs.status", "--db", "s3://shop-tables/command", "--json"],
        ["-m", "jobs.release", "show", "--db", "s3://shop-tables/command", "--json"],
        ["-m", "jobs.rejects", "list", "--db", "s3://shop-tables/command", "--json"],
    ):
        job = JobProcess([], tmp_path / command[1], command=command)
        assert job.end() == 0, job.log
