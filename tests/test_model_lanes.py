"""Batches beside each other, each on one core: all of them, in order, towers first, and nobody's threads changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model import load_model
from pipeline.model.lanes import Lanes
from pipeline.model.model import Model
from pipeline.run.progress import Busy


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tiny_model: str) -> Model:
    return load_model(tiny_model)


def test_results_come_in_order_and_each_lane_has_one_core() -> None:
    lanes = Lanes()
    assert lanes.count == 3
    assert torch.get_num_threads() == 3, "whoever starts lanes keeps their own number"
    assert lanes.map(lambda batch: (batch, torch.get_num_threads()), range(20)) == [(batch, 1) for batch in range(20)]
    assert lanes.submit(torch.get_num_threads).result() == 1
    new: list[int] = []
    thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert new == [3], "and so does a thread that comes later"


def test_a_batch_that_fails_is_told_when_the_others_are_done() -> None:
    lanes = Lanes()
    done: list[int] = []

    def run(batch: int) -> None:
        if batch == 1:
            raise MemoryError("batch 1")
        time.sleep(0.05)
        done.append(batch)

    with pytest.raises(MemoryError, match="batch 1"):
        lanes.map(run, range(6))
    assert sorted(done) == [0, 2, 3, 4, 5]
    assert lanes.map(lambda batch: batch, [7]) == [7]


def test_towers_come_first() -> None:
    torch.set_num_threads(1)
    lanes = Lanes()
    ran: list[str] = []
    has_begun, is_held = threading.Event(), threading.Event()

    def hold() -> None:
        has_begun.set()
        is_held.wait()

    lanes.submit(hold)
    assert has_begun.wait(60), "the one lane is taken; had it not yet been, it would take the first batch"
    others = [lanes.submit(ran.append, f"other {at}") for at in range(2)]
    mapping = threading.Thread(target=lambda: lanes.map(ran.append, ["batch 0", "batch 1"]))
    mapping.start()
    until = time.monotonic() + 60
    while len(lanes._batches) < 2:
        assert time.monotonic() < until
        time.sleep(0.001)
    is_held.set()
    mapping.join()
    for future in others:
        future.result()
    assert ran == ["batch 0", "batch 1", "other 0", "other 1"]


def test_seconds_of_towers_are_counted_once_where_they_overlap() -> None:
    spent: list[float] = []
    busy = Busy(spent.append)
    lanes = Lanes(busy)
    begun, idle = time.perf_counter(), busy.idle_clock()
    lanes.map(lambda _: time.sleep(0.2), range(3))
    wall = time.perf_counter() - begun
    assert lanes.towers_s == pytest.approx(0.6, abs=0.2)
    assert 0.2 <= sum(spent) <= wall
    assert busy.idle_clock() - idle == pytest.approx(time.perf_counter() - begun - sum(spent), abs=0.01)


def test_vectors_are_those_of_one_batch(model: Model) -> None:
    size = model.recipe.size
    crops = np.random.default_rng(0).integers(0, 256, (400, size, size, 3), dtype=np.uint8)
    texts = [f"a {'long ' * (at % 40)}coat, number {at}" for at in range(300)]
    torch.set_num_threads(1)
    images_alone, texts_alone = model.embed_crops(crops, batch=400), model.embed_texts(texts)
    torch.set_num_threads(3)
    before = model.n_batches
    assert np.abs(model.embed_crops(crops) - images_alone).max() < 1e-5
    assert (model.n_batches - before) % 3 == 0, "as many as there are lanes, or a multiple"
    assert np.abs(model.embed_texts(texts) - texts_alone).max() < 1e-5
    assert model.text_counts.n_texts == 600


@given(total=st.integers(1, 5_000), most=st.integers(1, 500))
def test_shares_of_a_total(model: Model, total: int, most: int) -> None:
    shares = model._shares("image", total, most)
    each = -(-total // shares)
    assert 1 <= each <= most
    fewest = -(-total // most)
    assert fewest <= shares < fewest + 3
    assert shares == fewest or total / shares >= most / 4, "no smaller than they need be"


def test_a_single_query_takes_all_cores_unless_all_runs_in_lanes(tiny_model: str) -> None:
    model = load_model(tiny_model)
    model.embed_texts(["a coat"])
    assert model._lanes is None
    lanes = model.run_in_lanes()
    assert lanes is not None
    model.embed_texts(["a coat"])
    assert lanes.towers_s > 0
    compiled = load_model(tiny_model)
    compiled.replace_forward("text", compiled.text_tower.forward)
    assert compiled.run_in_lanes() is None
