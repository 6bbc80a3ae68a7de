"""The writer's lease: one holder, and a way on when it died, slept, or has another idea of the time."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from job_process import environment

from pipeline.errors import LeaseHeld, LeaseLost, RunError, RunInterrupted
from pipeline.store import holder as holder_module
from pipeline.store import lease as lease_module
from pipeline.store.lease import Lease, read_lease
from pipeline.store.tables import Database

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys, time
from pipeline.errors import TwotowerError
from pipeline.store.lease import Lease
from pipeline.store.tables import Database
lease = Lease(Database(sys.argv[1]), run_id=sys.argv[2], job="backfill", ttl_s=float(sys.argv[3]))
try:
    lease.acquire(wait_s=float(sys.argv[4]))
    print("held", flush=True)
    sys.stdin.readline()
    lease.check()
    print("still held", flush=True)
except TwotowerError as error:
    print(type(error).__name__, error, flush=True)
"""
RACER = """
import sys
from pipeline.errors import LeaseHeld
from pipeline.store.lease import Lease
from pipeline.store.tables import Database
won = []
print("ready", flush=True)
for line in sys.stdin:
    lease = Lease(Database(line.strip()), run_id=sys.argv[1], job="backfill", ttl_s=60)
    try:
        lease.acquire()
        print("won", flush=True)
    except LeaseHeld:
        print("lost", flush=True)
    sys.stdin.readline()
    lease.release()
    print("over", flush=True)
"""


class Clock:
    """A clock that a test sets; `shift` is added to the real one."""

    def __init__(self, base=time.time) -> None:
        self.base, self.shift = base, 0.0

    def __call__(self) -> float:
        return self.base() + self.shift


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database(str(tmp_path / "db"))


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(processes: list[subprocess.Popen[str]], code: str, *arguments: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    processes.append(process)
    return process


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], line: str = "") -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def held(db: Database, run_id: str = "a", ttl_s: float = 60, **clocks) -> Lease:
    lease = Lease(db, run_id=run_id, job="backfill", ttl_s=ttl_s, **clocks)
    lease.acquire()
    return lease


def test_a_lease_that_could_not_be_given_back_is_free_for_this_process(tmp_path: Path) -> None:
    """Its row says that it is held, by a process that lives: this one, which knows better."""
    db = Database(str(tmp_path / "db"))
    first = Lease(db, run_id="a", job="backfill")
    first.acquire()
    held = read_lease(db)
    assert held is not None
    first.release()
    lease_module._swap(db, db.latest_version("lease"), held)
    second = Lease(db, run_id="b", job="backfill")
    second.acquire()
    with pytest.raises(LeaseHeld):
        Lease(db, run_id="c", job="backfill").acquire()
    second.release()


def test_a_lease_is_held_by_one_and_given_back(db: Database) -> None:
    assert read_lease(db) is None
    first = held(db, "first")
    holder = read_lease(db)
    assert holder is not None
    assert (holder.run_id, holder.job, holder.ttl_s) == ("first", "backfill", 60)
    assert not holder.has_died
    second = Lease(db, run_id="second", job="reindex")
    with pytest.raises(LeaseHeld, match=r"another run holds the database .*: backfill first on host .*pid \d+.* since"):
        second.acquire()
    assert first.is_held
    assert not second.is_held
    with pytest.raises(LeaseLost, match="was not acquired"):
        second.check()
    first.check()
    second.release()  # what is not held is not given back
    first.check()
    first.release()
    first.release()
    assert read_lease(db) is None
    second.acquire()
    with pytest.raises(LeaseLost):
        first.check()
    second.release()


def test_a_table_that_a_dead_run_began_is_no_table(db: Database) -> None:
    (Path(db.uri) / "lease.lance" / "_versions").mkdir(parents=True)
    assert read_lease(db) is None
    held(db).release()


