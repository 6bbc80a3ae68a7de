"""Jobs with faults in them: started with a fault, watched, and cleared away with every process that they started."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import lance
from job_process import BACKFILL, CHECKOUT, JobProcess
from small_catalog import assert_equal_tables, table

from jobs.backfill import main
from pipeline.store.releases import Release, list_releases, newest_release
from pipeline.store.schemas import TABLES

INJECT = Path(__file__).parent / "inject"
STAGE = "pipeline.run.partition:stage_partition"
ACTORS, PARTITIONS_PER_ACTOR = 1, 2
SETTINGS = (f"pool.actors={ACTORS}", "pool.gpus_per_actor=0", f"pool.partitions_per_actor={PARTITIONS_PER_ACTOR}")
ENDS_WITHIN_S = 300  # what takes 15 s on an idle machine
GONE_WITHIN_S = 90  # Ray's agents look for their parent now and then


@dataclass(frozen=True)
class Fault:
    """What happens, and where.

    Attributes:
        at: `module:function` or `module:Class.method`.
        action: a key of `injected_faults.ACTIONS`.
        when: before or after the function.
        nth: which call of a process; 0 for every one.
        is_once: in one process of the job only.
        poison: only where an argument is an image that holds these letters; empty: everywhere.
        over_rows: only where the last argument is longer than that.
        memory_bytes: how much is used where no limit ends it before.
        error: name of an errno.
        parties: how many processes wait for each other.
    """

    at: str
    action: str = "kill_driver"
    when: str = "before"
    nth: int = 1
    is_once: bool = True
    poison: str = ""
    over_rows: int | None = None
    memory_bytes: int = 4 << 30
    error: str = "ENOSPC"
    parties: int = 0

    def __str__(self) -> str:
        return f"{self.action} {self.when} {self.at}#{self.nth}"


POISON = "twotower-poison"
NOTE_BEGIN = Fault(STAGE, "note", nth=0, is_once=False)
NOTE_END = Fault(STAGE, "note", "after", nth=0, is_once=False)


class FaultyJob:
    """A backfill in a process of its own, with faults; leaving the block ends whatever it left running.

    Args:
        arguments: of the job.
        folder: where its output and log are written.
        faults: what goes wrong.
        env: more environment variables.
        command: what Python runs.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        faults: Sequence[Fault],
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = BACKFILL,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._tag = f"FAULT_TAG={uuid.uuid4().hex}"
        self._log = folder / "faults.jsonl"
        env = {**(env or {}), **self.environment(faults)}
        self.process = JobProcess([*arguments, "--json"], folder, env, command)

    def environment(self, faults: Sequence[Fault]) -> dict[str, str]:
        """What makes every process of a job one of this harness."""
        name, value = self._tag.split("=")
        return {
            "PYTHONPATH": f"{INJECT}{os.pathsep}{CHECKOUT}",
            "FAULTS": json.dumps([asdict(fault) for fault in faults]),
            "FAULT_LOG": str(self._log),
            name: value,
        }

    def __enter__(self) -> FaultyJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end_processes(self._tag)

    def end(self, timeout_s: float = ENDS_WITHIN_S) -> int:
        """Wait for the job's end; its exit code, negative for a signal."""
        return self.process.end(timeout_s)

    def kill_after(self, seconds: float) -> int:
        """Wait for some time, or the job's end, and kill it; its exit code."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.is_running():
            time.sleep(0.01)
        if self.process.is_running():
            self.process.signal(signal.SIGKILL)
        return self.end()

    def events(self, action: str | None = None, when: str | None = None) -> list[dict[str, Any]]:
        """What came true, in order."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        events = [json.loads(line) for line in lines]
        return [e for e in events if action in (None, e["action"]) and when in (None, e["when"])]

    def begun(self) -> set[str]:
        """Partitions that an actor began to embed; the job needs `NOTE_BEGIN`."""
        return {name for event in self.events("note", "before") for name in event["names"]}

    def left_behind(self) -> list[str]:
        """What still runs after the time that Ray takes to notice."""
        return left_behind(self._tag)


