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

from pipeline.config import load_config
from pipeline.errors import ReleaseRefused
from pipeline.paths import open_file, resolve
from pipeline.query import Searcher
from pipeline.run.backfill import backfill
from pipeline.run.ledger import Ledger
from pipeline.run.staging import write_atomically
from pipeline.store import history
from pipeline.store.lease import Lease
from pipeline.store.releases import list_releases, newest_release
from pipeline.store.tables import Database

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

REFERENCES = pa.schema([*list(PRODUCT_SCHEMA)[:-1], pa.field("images", pa.list_(pa.string()))])
SETTINGS = ("pool.gpus_per_actor=0", "columns.carried=['price']")


def run(catalog: Path | str, db: Path | str, model: str, *sets: str, **kwargs: Any) -> dict[str, Any]:
    config = load_config(None, [*SETTINGS, *sets], catalog_uri=str(catalog), db=str(db), model_name=model)
    return backfill(config, **kwargs)


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
    """The same on the store: first refused for its rejects, then taken from what was staged."""
    s3.make_bucket("runs")
    catalog, db = "s3://runs/catalog", "s3://runs/db"
    upload(on_disk / "catalog", catalog)
    with pytest.raises(ReleaseRefused, match=f"the rejects are in {db}/_staging/rejects-") as refused:
        run(catalog, db, tiny_model, "max_reject_share=0")
    told = str(refused.value).rpartition(" in ")[2]
    filesystem, inside = resolve(told)
    with open_file(filesystem, inside) as file:
        assert pq.read_table(file).num_rows == 3
    assert len(Ledger(f"{db}/_staging").entries()) == 3
    assert newest_release(db) is None
    before = len(s3.log)
    report = run(catalog, db, tiny_model, "max_reject_share=0.5")
    assert report["released"]
    assert report["actors"] == [], "every partition was staged"
    assert not [line for line in s3.log[before:] if "catalog/img" in line]
    return catalog, db


def test_the_tables_are_those_of_a_run_on_disk(on_disk: Path, on_s3: tuple[str, str], s3: S3Server) -> None:
    assert_equal_tables(on_disk / "db", on_s3[1])
    assert {r["reason"] for r in table(on_s3[1], "rejects").to_pylist()} == {
        "image_not_found", "image_not_an_image", "text_empty",
    }  # fmt: skip
    left = [key for key in s3.keys("runs", "db/_staging/") if not key.endswith("/")]
    assert [key.rpartition("/")[2][:8] for key in left] == ["rejects-"], "kept for a week for people to look at"


def test_with_faults_in_between_they_are_too(
    on_disk: Path, on_s3: tuple[str, str], tiny_model: str, s3: S3Server
) -> None:
    faults = Faults(
        throttle_every=23, drop_every=29, lose_every=41, error_every=47, cut_every=53, delay_every=61, delay_s=0.5
    )
    with s3.failing(faults) as met:
        report = run(on_s3[0], "s3://runs/faulty", tiny_model, "max_reject_share=0.5")
    assert report["released"]
    assert all(met[fault] >= 2 for fault in ("throttle", "drop", "lose", "error", "cut", "delay")), met
    assert_equal_tables(on_disk / "db", "s3://runs/faulty")
    assert Database("s3://runs/faulty").dataset("runs").count_rows() == 1


def test_again_replayed_rolled_back_and_pruned(
    on_disk: Path, on_s3: tuple[str, str], tiny_model: str, s3: S3Server
) -> None:
    catalog, uri = on_s3
    again = run(catalog, uri, tiny_model, "max_reject_share=0.5")
    assert (again["released"], again["embedded"], again["release"]) == (False, 0, 1)

    write_atomically(f"{catalog}/img/late.jpg", jpeg(901))
    replayed = run(catalog, uri, tiny_model, "max_reject_share=0.9", replay=True)
    assert (replayed["released"], replayed["release"], replayed["embedded"]) == (True, 2, 1)
    assert "image_not_found" not in table(uri, "rejects").column("reason").to_pylist()

    db = Database(uri)
    searcher = Searcher.open(uri)
    assert searcher.release.release == 2
    assert searcher.search("title 3 of 0. a wool coat number 3", mode="text", k=1)[0].product_id == "p0-0003"
    with Lease(db, run_id="r", job="rollback") as lease:
        lease.acquire()
        assert history.rollback(db, run_id="back").release == 3
        assert searcher.refresh()
        assert_equal_tables(on_disk / "db", uri)
        history.prune(db, 1, 0)
    assert [release.release for release in list_releases(db)] == [3]
    assert_equal_tables(on_disk / "db", uri)
    assert len(s3.keys("runs", "db/products.lance/_versions/")) == 1


@pytest.mark.slow
def test_the_command_needs_nothing_but_the_environment(on_s3: tuple[str, str], tmp_path: Path) -> None:
    code, told, log = run_backfill(
        ["--catalog", on_s3[0], "--db", "s3://runs/command", "--model", "demo", "--set", "max_reject_share=0.5"],
        tmp_path / "run",
    )
    assert (code, told["released"]) == (0, True), log
    for command in (
        ["-m", "jobs.search", "a wool coat", "--db", "s3://runs/command", "--json"],
        ["-m", "jobs.status", "--db", "s3://runs/command", "--json"],
        ["-m", "jobs.release", "show", "--db", "s3://runs/command", "--json"],
        ["-m", "jobs.rejects", "list", "--db", "s3://runs/command", "--json"],
    ):
        job = JobProcess([], tmp_path / command[1], command=command)
        assert job.end() == 0, job.log
