"""Catalog, staging, ledger, model and database on an S3 server that fails on purpose."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import store_tables
from s3_server import Faults, S3Server, upload
from small_catalog import items, write_products

from pipeline import paths
from pipeline.errors import LeaseHeld, ModelError, RunError
from pipeline.model import describe_model
from pipeline.model.remote import fetch_folder
from pipeline.paths import open_file, resolve
from pipeline.run.staging import StagedWriter, staged_schema, write_atomically
from pipeline.store import history
from pipeline.store.lease import Lease, read_lease
from pipeline.store.releases import Release, insert_row, list_releases, now
from pipeline.store.schemas import TABLES, releases_schema, runs_schema
from pipeline.store.tables import Database, append_row, ensure

COMMITS = r"PUT .*/(_versions|_refs)/"


@pytest.fixture(scope="module")
def shop(s3: S3Server) -> str:
    """A bucket."""
    s3.make_bucket("shop")
    return "shop"


@pytest.fixture
def db(s3: S3Server) -> Database:
    """An empty database in a bucket of its own: moto's listings take the longer the more a bucket holds."""
    bucket = f"db-{uuid.uuid4().hex[:8]}"
    s3.make_bucket(bucket)
    return Database(f"s3://{bucket}/db")


def test_a_commit_counts_once(db: Database, s3: S3Server) -> None:
    ids = [f"p{i}" for i in range(6)]
    with s3.failing(Faults(drop_every=2, lose_every=3, on=COMMITS)) as met:
        store_tables.load(db, "r1", ids)
    assert met["drop"] > 5
    assert met["lose"] > 3
    with s3.failing(Faults(lose_every=2, on=COMMITS)):
        store_tables.write(db, "r2", store_tables.rows(["p1", "q"], seed=50))
    for number, fault in enumerate(("drop", "lose", "error", "throttle")):
        with s3.failing(Faults(**{f"{fault}_every": 2}, on=COMMITS)) as met:
            append_row(db, "runs", runs_schema(), run_row(number))
            append_row(db, "runs", runs_schema(), run_row(10 + number))
        assert met[fault] >= 1
    assert [release.release for release in list_releases(db)] == [1]
    found = store_tables.contents(db)
    assert found["products"].column("product_id").to_pylist() == [*ids, "q"]
    assert found["images"].num_rows == 14
    assert db.dataset("runs").count_rows() == 8
    assert all(list(db.dataset(name).tags.list()) == ["release-1"] for name in TABLES)


@pytest.mark.slow
def test_rolled_back_and_pruned(db: Database, s3: S3Server) -> None:
    store_tables.write(db, "r1", store_tables.rows(["a", "b"]), is_whole=True)
    first = store_tables.publish_latest(db, "r1", {}, {})
    before = store_tables.contents(db)
    with s3.failing(Faults(throttle_every=23, drop_every=29, lose_every=31, cut_every=37)) as met:
        store_tables.write(db, "r2", store_tables.rows(["b", "c"], seed=50))
        store_tables.publish_latest(db, "r2", {}, {})
        assert history.rollback(db, run_id="back").release == 3
        history.prune(db, 1, 0)
    assert all(met[fault] > 2 for fault in ("throttle", "drop", "lose", "cut")), met
    assert [release.release for release in list_releases(db)] == [3]
    assert store_tables.contents(db) == before
    assert db.latest_version("products") > first.versions["products"]
    history.prune(db, 1, 0)  # a file whose deletion met with a fault goes with the next one
    assert len(s3.keys(db.uri.split("/")[2], "db/products.lance/_versions/")) == 1


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
    if wrong == "credentials":
        commands = commands[:2]  # each takes the seconds in which Lance looks for a role
    else:
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
