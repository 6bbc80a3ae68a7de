"""The schedule under any order of faults, with an executor that is a few lists."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.run.schedule import MAX_LOSSES, Schedule, Unit


class Executor:
    """Workers with queues, as the pool keeps them; what happens to the running unit is drawn.

    Args:
        sizes: rows of each partition.
        workers: how many.
        poison: rows (partition, row) that kill a worker whenever they are run.
        odds: of an innocent crash, a lost worker, a memory fault and a finish; anything for each step.
    """

    def __init__(self, sizes: list[int], workers: int, poison: set[tuple[str, int]], seed: int) -> None:
        self.spans = {f"p{i}": (10 * i, 10 * i + rows) for i, rows in enumerate(sizes)}
        self.schedule = Schedule(self.spans, max_attempts=3, max_crashes=60)
        self.queues: list[list[Unit]] = [[] for _ in range(workers)]
        self.poison = poison
        self.random = random.Random(seed)
        self.done: Counter[tuple[str, int]] = Counter()
        self.condemned: Counter[tuple[str, int]] = Counter()
        self.complete: Counter[str] = Counter()
        self.starts: Counter[tuple[str, int, int]] = Counter()

    def run(self, faults: float) -> None:
        """Until it is over; `faults` is the share of steps in which something happens by chance."""
        steps = 0
        while not self.schedule.is_over:
            steps += 1
            assert steps < 20_000, "it does not end"
            self.hand_out()
            busy = [queue for queue in self.queues if queue]
            assert busy, "pending units, idle workers, and nothing is handed out"
            self.step(self.random.choice(busy), faults)

    def hand_out(self) -> None:
        for queue in self.queues:
            while len(queue) < 2 and not any(unit.is_suspect for unit in queue):
                unit = self.schedule.take(is_idle=not queue)
                if unit is None:
                    break
                queue.append(unit)
            assert len(queue) == 1 or not any(unit.is_suspect for unit in queue), "a suspect unit runs alone"

    def step(self, queue: list[Unit], faults: float) -> None:
        unit = queue.pop(0)
        self.starts[unit.partition, unit.first_row, unit.stop_row] += 1
        rows = [(unit.partition, row) for row in range(unit.first_row, unit.stop_row)]
        fault = self.random.choice("clm") if self.random.random() < faults else ""
        if fault == "m":
            self.schedule.run_out_of_memory(unit, "memory")
        elif fault == "c" or self.poison & set(rows):
            self.schedule.crash(unit, "crash")
        elif fault == "l":
            self.schedule.lose(unit, "node")
        else:
            self.done.update(rows)
            self.complete[unit.partition] += self.schedule.finish(unit)
            return
        for waiting in reversed(queue):
            self.schedule.give_back(waiting)
        queue.clear()
        for condemned, _, is_complete in self.schedule.take_condemned():
            assert condemned.rows == 1
            self.condemned[condemned.partition, condemned.first_row] += 1
            self.complete[condemned.partition] += is_complete

    def check(self) -> None:
        """Nothing twice, attempts bounded; and nothing missing unless the run failed."""
        assert not self.done.keys() & self.condemned.keys()
        assert set((self.done + self.condemned).values()) <= {1}
        assert all(count <= 3 + MAX_LOSSES + 4 for count in self.starts.values())
        assert self.schedule.crashes <= 61
        everything = {(name, row) for name, (first, stop) in self.spans.items() for row in range(first, stop)}
        if self.schedule.failure is None:
            assert self.done.keys() | self.condemned.keys() == everything
            assert self.complete == Counter(dict.fromkeys(self.spans, 1))


@settings(max_examples=10_000, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=6), st.integers(1, 3), st.floats(0, 0.6), st.integers(0, 2**32))
def test_every_row_ends_done_or_rejected_exactly_once(sizes: list[int], workers: int, faults: float, seed: int) -> None:
    executor = Executor(sizes, workers, set(), seed)
    executor.run(faults)
    executor.check()


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 2**32), st.data())
def test_poison_rows_alone_are_condemned(sizes: list[int], workers: int, seed: int, data: st.DataObject) -> None:
    bad = data.draw(st.sets(st.integers(0, len(sizes) - 1), max_size=3))
    poison = {(f"p{i}", 10 * i + data.draw(st.integers(0, sizes[i] - 1))) for i in bad}
    executor = Executor(sizes, workers, poison, seed)
    executor.run(faults=0)
    executor.check()
    assert executor.schedule.failure is None
    assert executor.condemned.keys() == poison


def test_a_partition_given_back_is_the_next_one() -> None:
    schedule = Schedule({"a": (0, 5), "b": (0, 5), "c": (0, 5)}, max_attempts=1)
    first, second = schedule.take(), schedule.take()
    assert first is not None
    assert second is not None
    assert (first.partition, second.partition) == ("a", "b")
    schedule.give_back(first)
    assert schedule.take() == first


def test_where_everything_crashes_the_run_fails() -> None:
    schedule = Schedule({"a": (0, 1000)}, max_attempts=3, max_crashes=100)
    condemned = 0
    while not schedule.is_over:
        unit = schedule.take()
        assert unit is not None
        schedule.crash(unit, "Segmentation fault")
        condemned += len(list(schedule.take_condemned()))
    assert "in a row on a (Segmentation fault)" in str(schedule.failure)
    assert condemned <= 5


def test_memory_shrinks_the_batch_before_it_counts_as_a_crash() -> None:
    schedule = Schedule({"a": (0, 100)}, max_attempts=1)
    seen = []
    while schedule.crashes == 0:
        unit = schedule.take()
        assert unit is not None
        seen.append(unit.batch_rows)
        schedule.run_out_of_memory(unit, "no memory")
    assert seen == [None, 16, 4, 1]


def test_workers_that_go_away_are_no_crash_but_bounded() -> None:
    schedule = Schedule({"a": (0, 100)}, max_attempts=1)
    for _ in range(MAX_LOSSES):
        assert schedule.failure is None
        unit = schedule.take()
        assert unit is not None
        schedule.lose(unit, "the node died")
    assert schedule.crashes == 0
    assert "went away 10 times (the node died)" in str(schedule.failure)
