"""Workers that die, hang or run out of memory: the run goes on, and one bad row costs that row alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from harness import (
    NOTE_BEGIN,
    POISON,
    STAGE,
    Fault,
    FaultyJob,
    arguments,
    assert_done,
    assert_latest_is_release,
    run_here,
)
from season import Season
from small_catalog import Item, assert_equal_tables, items, jpeg, table, write_products

pytestmark = [pytest.mark.slow, pytest.mark.ray]

DECODE = "pipeline.model.model:Model.prepare_image"
TOWERS = "pipeline.model.model:Model.embed_crops"
FINISH = "pipeline.run.embed:Embedder.finish"
GROUPS = [items(8, seed=seed) for seed in range(4)]
BAD = Item("poisoned", "a coat whose picture kills", None, [jpeg(5000) + POISON.encode()])
STALL_S, MEMORY_BYTES = 6, 2_000_000_000
ENDS_WITHIN_S = 240  # bisection starts an actor for each crash: 4 s each on an idle machine


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 products in 4 partitions, and one more whose image holds the poison."""
    groups = [*GROUPS[:2], [*GROUPS[2][:5], BAD, *GROUPS[2][5:]], GROUPS[3]]
    return write_products(tmp_path_factory.mktemp("poisoned") / "catalog", groups)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, ray_session: None) -> Path:
    """The database of an undisturbed run over the same products without the bad one."""
    folder = tmp_path_factory.mktemp("clean")
    ended = run_here(arguments(write_products(folder / "catalog", GROUPS), folder / "db", tiny_model))
    assert ended.code == 0, ended.log
    return folder / "db"


def assert_only_the_bad_row_is_lost(db: Path, clean: Path) -> None:
    """One product in rejects, as worker_crashed; all others as in the clean run."""
    rejects = table(db, "rejects").to_pylist()
    assert {(row["product_id"], row["reason"]) for row in rejects} == {(BAD.product_id, "worker_crashed")}
    assert_latest_is_release(db)
    for name in ("products", "images"):
        found = [row for row in table(db, name).to_pylist() if row["product_id"] != BAD.product_id]
        wanted = table(clean, name).to_pylist()
        keys = "image_id" if name == "images" else "product_id"
        assert [row[keys] for row in found] == [row[keys] for row in wanted]


def test_an_actor_that_is_killed_is_replaced(season: Season, tmp_path: Path) -> None:
    db = season.copy(tmp_path)
    with FaultyJob(season.arguments(db), tmp_path / "job", [Fault(FINISH, "kill_self", "after", nth=2)]) as job:
        assert job.end() == 0, job.process.log
        assert len(job.events("kill_self")) == 1
        assert "actor 0 is lost over" in job.process.log
    assert_done(db, season.after)


def test_a_node_that_is_killed_is_done_without(season: Season, tmp_path: Path) -> None:
    db = season.copy(tmp_path)
    given = season.arguments(db, "pool.actors=2", "pool.cpus_per_actor=1")
    command = [str(Path(__file__).with_name("three_nodes.py"))]
    faults = [Fault(FINISH, "kill_raylet", "after", nth=2)]
    with FaultyJob(given, tmp_path / "job", faults, command=command) as job:
        code = job.end()
        assert len(job.events("kill_raylet")) == 1, job.process.log
        assert code == 0, job.process.log
    assert_done(db, season.after)


def test_a_node_that_comes_late_gets_work_and_one_that_leaves_is_done_without(tiny_model: str, tmp_path: Path) -> None:
    catalog = write_products(tmp_path / "catalog", [items(4, seed=seed) for seed in range(40)])
    reference = run_here(arguments(catalog, tmp_path / "reference", tiny_model))
    assert reference.code == 0, reference.log
    command = [str(Path(__file__).with_name("moving_nodes.py"))]
    given = ["--catalog", str(catalog), "--db", str(tmp_path / "db"), "--model", tiny_model]
    faults = [NOTE_BEGIN, Fault(STAGE, "linger", "before", nth=0, is_once=False)]
    with FaultyJob(given, tmp_path / "job", faults, command=command) as job:
        code = job.end()
        assert code == 0, job.process.log
        told = job.process.last_line()
    actors = told["actors"]
    slots = {(actor["node_id"], actor["gpu_ids"][0]) for actor in actors}
    assert len(slots) == len(actors) == 3, "two GPUs of the first node, one of the late one"
    assert sorted(gpu for _, gpu in slots) == ["0", "0", "1"]
    assert len({event["pid"] for event in job.events("note")}) == 3, "each of them was used"
    assert_done(tmp_path / "db", tmp_path / "reference")


