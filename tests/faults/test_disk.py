"""Disks that are full or read-only, files that vanish, change or rot, clocks that jump: a sentence or a clean redo."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from harness import (
    Ended,
    Fault,
    FaultyJob,
    arguments,
    assert_done,
    assert_readers_have,
    entries,
    run_here,
    run_until_done,
)
from season import PARTITIONS, Season
from small_catalog import assert_equal_tables, items, write_products

from pipeline.errors import RunInterrupted
from pipeline.run import backfill as job
from pipeline.store import releases
from pipeline.store.releases import newest_release

pytestmark = [pytest.mark.slow, pytest.mark.ray]

DAY_S = 86_400
SMALL_DISK_BYTES = 300_000


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A mount for the block; skips where this user may not."""
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_a_sentence(ended: Ended, *words: str) -> None:
    """The run failed, said so in one sentence, and names what it is about."""
    assert ended.code in (1, 2), ended.told
    assert ended.log.count("error: ") == 1
    for word in words:
        assert word in ended.told["error"], ended.told["error"]


def assert_nothing_happened(db: Path, season: Season) -> None:
    assert_readers_have(db, {1: season.before})


def later(monkeypatch: pytest.MonkeyPatch, stage: str, act: Callable[[], None], *, is_after: bool = False) -> None:
    """Do something once, when the run in this process comes to that stage."""
    run: Callable[..., Any] = getattr(job, stage)

    def with_act(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(job, stage, run)
        if not is_after:
            act()
        result = run(*args, **kwargs)
        if is_after:
            act()
        return result

    monkeypatch.setattr(job, stage, with_act)


def interrupt() -> None:
    raise RunInterrupted("stopped by the test; run the same command to go on")


# Full and read-only disks


def test_a_full_staging_disk(season: Season, tmp_path: Path) -> None:
    db, staging = season.copy(tmp_path), tmp_path / "staging"
    staging.mkdir()
    with mounted(staging, "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs"):
        assert_a_sentence(run_here(season.arguments(db, f"staging.path={staging}")), "No space left")
        assert not list(staging.glob("*.tmp")), "what cannot be used still fills the disk"
    assert_nothing_happened(db, season)
    run_until_done(season.arguments(db, f"staging.path={staging}"))
    assert_done(db, season.after)


@pytest.mark.parametrize("spare_bytes", [50_000, 400_000], ids=["at once", "on the way"])
def test_a_full_database_disk(spare_bytes: int, season: Season, tmp_path: Path) -> None:
    """The disk has room for the released database and a little more; staging lies elsewhere."""
    disk, db = tmp_path / "disk", tmp_path / "disk" / "db"
    disk.mkdir()
    held = sum(4096 * (path.stat().st_size // 4096 + 1) for path in season.before.rglob("*") if path.is_file())
    with mounted(disk, "-t", "tmpfs", "-o", f"size={held + spare_bytes}", "tmpfs"):
        shutil.copytree(season.before, db)
        given = season.arguments(db, f"staging.path={tmp_path / 'staging'}")
        assert_a_sentence(run_here(given), "No space left")
        assert_nothing_happened(db, season)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        run_until_done(given)
        assert_done(db, season.after)


def test_no_space_without_a_mount(season: Season, tmp_path: Path) -> None:
    """What the tests above show with real disks, by an injected error, for people who may not mount."""
    db = season.copy(tmp_path)
    fault = Fault("pipeline.run.staging:StagedWriter.write", "fail", nth=2, error="ENOSPC")
    with FaultyJob(season.arguments(db), tmp_path / "job", [fault]) as process:
        assert process.end() == 1, process.process.log
        assert process.events("fail")
        assert "Traceback" not in process.process.log
        assert "No space left" in process.process.last_line()["error"]
    assert_nothing_happened(db, season)
    run_until_done(season.arguments(db))
    assert_done(db, season.after)


def test_a_read_only_database(season: Season, tmp_path: Path) -> None:
    db = season.copy(tmp_path)
    with mounted(db, "--bind", str(db)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(db)], check=True)
        ended = run_here(season.arguments(db))
        assert_a_sentence(ended, "not writable", str(db))
        assert ended.code == 2
        assert_nothing_happened(db, season)


@pytest.mark.parametrize("stage", ["stage", "load", "release"])
def test_a_database_that_becomes_read_only(
    stage: str, season: Season, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = season.copy(tmp_path)
    with mounted(db, "--bind", str(db)):
        later(monkeypatch, stage, lambda: remount(db, "ro"))
        assert_a_sentence(run_here(season.arguments(db)), "Read-only")
        assert_nothing_happened(db, season)
        remount(db, "rw")
        run_until_done(season.arguments(db))
        assert_done(db, season.after)


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,bind,{how}", str(folder)], check=True)


# A catalog that does not stay as it was


@pytest.fixture
def moving(season: Season, tmp_path: Path) -> tuple[Path, Path, list[str]]:
    """A copy of the new catalog, a database with release 1, and the arguments."""
    catalog = Path(shutil.copytree(season.new, tmp_path / "catalog"))
    db = season.copy(tmp_path)
    return catalog, db, arguments(catalog, db, season.model)


def test_a_catalog_file_that_vanishes(
    moving: tuple[Path, Path, list[str]], season: Season, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, db, given = moving
    victim = sorted(catalog.rglob("*.parquet"))[3]
    later(monkeypatch, "make_plan", victim.unlink, is_after=True)
    assert_a_sentence(run_here(given), str(victim))
    assert_nothing_happened(db, season)


def test_a_catalog_file_that_is_cut_short(
    moving: tuple[Path, Path, list[str]], season: Season, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, db, given = moving
    victim = sorted(catalog.rglob("*.parquet"))[3]
    half = victim.read_bytes()[: victim.stat().st_size // 2]
    later(monkeypatch, "make_plan", lambda: victim.write_bytes(half) and None, is_after=True)
    assert_a_sentence(run_here(given), str(victim))
    assert_nothing_happened(db, season)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(slice(None, None, -1), id="another order"),
        pytest.param("more", id="more row groups"),
    ],
)
def test_a_catalog_file_that_is_rewritten(
    rows: slice | str, moving: tuple[Path, Path, list[str]], season: Season, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either a sentence and nothing released, or what a run over the rewritten catalog gives."""
    catalog, db, given = moving
    files = sorted(catalog.rglob("*.parquet"))
    found = pq.read_table(files[3])
    new = found if isinstance(rows, str) else found.take(list(range(found.num_rows))[rows])

    def rewrite() -> None:
        pq.write_table(new, files[3], row_group_size=10 if rows == "more" else 100)

    later(monkeypatch, "make_plan", rewrite, is_after=True)
    ended = run_here(given)
    if ended.code:
        assert_a_sentence(ended)
        assert_nothing_happened(db, season)
        run_until_done(given)
    again = season.copy(db.parent / "again")
    run_until_done(arguments(catalog, again, season.model))
    assert_equal_tables(db, again)


# What rots in the staging folder


@pytest.fixture
def staged(season: Season, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database whose run was stopped when everything was staged."""
    db = season.copy(tmp_path)
    later(monkeypatch, "load", interrupt)
    assert run_here(season.arguments(db)).code == 1
    assert len(entries(db)) == PARTITIONS
    return db


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    path.write_bytes(data)


def one_more(path: Path) -> None:
    entry = json.loads(path.read_text())
    entry["entry"]["counts"]["embedded"] += 1
    path.write_text(json.dumps(entry))


def staged_file(path: Path) -> Path:
    return Path(json.loads(path.read_text())["entry"]["files"][0]["path"])


ROT: list[Callable[[Path], object]] = [
    lambda entry: flip(staged_file(entry)),
    lambda entry: staged_file(entry).unlink(),
    lambda entry: entry.write_bytes(entry.read_bytes()[:-20]),
    one_more,
]


def test_what_rotted_is_embedded_again(staged: Path, season: Season) -> None:
    for rot, entry in zip(ROT, entries(staged)[1:], strict=False):
        rot(entry)
    ended = run_until_done(season.arguments(staged), attempts=2)
    assert f"resuming: {PARTITIONS - len(ROT)} of {PARTITIONS} partitions" in ended.log
    assert_done(staged, season.after)


def test_a_staged_file_that_rots_after_it_was_checked(
    season: Season, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a wrong table: either it is noticed, or it did no harm."""
    db = season.copy(tmp_path)
    later(monkeypatch, "load", lambda: flip(staged_file(entries(db)[2])))
    ended = run_here(season.arguments(db))
    if ended.code:
        assert_a_sentence(ended)
        assert_nothing_happened(db, season)
        run_until_done(season.arguments(db))
    assert_done(db, season.after)


# Clocks


@pytest.mark.parametrize("days", [-400, 1])
def test_a_clock_that_jumps(days: int, season: Season, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the start of a run and its release, and again before the next one."""
    db = season.copy(tmp_path)
    clock, now = time.time, releases.now

    def jump() -> None:
        monkeypatch.setattr(time, "time", lambda: clock() + days * DAY_S)
        for module in (
            "pipeline.store.releases",
            "pipeline.store.history",
            "pipeline.run.release",
            "pipeline.run.backfill",
        ):
            monkeypatch.setattr(f"{module}.now", lambda: now() + timedelta(days=days))

    later(monkeypatch, "load", jump)
    ended = run_here(season.arguments(db))
    assert (ended.code, ended.told["release"]) == (0, 2), ended.log
    assert_done(db, season.after)
    monkeypatch.undo()
    added = write_products(tmp_path / "added", [items(5)])
    ended = run_here(arguments(added, db, season.model))
    assert (ended.code, ended.told["release"]) == (0, 3), ended.log
    newest = newest_release(str(db))
    assert newest is not None
    assert (newest.release, newest.parent) == (3, 2)
