"""SIGTERM and SIGINT, whenever they come: a sentence, exit code 1, nothing left running, and a run that can go on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from job_process import JobProcess
from small_catalog import assert_equal_tables, items, write_products

from jobs.cli import run_job
from pipeline.config import Config, load_config
from pipeline.errors import RunInterrupted
from pipeline.run.backfill import backfill
from pipeline.run.signals import Stop
from pipeline.run.staging import file_sha256
from pipeline.run.tasks import run_tasks

PARTITIONS, PRODUCTS, IMAGES = 8, 20, 4
ENDS_WITHIN_S = 60  # a few seconds on a machine that has nothing else to do; a Ray that is starting starts first


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Enough to be in the middle of it."""
    groups = [items(PRODUCTS, images=IMAGES, seed=seed) for seed in range(PARTITIONS)]
    return str(write_products(tmp_path_factory.mktemp("catalog"), groups))


def start(catalog: str, model: str, tmp_path: Path) -> JobProcess:
    arguments = ["--catalog", catalog, "--db", str(tmp_path / "db"), "--model", model, "--json"]
    return JobProcess(arguments, tmp_path / "job")


def config(catalog: str, model: str, db: Path) -> Config:
    return load_config(sets=["pool.actors=1"], catalog_uri=catalog, db=str(db), model_name=model)


def entries(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "db" / "_staging").glob("*.json"))


def assert_interrupted(job: JobProcess, sentence: str) -> None:
    """The whole contract of an interrupted job."""
    since = time.monotonic()
    assert job.end() == 1
    assert time.monotonic() - since < ENDS_WITHIN_S
    told = job.last_line()
    assert told["kind"] == "RunInterrupted"
    assert sentence in told["error"]
    assert f"error: {told['error']}" in job.log
    assert "Traceback" not in job.log
    assert job.left_behind() == []


@pytest.mark.ray
def test_sigterm_while_embedding_keeps_what_was_staged(
    catalog: str, tiny_model: str, tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    job = start(catalog, tiny_model, tmp_path)
    job.wait_until(lambda: entries(tmp_path))
    job.signal(signal.SIGTERM)
    assert_interrupted(job, "run the same command to go on")
    staged = [json.loads(path.read_text())["entry"] for path in entries(tmp_path)]
    assert 0 < len(staged) < PARTITIONS
    assert all(file_sha256(file["path"]) == file["sha256"] for entry in staged for file in entry["files"])
    assert {path.name for path in (tmp_path / "db").iterdir()} == {"_reports", "_staging", "lease.lance", "runs.lance"}

    with caplog.at_level("INFO", logger="pipeline"):
        resumed = backfill(config(catalog, tiny_model, tmp_path / "db"))
    assert f"{len(staged)} of {PARTITIONS} partitions are staged already" in caplog.text
    assert resumed["released"]
    assert resumed["embedded"] == resumed["inputs"] == PARTITIONS * PRODUCTS * (1 + IMAGES)
    assert entries(tmp_path) == []
    backfill(config(catalog, tiny_model, tmp_path / "undisturbed"))
    assert_equal_tables(tmp_path / "db", tmp_path / "undisturbed")


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_every_process(catalog: str, tiny_model: str, tmp_path: Path) -> None:
    job = start(catalog, tiny_model, tmp_path)
    job.wait_until(lambda: entries(tmp_path))
    job.signal(signal.SIGINT, to_group=True)
    assert_interrupted(job, "run the same command to go on")


@pytest.mark.ray
@pytest.mark.slow
def test_a_second_signal_ends_at_once(catalog: str, tiny_model: str, tmp_path: Path) -> None:
    job = start(catalog, tiny_model, tmp_path)
    job.wait_until(lambda: entries(tmp_path))
    job.signal(signal.SIGTERM)
    job.wait_until(lambda: "SIGTERM: ending in order" in job.log)
    job.signal(signal.SIGTERM)
    assert job.end() == -signal.SIGTERM
    assert job.left_behind(within_s=120) == []  # Ray's agents look for their parent now and then


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "child",
    [
        pytest.param("gcs_server", id="Ray starts"),
        pytest.param("EmbedWorker", id="the model is loaded"),
    ],
)
def test_a_signal_before_any_work(child: str, catalog: str, tiny_model: str, tmp_path: Path) -> None:
    job = start(catalog, tiny_model, tmp_path)
    job.wait_until(lambda: any(child in name for name in job.children()))
    job.signal(signal.SIGTERM)
    assert_interrupted(job, "run the same command")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_during_the_imports(number: signal.Signals, tiny_model: str, tmp_path: Path) -> None:
    job = start("nowhere", tiny_model, tmp_path)
    # The catalog is looked at after the imports, so the end tells whether the signal came before that.
    job.wait_until(lambda: "lance" in Path(f"/proc/{job.pid}/maps").read_text())
    job.signal(number)
    assert_interrupted(job, "run the same command again")
    assert not (tmp_path / "db").exists()


def test_a_flag_takes_both_signals_and_gives_them_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with Stop().installed() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the next one ends the process
        with pytest.raises(RunInterrupted, match="what was staged is kept"):
            stop.check()
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_flag_in_another_thread_leaves_the_signals_alone() -> None:
    seen: list[object] = []

    def look() -> None:
        with Stop().installed():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_without_a_run_ends_with_a_sentence(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def job() -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    assert run_job(job, as_json=True) == 1
    assert json.loads(capsys.readouterr().out) == {
        "error": "stopped by a signal; run the same command again",
        "kind": "RunInterrupted",
    }
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.ray
@pytest.mark.parametrize("is_brief", [True, False])
def test_reduction_stops(is_brief: bool, ray_session: None) -> None:
    stop = Stop()
    calls: list[Callable[[], None]] = [lambda: time.sleep(60)]
    threading.Timer(0.5, stop.set).start()
    since = time.monotonic()
    if is_brief:
        time.sleep(0.7)  # a brief call is made in this process, but not after the signal
    with pytest.raises(RunInterrupted):
        run_tasks(lambda call: call(), [(call,) for call in calls], stop=stop, is_brief=is_brief)
    assert time.monotonic() - since < ENDS_WITHIN_S
