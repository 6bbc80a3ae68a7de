"""Several runs on one database at once: no duplicate, no lost update; each ends with 0 or with a sentence."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import Fault, FaultyJob, arguments, assert_latest_is_release, run_here, run_until_done
from small_catalog import Item, assert_equal_tables, items, write_products

from pipeline.store.releases import list_releases

pytestmark = [pytest.mark.slow, pytest.mark.ray]

MEETINGS = {
    "starts": "pipeline.run.backfill:plan_rows",
    "releases": "pipeline.run.backfill:release",
    "commits": "pipeline.run.release:commit",
    "release rows": "pipeline.run.release:publish",
}
"""Where all three wait for each other, so that each does the next step at the same moment."""


UNLEASED = pytest.mark.xfail(strict=False, reason="there is no writer's lease yet")


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


@pytest.mark.parametrize(
    "meeting",
    [pytest.param(name, marks=[] if name == "starts" else [UNLEASED]) for name in MEETINGS],
)
def test_three_runs_at_once(meeting: str, catalogs: list[Path], union: Path, tiny_model: str, tmp_path: Path) -> None:
    db = tmp_path / "db"
    base, *added = catalogs
    assert run_here(arguments(base, db, tiny_model)).code == 0
    (tmp_path / "meeting").mkdir()
    fault = Fault(MEETINGS[meeting], "meet", is_once=False, parties=len(added))
    env = {"FAULT_MEETING": str(tmp_path / "meeting")}
    with ExitStack() as stack:
        jobs = [
            stack.enter_context(FaultyJob(arguments(c, db, tiny_model), tmp_path / f"job{i}", [fault], env))
            for i, c in enumerate(added)
        ]
        codes = [job.end() for job in jobs]
        told = [job.process.last_line() for job in jobs]
        assert sum(bool(job.events("meet")) for job in jobs) >= 1
        for job, code, line in zip(jobs, codes, told, strict=True):
            assert "Traceback" not in job.process.log, job.process.log
            assert code == 0 or (code == 1 and line["error"]), job.process.log
    print(f"{meeting}: {[line.get('error', 'released') for line in told]}")
    assert 0 in codes, "nobody won"
    assert_latest_is_release(db)
    for catalog, code in zip(added, codes, strict=True):
        if code:
            run_until_done(arguments(catalog, db, tiny_model))
    assert_latest_is_release(db)
    assert_equal_tables(db, union)
    assert [release.release for release in list_releases(str(db))] == [1, 2, 3, 4]