def test_one_of_many_processes_wins_each_round(tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    racers = [start(processes, RACER, f"r{number}") for number in range(4)]
    assert [told(racer) for racer in racers] == ["ready"] * 4
    winners = []
    for round_ in range(12):
        where = str(tmp_path / f"db{round_ // 4}")  # every fourth round creates the table
        for racer in racers:
            tell(racer, where)
        outcomes = [told(racer) for racer in racers]
        assert Counter(outcomes) == {"won": 1, "lost": 3}, outcomes
        winners.append(outcomes.index("won"))
        for racer in racers:
            tell(racer)
        assert [told(racer) for racer in racers] == ["over"] * 4


def test_one_of_many_threads_wins_each_round(db: Database) -> None:
    for _ in range(5):
        leases = [Lease(db, run_id=f"t{number}", job="backfill") for number in range(8)]
        outcomes: list[str] = []

        def race(lease: Lease, outcomes: list[str] = outcomes) -> None:
            try:
                lease.acquire()
                outcomes.append("won")
            except LeaseHeld:
                outcomes.append("lost")

        threads = [threading.Thread(target=race, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["lost"] * 7 + ["won"]
        for lease in leases:
            lease.release()


def test_a_killed_holder_is_succeeded_at_once(db: Database, processes: list[subprocess.Popen[str]]) -> None:
    holder = start(processes, HOLDER, db.uri, "dead", 600, 0)
    assert told(holder) == "held"
    with pytest.raises(LeaseHeld):
        held(db, "next")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    record = read_lease(db)
    assert record is not None
    assert record.has_died
    held(db, "next").release()


def test_another_systems_process_is_not_looked_for_here(
    db: Database, processes: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = start(processes, HOLDER, db.uri, "dead", 600, 0)
    assert told(holder) == "held"
    holder.kill()
    holder.wait()
    monkeypatch.setattr(holder_module, "system_id", lambda: "another boot")
    with pytest.raises(LeaseHeld):
        held(db, "next")


def test_a_suspended_holder_loses_the_lease_and_notices(db: Database, processes: list[subprocess.Popen[str]]) -> None:
    holder = start(processes, HOLDER, db.uri, "asleep", 1.5, 0)
    assert told(holder) == "held"
    holder.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    lease = Lease(db, run_id="next", job="backfill", ttl_s=60)
    lease.acquire(wait_s=30)
    assert 0.5 < time.monotonic() - began < 10
    holder.send_signal(signal.SIGCONT)
    tell(holder)
    assert told(holder).startswith("LeaseLost the lease of ")
    lease.check()
    lease.release()


def test_a_holder_that_slept_unnoticed_goes_on(db: Database, processes: list[subprocess.Popen[str]]) -> None:
    holder = start(processes, HOLDER, db.uri, "asleep", 1, 0)
    assert told(holder) == "held"
    holder.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    holder.send_signal(signal.SIGCONT)
    tell(holder)
    assert told(holder) == "still held"


def test_a_lease_is_renewed_and_its_versions_do_not_pile_up(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_CLEAN_EVERY", 5)
    monkeypatch.setattr(lease_module, "_KEPT_VERSIONS", 3)
    lease = held(db, ttl_s=0.3)
    time.sleep(4)
    with pytest.raises(LeaseHeld):
        held(db, "next")
    lease.check()
    table = Path(db.uri) / "lease.lance"
    assert db.latest_version("lease") > 12
    assert len(list((table / "_versions").glob("*.manifest"))) <= 3 + 5 + 1
    assert len(list((table / "data").iterdir())) <= 3 + 5 + 1
    lease.release()


def test_waiting_ends_with_the_holder_or_a_signal(db: Database) -> None:
    first = held(db, ttl_s=3)
    timer = threading.Timer(1, first.release)
    timer.start()
    second = Lease(db, run_id="b", job="backfill")
    second.acquire(wait_s=60)
    timer.join()

    def interrupted() -> None:
        raise RunInterrupted("stopped")

    third = Lease(db, run_id="c", job="backfill")
    with pytest.raises(RunInterrupted):
        third.acquire(wait_s=60, check=interrupted)
    began = time.monotonic()
    with pytest.raises(LeaseHeld):
        third.acquire(wait_s=1.5)
    assert 1.5 <= time.monotonic() - began < 5
    second.release()


def unrenewed(db: Database, clock: Clock, ttl_s: float = 1.0) -> Lease:
    """A lease whose holder is alive and never renews again."""
    lease = held(db, "silent", ttl_s, clock=clock)
    lease._ended.set()
    return lease


def test_a_silent_holder_is_succeeded_after_its_time(db: Database) -> None:
    silent = unrenewed(db, Clock())
    with pytest.raises(LeaseHeld):
        held(db, "early")
    time.sleep(1.1)
    lease = held(db, "late")
    with pytest.raises(LeaseLost, match="taken over by backfill late"):
        silent.check()
    assert not silent.is_held
    silent.release()
    lease.check()
    lease.release()


@pytest.mark.parametrize("shift", [86_400.0, 2.0])
def test_a_dead_holder_from_the_future_costs_one_wait(db: Database, shift: float) -> None:
    clock = Clock()
    clock.shift = shift
    unrenewed(db, clock)
    began = time.monotonic()
    held(db, "next").release()
    assert 0.9 < time.monotonic() - began < 6


def test_a_living_holder_from_the_future_keeps_its_lease(db: Database) -> None:
    clock = Clock()
    clock.shift = 86_400
    first = held(db, "future", 1.0, clock=clock)
    with pytest.raises(LeaseHeld, match="renewed 0 s ago"):
        held(db, "next")
    with pytest.raises(LeaseHeld):
        Lease(db, run_id="next", job="backfill").acquire(wait_s=2.5)
    first.check()
    first.release()


def test_a_clock_that_is_set_back_loses_nothing(db: Database) -> None:
    clock = Clock()
    first = held(db, "first", 1.0, clock=clock)
    clock.shift = -86_400
    time.sleep(1.2)
    first.check()
    # To others it seems to have expired a day ago: they take it, and the holder is told.
    second = held(db, "second", 60)
    time.sleep(0.5)
    with pytest.raises(LeaseLost):
        first.check()
    second.release()


def test_a_clock_that_jumps_ahead_is_renewed_before_it_goes_on(db: Database) -> None:
    clock = Clock()
    first = held(db, "first", 60, clock=clock)
    clock.shift = 3600
    first.check()
    record = read_lease(db)
    assert record is not None
    assert record.renewed_at.timestamp() == pytest.approx(time.time() + 3600, abs=10)
    first.release()


def test_a_lease_that_cannot_be_renewed_is_lost_in_time(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monotonic = Clock(time.monotonic)
    lease = held(db, ttl_s=60, monotonic=monotonic)

    def broken(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(lease_module, "write_fragments", broken)
    monkeypatch.setattr(lease_module.lance.LanceDataset, "commit", broken)
    monotonic.shift = 40
    lease.check()
    monotonic.shift = 61
    with pytest.raises(LeaseLost, match="could not be renewed for 60 s: No space left"):
        lease.check()


def test_an_answer_that_was_lost_is_looked_up(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lease_module.lance.LanceDataset.commit

    def commit(*arguments: object, **options: object) -> None:
        real(*arguments, **options)
        raise OSError("connection reset")

    monkeypatch.setattr(lease_module.lance.LanceDataset, "commit", commit)
    lease = held(db)
    lease.check()
    lease.release()
    assert read_lease(db) is None


def test_a_database_that_cannot_be_written_is_told(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("Read-only file system")

    monkeypatch.setattr(lease_module, "write_fragments", broken)
    with pytest.raises(RunError, match="could not be read or written: Read-only"):
        held(db)