def arguments(catalog: Path | str, db: Path | str, model: str, *sets: str) -> list[str]:
    """Of a backfill, with the settings that all runs here share."""
    settings = [word for value in (*SETTINGS, *sets) for word in ("--set", value)]
    return ["--catalog", str(catalog), "--db", str(db), "--model", model, *settings]


@dataclass(frozen=True)
class Ended:
    """How a run in this process ended."""

    code: int
    told: dict[str, Any]
    log: str


def run_here(given: Sequence[str]) -> Ended:
    """The same command in this process, on the Ray that is up: what a job does, at less cost than a process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*given, "--json"])
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return Ended(code, json.loads(out.getvalue().splitlines()[-1]), err.getvalue())


def run_until_done(given: Sequence[str], attempts: int = 3) -> Ended:
    """Run the same command again until it exits with 0: the first of the runs, with the end of the last."""
    first = run_here(given)
    ended, log = first, first.log
    for _ in range(attempts - 1):
        if ended.code == 0:
            break
        ended = run_here(given)
        log += ended.log
    assert ended.code == 0, log
    return Ended(ended.code, ended.told, log)


def entries(db: Path | str) -> list[Path]:
    """The ledger's files."""
    return sorted(Path(db, "_staging").glob("*.json"))


def assert_latest_is_release(db: Path | str) -> None:
    """Outside of a commit, the latest version of each table is the newest release."""
    release = newest_release(str(db))
    assert release is not None
    for name in TABLES:
        found, pinned = table(db, name), table(db, name, release.versions[name])
        assert found.equals(pinned), f"{name}: the latest version is not release {release.release}"


def assert_release_is(db: Path | str, release: Release, reference: Path | str) -> None:
    """The tables at a release's versions are those of another database's newest release."""
    other = newest_release(str(reference))
    assert other is not None
    assert_equal_tables(db, reference, release.versions, other.versions)


def assert_readers_have(db: Path | str, allowed: Mapping[int, Path | str]) -> int:
    """The newest release is one of those, whole; the number. By release number, the database that holds the same."""
    release = newest_release(str(db))
    assert release is not None, "readers have nothing"
    assert release.release in allowed, f"readers have release {release.release}, expected one of {sorted(allowed)}"
    assert_release_is(db, release, allowed[release.release])
    return release.release


def assert_done(db: Path | str, reference: Path | str) -> None:
    """The run ended as an undisturbed one: tables, releases without gap, nothing staged any more."""
    assert_latest_is_release(db)
    assert_equal_tables(db, reference)
    numbers = [release.release for release in list_releases(str(db))]
    assert numbers == list(range(1, len(numbers) + 1))
    assert entries(db) == []
    for name, key in (("products", "product_id"), ("images", "image_id")):
        ids = lance.dataset(f"{db}/{name}.lance").to_table(columns=[key]).column(key).to_pylist()
        assert len(ids) == len(set(ids)), f"{name} holds a key twice"


def left_behind(tag: str, within_s: float = GONE_WITHIN_S) -> list[str]:
    """Command lines of a job's processes that run after that time."""
    until = time.monotonic() + within_s
    while (found := tagged(tag)) and time.monotonic() < until:
        time.sleep(0.2)
    return list(found.values())


def tagged(tag: str) -> dict[int, str]:
    """Pid to command line of every process that was started with the tag in its environment."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
                if tag.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if line:
                        found[int(entry.name)] = line
    return found


def end_processes(tag: str) -> None:
    """Kill what a job left, so that no test runs beside it."""
    while found := tagged(tag):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def products_of(db: Path | str, release: Release) -> Iterator[dict[str, Any]]:
    """Rows of a release's products, without vectors."""
    found = lance.dataset(f"{db}/products.lance", version=release.versions["products"])
    columns = [field.name for field in found.schema if not field.name.endswith("_vector")]
    yield from found.to_table(columns=columns).to_pylist()