def test_a_row_that_kills_the_process_every_time_is_rejected_alone(
    poisoned: Path, clean: Path, tiny_model: str, tmp_path: Path
) -> None:
    fault = Fault(DECODE, "crash", nth=0, is_once=False, poison=POISON)
    with FaultyJob(arguments(poisoned, tmp_path / "db", tiny_model), tmp_path / "job", [fault]) as job:
        code = job.end(ENDS_WITHIN_S)
        crashes = job.events("crash")
        assert code == 0, job.process.log
    assert 1 <= len(crashes) <= 3 + 2 * 4, "three attempts, and a few halves"
    assert len({event["pid"] for event in crashes}) == len(crashes)
    assert_only_the_bad_row_is_lost(tmp_path / "db", clean)


@pytest.mark.parametrize("action", ["hang", "hang_in_c"])
def test_an_actor_that_hangs_is_ended(
    action: str, poisoned: Path, clean: Path, tiny_model: str, tmp_path: Path
) -> None:
    fault = Fault(DECODE, action, nth=0, is_once=False, poison=POISON)
    given = arguments(poisoned, tmp_path / "db", tiny_model, f"pool.stall_timeout_s={STALL_S}", "pool.max_attempts=1")
    with FaultyJob(given, tmp_path / "job", [fault]) as job:
        code = job.end(ENDS_WITHIN_S)
        assert job.events(action), job.process.log
        assert "Traceback" not in job.process.log
        told = job.process.last_line()
        assert job.left_behind() == []
    if code:
        assert (code, "stall_timeout_s" in told["error"]) == (1, True)
    else:
        assert_only_the_bad_row_is_lost(tmp_path / "db", clean)


def without_the_bad_one(folder: Path) -> Path:
    return write_products(folder / "catalog", GROUPS)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(TOWERS, "out_of_memory", over_rows=6), id="once"),  # a canary has fewer
        pytest.param(Fault(TOWERS, "out_of_memory", nth=0, is_once=False, over_rows=6), id="over six images"),
    ],
)
def test_memory_that_runs_out_on_large_batches(fault: Fault, clean: Path, tiny_model: str, tmp_path: Path) -> None:
    given = arguments(without_the_bad_one(tmp_path), tmp_path / "db", tiny_model)
    with FaultyJob(given, tmp_path / "job", [fault]) as job:
        code = job.end(ENDS_WITHIN_S)
        assert job.events("out_of_memory")
        assert code == 0, job.process.log
    assert_equal_tables(tmp_path / "db", clean)


def test_memory_over_the_actors_limit_on_one_batch(clean: Path, tiny_model: str, tmp_path: Path) -> None:
    """The memory is really used; the limit has to end it. Smaller batches stay below."""
    fault = Fault(TOWERS, "use_memory", nth=0, is_once=False, over_rows=6)
    limit = f"pool.memory_per_actor_bytes={MEMORY_BYTES}"
    given = arguments(without_the_bad_one(tmp_path), tmp_path / "db", tiny_model, limit)
    with FaultyJob(given, tmp_path / "job", [fault]) as job:
        code = job.end(ENDS_WITHIN_S)
        assert job.events("use_memory")
        assert code == 0, job.process.log
    assert_equal_tables(tmp_path / "db", clean)


def test_memory_that_runs_out_on_every_batch_ends_the_run(tiny_model: str, tmp_path: Path) -> None:
    limit = f"pool.memory_per_actor_bytes={MEMORY_BYTES}"
    given = arguments(without_the_bad_one(tmp_path), tmp_path / "db", tiny_model, limit)
    since = time.monotonic()
    with FaultyJob(given, tmp_path / "job", [Fault(FINISH, "use_memory", nth=0, is_once=False)]) as job:
        code = job.end(ENDS_WITHIN_S)
        told = job.process.last_line()
        assert job.events("use_memory"), job.process.log
        assert code == 1, job.process.log
        assert "memory" in told["error"].lower()
        assert "Traceback" not in job.process.log
    assert time.monotonic() - since < ENDS_WITHIN_S
