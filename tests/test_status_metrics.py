"""`python -m jobs.status --metrics`: what Prometheus is told of a database between runs."""

from __future__ import annotations

import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from job_process import JobProcess
from prometheus_client.parser import text_string_to_metric_families
from store_tables import load

from jobs import status
from pipeline.store.lease import Lease
from pipeline.store.schemas import runs_schema
from pipeline.store.tables import Database, append_row

Samples = dict[tuple[str, tuple[str, ...]], float]


@contextmanager
def served(db: str) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    until = threading.Event()
    thread = threading.Thread(
        target=status.serve_metrics, args=(db,), kwargs={"host": "127.0.0.1", "port": port, "until": until}
    )
    thread.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}/metrics"
    until.set()
    thread.join()


def scrape(address: str) -> Samples:
    """Name and label values to value."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, tuple(sample.labels.values())): sample.value for sample in samples}


def add_run(db: Database, number: int, job: str, told: str, started_at: datetime, seconds: float) -> None:
    row = {"run_id": f"run{number}", "job": job, "status": told, "started_at": started_at, "seconds": seconds}
    append_row(db, "runs", runs_schema(), row)


def test_a_database_over_its_life(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    db = Database(str(tmp_path / "db"))
    with served(db.uri) as address:
        assert scrape(address) == {("twotower_up", ()): 0}
        assert scrape(address) == {("twotower_up", ()): 0}
        assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
            f"cannot read {db.uri}: there is no database at {db.uri}"
        ]
        release = load(db, "r1", ["a", "b", "c"])
        now = datetime.now(UTC)
        for number, (told, ago_s, seconds) in enumerate([("failed", 900, 7.0), ("released", 800, 60.0)]):
            add_run(db, number, "backfill", told, now - timedelta(seconds=ago_s), seconds)
        add_run(db, 9, "backfill", "failed", now - timedelta(seconds=100), 3.5)
        told = scrape(address)
        assert told["twotower_up", ()] == 1
        assert told["twotower_release", ()] == 1
        age_s = (datetime.now(UTC) - release.created_at).total_seconds()
        assert 0 <= age_s - told["twotower_release_age_seconds", ()] < 20
        assert told["twotower_release_products", ()] == 3
        assert told["twotower_release_images", ()] == 6
        assert told["twotower_release_rejects", ("image_null",)] == 1
        assert told["twotower_last_run_seconds", ("backfill", "failed")] == 3.5
        assert told["twotower_last_run_seconds", ("backfill", "released")] == 60
        ended = told["twotower_last_run_timestamp_seconds", ("backfill", "released")]
        assert ended == pytest.approx((now - timedelta(seconds=740)).timestamp(), abs=0.01)
        assert told["twotower_writer_held", ()] == 0
        with Lease(db, run_id="r2", job="reindex") as lease:
            lease.acquire()
            assert scrape(address)["twotower_writer_held", ()] == 1
        load(db, "r2", ["d"])
        assert scrape(address)["twotower_release", ()] == 2
        (tmp_path / "db").rename(tmp_path / "away")  # the store is gone for a while
        assert scrape(address) == {("twotower_up", ()): 0}
        (tmp_path / "away").rename(tmp_path / "db")
        assert scrape(address)["twotower_release_products", ()] == 4


def test_a_damaged_table_is_told_as_down(tmp_path: Path) -> None:
    db = Database(str(tmp_path / "db"))
    load(db, "r1", ["a"])
    for manifest in (tmp_path / "db" / "releases.lance" / "_versions").iterdir():
        manifest.write_bytes(b"nothing that Lance wrote")
    collector = status.StatusCollector(db.uri)
    assert [(m.name, m.samples[0].value) for m in collector.collect()] == [("twotower_up", 0)]


def test_the_job_serves_on_loopback_until_a_signal(tmp_path: Path) -> None:
    job = JobProcess(["--db", str(tmp_path / "db"), "--metrics", "0", "--json"], tmp_path / "job",
                     command=("-m", "jobs.status"))  # fmt: skip
    job.wait_until(lambda: "/metrics" in job.log)
    address = next(word for word in job.log.split() if word.startswith("http://"))
    assert address.startswith("http://127.0.0.1:")
    assert scrape(address) == {("twotower_up", ()): 0}
    job.signal(signal.SIGTERM)
    assert job.end() == 0
    assert job.last_line()["port"] == int(address.split(":")[2].split("/")[0])
    assert "Traceback" not in job.log


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_port_is_a_number(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        status.main(["--db", "db", f"--metrics={port}"])
    assert ended.value.code == 2
    assert "takes a port from 0 to 65535" in capsys.readouterr().err


def test_a_port_in_use_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert status.main(["--db", str(tmp_path), "--metrics", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
