"""Catalog, staging, ledger, model and database on an S3 server that fails on purpose."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import store_tables
from job_process import JobProcess, run_backfill
from s3_server import Faults, S3Server
from small_catalog import PRODUCT_SCHEMA, Item, assert_equal_tables, items, jpeg, table, write_products

from pipeline import paths
from pipeline.config import load_config
from pipeline.errors import LeaseHeld, ModelError, ReleaseRefused, RunError
from pipeline.model import describe_model
from pipeline.model.remote import fetch_folder
from pipeline.paths import open_file, resolve
from pipeline.query import Searcher
from pipeline.run.ledger import Ledger
from pipeline.run.staging import StagedWriter, staged_schema, write_atomically
from pipeline.store import history
from pipeline.store.lease import Lease, read_lease
from pipeline.store.releases import Release, insert_row, list_releases, newest_release, now
from pipeline.store.schemas import TABLES, releases_schema, runs_schema
from pipeline.store.tables import Database, append_row, ensure

REFERENCES = pa.schema([*list(PRODUCT_SCHEMA)[:-1], pa.field("images", pa.list_(pa.string()))])
COMMITS = r"PUT .*/(_versions|_refs)/"
SETTINGS = ("pool.gpus_per_actor=0", "columns.carried=['price']")


@pytest.fixture(scope="module")
def shop(s3: S3Server) -> str:
    """A bucket."""
    s3.make_bucket("shop")
    return "shop"


@pytest.fixture
def db(shop: str, request: pytest.FixtureRequest) -> Database:
    """An empty database on the store, one for each test."""
    return Database(f"s3://{shop}/{request.node.name.replace('[', '-').replace(']', '')}")


def upload(folder: Path, uri: str) -> None:
    """A local folder to a prefix."""
    filesystem, inside = resolve(uri)
    pafs.copy_files(str(folder), inside, destination_filesystem=filesystem)


def run(catalog: Path | str, db: Path | str, model: str, *sets: str, **kwargs: Any) -> dict[str, Any]:
    from pipeline.run.backfill import backfill

    config = load_config(None, [*SETTINGS, *sets], catalog_uri=str(catalog), db=str(db), model_name=model)
    return backfill(config, **kwargs)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
class TestRuns:
    """Whole runs, on a Ray whose workers know the store by their environment."""

    @pytest.fixture(scope="class")
    def on_disk(self, tmp_path_factory: pytest.TempPathFactory, tiny_model: str, ray_session: None) -> Path:
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

    @pytest.fixture(scope="class")
    def on_s3(self, s3: S3Server, shop: str, on_disk: Path, tiny_model: str) -> Iterator[tuple[str, str]]:
        """The same on the store: first refused for its rejects, then taken from what was staged."""
        catalog, db = f"s3://{shop}/catalog", f"s3://{shop}/db"
        upload(on_disk / "catalog", catalog)
        with pytest.raises(ReleaseRefused, match=f"the rejects are in {db}/_staging/rejects-") as refused:
            run(catalog, db, tiny_model, "max_reject_share=0")
        told = str(refused.value).rpartition(" in ")[2]
        filesystem, inside = resolve(told)
        with open_file(filesystem, inside) as file:
            assert pa.parquet.read_table(file).num_rows == 3
        assert len(Ledger(f"{db}/_staging").entries()) == 3
        assert newest_release(db) is None
        before = len(s3.log)
        report = run(catalog, db, tiny_model, "max_reject_share=0.5")
        assert report["released"]
        assert report["actors"] == [], "every partition was staged"
        assert not [line for line in s3.log[before:] if "catalog/img" in line]
        return catalog, db

    def test_the_tables_are_those_of_a_run_on_disk(self, on_disk: Path, on_s3: tuple[str, str], s3: S3Server) -> None:
        assert_equal_tables(on_disk / "db", on_s3[1])
        assert {r["reason"] for r in table(on_s3[1], "rejects").to_pylist()} == {
            "image_not_found", "image_not_an_image", "text_empty",
        }  # fmt: skip
        left = [key for key in s3.keys("shop", "db/_staging/") if not key.endswith("/")]
        assert [key.rpartition("/")[2][:8] for key in left] == ["rejects-"], "kept for a week for people to look at"

    def test_with_faults_in_between_they_are_too(
        self, on_disk: Path, on_s3: tuple[str, str], tiny_model: str, s3: S3Server
    ) -> None:
        faults = Faults(throttle_every=11, drop_every=17, lose_every=29, error_every=31, cut_every=37, delay_every=53)
        with s3.failing(faults) as met:
            report = run(on_s3[0], "s3://shop/faulty", tiny_model, "max_reject_share=0.5")
        assert report["released"]
        assert all(met[fault] >= 2 for fault in ("throttle", "drop", "lose", "error", "cut", "delay")), met
        assert_equal_tables(on_disk / "db", "s3://shop/faulty")
        assert Database("s3://shop/faulty").dataset("runs").count_rows() == 1

    def test_again_replayed_rolled_back_and_pruned(
        self, on_disk: Path, on_s3: tuple[str, str], tiny_model: str, s3: S3Server
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
        assert searcher.search("a wool coat number 3", mode="text", k=1)[0].product_id == "p0-0003"
        with Lease(db, run_id="r", job="rollback") as lease:
            lease.acquire()
            assert history.rollback(db, run_id="back").release == 3
            assert searcher.refresh()
            assert_equal_tables(on_disk / "db", uri)
            history.prune(db, 1, 0)
        assert [release.release for release in list_releases(db)] == [3]
        assert_equal_tables(on_disk / "db", uri)
        assert len(s3.keys("shop", "db/products.lance/_versions/")) == 1

    @pytest.mark.slow
    def test_the_command_needs_nothing_but_the_environment(self, on_s3: tuple[str, str], tmp_path: Path) -> None:
        code, told, log = run_backfill(
            ["--catalog", on_s3[0], "--db", "s3://shop/command", "--model", "demo", "--set", "max_reject_share=0.5"],
            tmp_path / "run",
        )
        assert (code, told["released"]) == (0, True), log
        for command in (
            ["-m", "jobs.search", "a wool coat", "--db", "s3://shop/command", "--json"],
            ["-m", "jobs.status", "--db", "s3://shop/command", "--json"],
            ["-m", "jobs.release", "show", "--db", "s3://shop/command", "--json"],
            ["-m", "jobs.rejects", "list", "--db", "s3://shop/command", "--json"],
        ):
            job = JobProcess([], tmp_path / command[1], command=command)
            assert job.end() == 0, job.log


def test_a_commit_counts_once(db: Database, s3: S3Server) -> None:
    """Every second commit, and every second tag, meets with a fault."""
    ids = [f"p{i}" for i in range(6)]
    for number, fault in enumerate(("drop", "lose", "error"), start=1):
        with s3.failing(Faults(**{f"{fault}_every": 2}, on=COMMITS)) as met:
            store_tables.load(db, f"r{number}", ids if number == 1 else ["p1", f"q{number}"], seed=50 * number)
            append_row(db, "runs", runs_schema(), run_row(number))
        assert met[fault] > 5
    assert [release.release for release in list_releases(db)] == [1, 2, 3]
    found = store_tables.contents(db)
    assert found["products"].column("product_id").to_pylist() == [*ids, "q2", "q3"]
    assert found["images"].num_rows == 16
    assert sorted(db.dataset("runs").to_table().column("run_id").to_pylist()) == ["r1", "r2", "r3"]
    tags = {"release-1", "release-2", "release-3"}
    assert all(set(db.dataset(name).tags.list()) == tags for name in ("products", "images", "rejects"))


def run_row(number: int) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(runs_schema().names, "")
    return row | {"run_id": f"r{number}", "started_at": now(), "seconds": 1.0, "release": None}


def at_once(call: Callable[[int], Any], count: int) -> Counter[Any]:
    """What several threads get that begin at the same moment."""
    barrier = threading.Barrier(count)

    def start(number: int) -> Any:
        barrier.wait()
        return call(number)

    with ThreadPoolExecutor(count) as threads:
        return Counter(threads.map(start, range(count)))


@pytest.mark.parametrize(
    "faults", [Faults(), Faults(throttle_every=7, lose_every=5, drop_every=11)], ids=["well", "ill"]
)
def test_one_of_many_gets_the_lease(faults: Faults, db: Database, s3: S3Server) -> None:
    leases = [Lease(db, run_id=f"run{number}", job="test") for number in range(4)]

    def take(number: int) -> bool:
        try:
            leases[number].acquire()
        except LeaseHeld:
            return False
        return True

    with s3.failing(faults):
        assert at_once(take, len(leases)) == {True: 1, False: 3}
        (holder,) = [lease for lease in leases if lease.is_held]
        record = read_lease(db)
        assert record is not None
        holder.check()
        holder.release()
    assert read_lease(db) is None


def test_one_of_many_gets_a_release_number(db: Database, s3: S3Server) -> None:
    ensure(db, "releases", releases_schema())
    versions = dict.fromkeys(TABLES, 1)
    rivals = [Release(1, None, now(), versions, f"model {n}", "m", "f", 0.5, {}, {}, {}) for n in range(4)]
    with s3.failing(Faults(lose_every=2, drop_every=3, on=COMMITS)):
        assert at_once(lambda number: insert_row(db, rivals[number]), 4) == {True: 1, False: 3}
    assert len(list_releases(db)) == 1


def test_nothing_is_left_of_a_staged_file_that_was_not_finished(shop: str, s3: S3Server) -> None:
    path = f"s3://{shop}/staged/part.parquet"
    with pytest.raises(RunError, match="broke"), StagedWriter(path, staged_schema(4, ()), ()):
        raise RunError("it broke")
    assert [key for key in s3.keys(shop, "staged/") if not key.endswith("/")] == []
    with StagedWriter(path, staged_schema(4, ()), ()) as writer:
        pass
    assert s3.keys(shop, "staged/part") == ["staged/part.parquet"]
    assert len(writer.sha256) == 64


def test_a_slow_store_is_not_a_dead_one(shop: str, s3: S3Server) -> None:
    write_atomically(f"s3://{shop}/slow", b"slow")
    filesystem, inside = resolve(f"s3://{shop}/slow")
    with s3.failing(Faults(delay_every=1, delay_s=3.6, on="GET /shop/slow")) as met:
        with open_file(filesystem, inside) as file:
            assert file.read() == b"slow"
        assert met["delay"] == 1, "asked once"


def test_small_reads_are_tried_again(shop: str, s3: S3Server) -> None:
    write_atomically(f"s3://{shop}/small", b"0123456789")
    filesystem, inside = resolve(f"s3://{shop}/small")
    with s3.failing(Faults(throttle_every=2, on="GET /shop/small")) as met, open_file(filesystem, inside) as file:
        assert (file.read(3), file.read(), file.read()) == (b"012", b"3456789", b"")
        file.seek(-2, 2)
        assert (file.tell(), file.read(5)) == (8, b"89")
    assert met["throttle"] >= 1


def test_a_model_is_fetched_once(
    shop: str, s3: S3Server, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    uri = f"s3://{shop}/model"
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        describe_model(uri)
    upload(Path(tiny_model), uri)

    def fetches() -> int:
        return sum("GET /shop/model/model.safetensors" in line for line in s3.log)

    with s3.failing(Faults(drop_every=5, throttle_every=7, on="/shop/model/")):
        folders = at_once(lambda _: fetch_folder(uri), 3)
    (folder,) = folders
    assert describe_model(uri).fingerprint == describe_model(tiny_model).fingerprint
    asked = fetches()
    assert fetch_folder(uri) == folder
    assert fetches() == asked

    (folder / "model.safetensors").write_bytes(b"cut")
    assert fetch_folder(uri) == folder
    assert (folder / "model.safetensors").read_bytes() == (Path(tiny_model) / "model.safetensors").read_bytes()

    write_atomically(f"{uri}/tokenizer.json", b"{}")
    assert fetch_folder(uri) != folder, "another content, another folder"
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("wrong", ["bucket", "endpoint", "credentials"])
def test_what_is_wrong_is_told_soon(
    wrong: str, shop: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from jobs import backfill, rejects, release, search, status

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = f"s3://{shop}"
    if wrong == "bucket":
        store = "s3://no-such-bucket"
    elif wrong == "endpoint":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    else:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(tmp_path))
    said = {
        "bucket": "there is no bucket no-such-bucket at http://127.0.0.1:",
        "endpoint": "the store at http://127.0.0.1:1 cannot be reached",
        "credentials": "no credentials",
    }[wrong]
    local = str(write_products(tmp_path / "catalog", [items(1)]))
    commands: list[tuple[Any, list[str]]] = [
        (backfill.main, ["--catalog", local, "--db", f"{store}/x", "--model", "demo"]),
        (status.main, ["--db", f"{store}/x"]),
        (search.main, ["red", "--db", f"{store}/x"]),
        (release.main, ["list", "--db", f"{store}/x"]),
        (rejects.main, ["list", "--db", f"{store}/x"]),
    ]
    if wrong != "credentials":  # a public bucket may be read without
        commands.append((backfill.main, ["--catalog", f"{store}/c", "--db", str(tmp_path / "db"), "--model", "demo"]))
    for main, arguments in commands:
        began = time.monotonic()
        assert main([*arguments, "--json"]) == 2, arguments
        assert time.monotonic() - began < 15
        out, err = capsys.readouterr()
        assert said in json.loads(out.splitlines()[-1])["error"], out
        assert "Traceback" not in err


def test_the_settings_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ALLOW_HTTP", "OBJECT_STORE_CLIENT_MAX_RETRIES", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9000")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    filesystem, inside = resolve("s3://bucket/a%3D1/b/")
    assert (inside, filesystem.region) == ("bucket/a=1/b", "eu-west-1")
    assert resolve("s3a://bucket/c")[0] is filesystem, "kept for the process"
    assert paths.os.environ["AWS_ALLOW_HTTP"] == "true"
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert resolve("s3://bucket/c")[0].region == "eu-north-1"
    with pytest.raises(OSError, match="s3:///x"):
        resolve("s3:///x")
