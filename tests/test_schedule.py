from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.run.schedule import Schedule


@settings(max_examples=300)
@given(st.integers(0, 12), st.integers(1, 4), st.lists(st.tuples(st.sampled_from("tfcg"), st.integers(0, 5))))
def test_every_partition_ends_done_or_failed_exactly_once(n: int, attempts: int, faults: list[tuple[str, int]]) -> None:
    """Any order of starts, ends, crashes and lost workers, then quiet: nothing is lost, doubled or tried for ever."""
    names = [f"p{i}" for i in range(n)]
    schedule = Schedule(names, max_attempts=attempts)
    running: list[str] = []
    crashes = dict.fromkeys(names, 0)
    finished: list[str] = []
    for action, index in [*faults, *[("t", 0), ("f", 0)] * (n * 2 + 10)]:
        if action == "t" and (name := schedule.take()) is not None:
            assert name not in running
            running.append(name)
        elif running and action != "t":
            name = running.pop(index % len(running))
            if action == "f":
                schedule.finish(name)
                finished.append(name)
            elif action == "c":
                schedule.crash(name, "died")
                crashes[name] += 1
            else:
                schedule.give_back(name)
    assert schedule.is_over
    assert sorted(finished) == sorted(schedule.done)
    assert schedule.done | set(schedule.failed) == set(names)
    assert not schedule.done & set(schedule.failed)
    assert all(crashes[name] == attempts for name in schedule.failed)
    assert all(count <= attempts for count in crashes.values())


def test_a_partition_given_back_is_the_next_one() -> None:
    schedule = Schedule(["a", "b", "c"], max_attempts=1)
    assert [schedule.take(), schedule.take()] == ["a", "b"]
    schedule.give_back("a")
    assert schedule.take() == "a"
