"""SIGKILL of the driver, at named points and at random: nothing lost, nothing doubled, readers see whole releases."""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import (
    ACTORS,
    NOTE_BEGIN,
    PARTITIONS_PER_ACTOR,
    STAGE,
    Fault,
    FaultyJob,
    arguments,
    assert_done,
    assert_readers_have,
    entries,
    run_until_done,
)
from season import PARTITIONS, Season

from pipeline.errors import QueryError
from pipeline.query import Searcher
from pipeline.store.releases import newest_release

pytestmark = [pytest.mark.slow, pytest.mark.ray]

POINTS = {
    "staged rename": ("pipeline.run.staging:StagedWriter.__exit__", 3),
    "ledger entry": ("pipeline.run.ledger:Ledger.record", 3),
    "fragments written": ("pipeline.store.tables:write_rows", 2),
    "commit of products": ("pipeline.store.commits:replace_rows", 1),
    "commit of images": ("pipeline.store.commits:replace_rows", 2),
    "commit of rejects": ("pipeline.store.commits:replace_rows", 3),
    "commit of catalog rows": ("pipeline.store.commits:replace_rows", 5),
    "index": ("pipeline.store.folding:fold_indices", 1),
    "verification": ("pipeline.store.verify:verify", 1),
    "tags of the run": ("pipeline.store.releases:tag", 2),
    "release row": ("lance.dataset:MergeInsertBuilder.execute", 1),
    "tags of the release": ("pipeline.store.releases:tag", 7),
    "ledger forgotten": ("pipeline.run.ledger:Ledger.forget", 1),
}
"""Name to the function and its call."""

LIKE_OTHERS = ("commit of rejects", "commit of catalog rows", "index", "tags of the run")
"""Between two commits as after the one of images, and before the release row as after verification: by hand only."""
MOMENTS = [(point, "after") for point in POINTS if point not in LIKE_OTHERS]
MOMENTS += [("staged rename", "before"), ("release row", "before")]
"""What is before one point is after another, but for the first."""

RELEASED = ("release row after", "tags of the release", "ledger forgotten")
"""Where readers have the new release already."""

FIRST_LOAD = {
    "commit of images": ("pipeline.store.commits:replace_all", 2),
    "release row": ("lance.dataset:MergeInsertBuilder.execute", 1),
}
RANDOM_KILLS = 4
IN_FLIGHT = ACTORS * PARTITIONS_PER_ACTOR


def resume(season: Season, db: Path, job: FaultyJob, reference: Path) -> None:
    """Run the command again until it is done; compare the end, and what was done twice."""
    begun, staged = job.begun(), len(entries(db))
    is_released = newest_release(str(db)) is not None and newest_release(str(db)).release == 2  # type: ignore[union-attr]
    ended = run_until_done(season.arguments(db))
    assert_done(db, reference)
    if is_released:
        return  # some of the ledger may be gone by then; its inputs are reused from the release
    resumed = re.search(r"resuming: (\d+) of \d+ partitions are staged already", ended.log)
    assert staged == (int(resumed[1]) if resumed else 0)
    assert 0 <= len(begun) - staged <= IN_FLIGHT, f"{len(begun)} partitions were begun, {staged} were kept"


@pytest.mark.parametrize(("point", "when"), MOMENTS)
def test_a_kill_at(point: str, when: str, season: Season, tmp_path: Path) -> None:
    db = season.copy(tmp_path)
    at, nth = POINTS[point]
    with FaultyJob(season.arguments(db), tmp_path / "job", [NOTE_BEGIN, Fault(at, when=when, nth=nth)]) as job:
        code = job.end()
        assert len(job.events("kill_driver")) == 1, f"the fault did not come true: {job.process.log}"
        assert code == -9
        expected = {2: season.after} if f"{point} {when}".startswith(RELEASED) else {1: season.before}
        assert_readers_have(db, expected)
        assert Searcher.open(db, model=season.model).search("red dress", k=3)
        # At once, as people do: the actors of the run that was killed may still be at work.
        resume(season, db, job, season.after)


@pytest.mark.parametrize("point", FIRST_LOAD)
def test_a_kill_in_the_first_load(point: str, season: Season, tmp_path: Path) -> None:
    db = tmp_path / "db"
    at, nth = FIRST_LOAD[point]
    given = arguments(season.old, db, season.model)
    with FaultyJob(given, tmp_path / "job", [Fault(at, nth=nth)]) as job:
        assert job.end() == -9
        assert len(job.events("kill_driver")) == 1
        assert newest_release(str(db)) is None
        with pytest.raises(QueryError, match="Nothing is released"):
            Searcher.open(db)
    run_until_done(given)
    assert_done(db, season.before)


@pytest.mark.parametrize("point", ["staged rename"])
def test_a_kill_leaves_nothing_running(point: str, season: Season, tmp_path: Path) -> None:
    at, nth = POINTS[point]
    with FaultyJob(season.arguments(season.copy(tmp_path)), tmp_path / "job", [Fault(at, nth=nth)]) as job:
        assert job.end() == -9
        assert job.left_behind() == []


@pytest.fixture(scope="module")
def duration_s(season: Season, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Of an undisturbed run as a process, with the harness in it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    db = season.copy(folder)
    since = time.monotonic()
    with FaultyJob(season.arguments(db), folder / "job", [NOTE_BEGIN]) as job:
        assert job.end() == 0, job.process.log
        seconds = time.monotonic() - since
        assert len(job.begun()) == PARTITIONS, f"{STAGE} is not what stages a partition any more"
        assert job.left_behind() == []
    assert_done(db, season.after)
    return seconds


@pytest.mark.parametrize("number", range(RANDOM_KILLS))
def test_a_kill_at_any_moment(number: int, duration_s: float, season: Season, tmp_path: Path) -> None:
    kill_somewhere(random.Random(number).uniform(0, duration_s), season, tmp_path)


@dataclass(frozen=True)
class Killed:
    """What a kill met: the release that readers had then, partitions begun and staged by then, how the run went on."""

    release: int
    begun: int
    staged: int
    resumed_s: float


def kill_somewhere(seconds: float, season: Season, folder: Path) -> Killed:
    """Kill a run after that time, look as a reader, run it again until it is done, compare."""
    db = season.copy(folder)
    with FaultyJob(season.arguments(db), folder / "job", [NOTE_BEGIN]) as job:
        assert job.kill_after(seconds) in (-9, 0)
        release = assert_readers_have(db, {1: season.before, 2: season.after})
        begun, staged = len(job.begun()), len(entries(db))
        since = time.monotonic()
        resume(season, db, job, season.after)
    return Killed(release, begun, staged, time.monotonic() - since)
