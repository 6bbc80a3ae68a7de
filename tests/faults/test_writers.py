"""Several runs on one database at once: no duplicate, no lost update; each ends with 0 or with a sentence."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import Fault, FaultyJob, arguments, assert_latest_is_release, run_here, run_until_done
from small_catalog import Item, assert_equal_tables, items, write_products

from pipeline.store.releases import list_releases

pytestmark = [pytest.mark.slow, pytest.mark.ray]

START, RELEASE = "pipeline.run.backfill:make_plan", "pipeline.run.backfill:release"
NO_LEASE = ("pipeline.store.lease:Lease._is_free", "pipeline.store.lease:Lease.check")


def edited(products: list[Item]) -> list[Item]:
    return [Item(i.product_id, f"{i.title}, reduced", i.description, i.images, price=0.5) for i in products]


@pytest.fixture(scope="module")
def catalogs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What is released, what two backfills add, and a re-index of half of what is released; in any order the same."""
    folder = tmp_path_factory.mktemp("catalogs")
    base = items(12, seed=1)
    contents = [base, items(9, seed=2), items(11, seed=3), edited(base[:6])]
    return [write_products(folder / str(i), [rows[::2], rows[1::2]]) for i, rows in enumerate(contents)]


@pytest.fixture(scope="module")
def union(tmp_path_factory: pytest.TempPathFactory, catalogs: list[Path], tiny_model: str, ray_session: None) -> Path:
    """The database when they run one after another."""
    db = tmp_path_factory.mktemp("union") / "db"
    for catalog in catalogs:
        assert run_here(arguments(catalog, db, tiny_model)).code == 0
    return db


@pytest.mark.parametrize("when_held", ["stop", "wait", "replan", "nobody asks"])
def test_three_runs_at_once(when_held: str, catalogs: list[Path], union: Path, tiny_model: str, tmp_path: Path) -> None:
    """All three wait for each other and then take the next step: as they start, and where no lease keeps them apart,
    as they release."""
    db = tmp_path / "db"
    base, *added = catalogs
    assert run_here(arguments(base, db, tiny_model)).code == 0
    (tmp_path / "meeting").mkdir()
    env = {"FAULT_MEETING": str(tmp_path / "meeting")}
    is_kept_apart = when_held != "nobody asks"
    faults = [Fault(START if is_kept_apart else RELEASE, "meet", is_once=False, parties=len(added))]
    if not is_kept_apart:  # a lease that is taken from whoever holds it, who does not notice
        faults += [Fault(at, "say_yes", nth=0, is_once=False) for at in NO_LEASE]
    sets = [f"lease.when_held={when_held}"] if is_kept_apart else []
    with ExitStack() as stack:
        jobs = [
            stack.enter_context(FaultyJob(arguments(c, db, tiny_model, *sets), tmp_path / f"job{i}", faults, env))
            for i, c in enumerate(added)
        ]
        codes = [job.end() for job in jobs]
        told = [job.process.last_line() for job in jobs]
        for job, code, line in zip(jobs, codes, told, strict=True):
            assert job.events("meet")
            assert "Traceback" not in job.process.log, job.process.log
            assert code == 0 or (code == 1 and line["error"]), job.process.log
    print(f"{when_held}: {[line.get('error', 'released') for line in told]}")
    if when_held in ("wait", "replan"):
        assert codes == [0, 0, 0], told
    if is_kept_apart:
        assert 0 in codes, "nobody won"
        assert_latest_is_release(db)
    for catalog, code in zip(added, codes, strict=True):
        if code:
            run_until_done(arguments(catalog, db, tiny_model))
    assert_latest_is_release(db)
    assert_equal_tables(db, union)
    assert [release.release for release in list_releases(str(db))] == [1, 2, 3, 4]
