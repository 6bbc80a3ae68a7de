"""Which rows are worked on next: a pure class, so that any order of faults can be tried without a cluster."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

_FIRST_BATCH_ROWS = 64  # what a batch is cut from when memory runs out; catalog.partitions reads no larger ones
_SHRINK = 4
_ROW_ATTEMPTS = 2  # a row alone: it was in every crash that led to it, and one more could still be chance
_ROWS_IN_A_ROW = 4  # as many rows side by side may each kill a worker before the fault is taken for another one
MAX_LOSSES = 10


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows of a partition that one worker embeds at a time: all of them, or a part after crashes.

    Attributes:
        partition: its name.
        first_row: the first row, numbered as in the file.
        stop_row: the row after the last one.
        attempt: counts from 1; another number makes another unit of the same rows.
        batch_rows: rows read at a time; None: as the catalog does.
        is_suspect: a worker died over these rows; they run alone, so that a further crash is theirs for certain.
    """

    partition: str
    first_row: int
    stop_row: int
    attempt: int = 1
    batch_rows: int | None = None
    is_suspect: bool = False

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop_row - self.first_row


class Schedule:
    """Every row ends in a finished unit or is condemned, exactly once; or the run fails, after bounded attempts.

    A crash is charged to the unit that was running. A whole partition is tried `max_attempts` times, then halved until
    the row that kills its worker is alone, and condemned. A partition in which nothing but crashes happens, and a run
    with more than `max_crashes`, fail: then it is not the rows.

    Args:
        partitions: name to first row and row after the last, in the order in which they are wanted.
        max_attempts: how often a whole partition whose worker died is tried.
        max_crashes: of the whole run.
    """

    def __init__(self, partitions: Mapping[str, tuple[int, int]], *, max_attempts: int, max_crashes: int = 100) -> None:
        self._pending = deque(Unit(name, first, stop) for name, (first, stop) in partitions.items())
        self._spans = dict(partitions)
        self._running: set[Unit] = set()
        self._open = Counter(dict.fromkeys(partitions, 1))  # units of a partition that have not ended
        self._crashes: Counter[tuple[str, int, int]] = Counter()
        self._in_a_row: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._condemned: list[tuple[Unit, str]] = []
        self._max_attempts = max_attempts
        self._max_crashes = max_crashes
        self.crashes = 0
        self.failure: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing is pending or running, or the run has failed."""
        return self.failure is not None or not (self._pending or self._running or self._condemned)

    @property
    def unfinished(self) -> int:
        """Units that are pending or running."""
        return len(self._pending) + len(self._running)

    def take(self, *, is_idle: bool = True) -> Unit | None:
        """The next unit for a worker, or None; a suspect one only for a worker that has no other work."""
        for place, unit in enumerate(self._pending):
            if is_idle or not unit.is_suspect:
                del self._pending[place]
                self._running.add(unit)
                return unit
        return None

    def finish(self, unit: Unit) -> bool:
        """The unit is staged. Returns whether its partition is complete with it."""
        self._running.remove(unit)
        self._in_a_row[unit.partition] = 0
        return self._end(unit)

    def give_back(self, unit: Unit) -> None:
        """The unit's worker went away before it began: it goes to the front, at no charge."""
        self._running.remove(unit)
        self._pending.appendleft(unit)

    def lose(self, unit: Unit, detail: str) -> None:
        """The worker's node, or the way to it, went away: the unit is tried again at no charge, though not for ever."""
        self.give_back(unit)
        self._losses[unit.partition] += 1
        if self._losses[unit.partition] >= MAX_LOSSES:
            self._fail(f"the workers of {unit.partition} went away {MAX_LOSSES} times ({detail})")

    def run_out_of_memory(self, unit: Unit, detail: str) -> None:
        """Memory ran out: the unit is tried with smaller batches, alone; with single rows it counts as a crash."""
        rows = min(unit.batch_rows or _FIRST_BATCH_ROWS, unit.rows)
        if rows == 1:
            self.crash(unit, detail)
            return
        self._running.remove(unit)
        smaller = replace(unit, attempt=unit.attempt + 1, batch_rows=max(1, rows // _SHRINK), is_suspect=True)
        self._pending.appendleft(smaller)

    def crash(self, unit: Unit, detail: str) -> None:
        """The worker died, or had to be ended, while it ran the unit."""
        self._running.remove(unit)
        self.crashes += 1
        self._in_a_row[unit.partition] += 1
        key = (unit.partition, unit.first_row, unit.stop_row)
        self._crashes[key] += 1
        is_whole = self._spans[unit.partition] == key[1:]
        wanted = self._max_attempts if is_whole else _ROW_ATTEMPTS if unit.rows == 1 else 1
        again = replace(unit, attempt=unit.attempt + 1, is_suspect=True)
        if self._crashes[key] < wanted:
            (self._pending.append if is_whole else self._pending.appendleft)(again)
        elif unit.rows > 1:
            middle = unit.first_row + unit.rows // 2
            self._pending.extendleft([replace(again, first_row=middle), replace(again, stop_row=middle)])
            self._open[unit.partition] += 1
        else:
            self._condemned.append((unit, detail))
        self._give_up_if_hopeless(unit, detail)

    def take_condemned(self) -> Iterator[tuple[Unit, str, bool]]:
        """Rows that kill every worker, with the last reason, and whether their partition is complete with them."""
        while self._condemned:
            unit, detail = self._condemned.pop()
            yield unit, detail, self._end(unit)

    def _end(self, unit: Unit) -> bool:
        self._open[unit.partition] -= 1
        return not self._open[unit.partition]

    def _give_up_if_hopeless(self, unit: Unit, detail: str) -> None:
        first, stop = self._spans[unit.partition]
        to_a_row = self._max_attempts + (stop - first).bit_length() + _ROW_ATTEMPTS * _ROWS_IN_A_ROW
        if self._in_a_row[unit.partition] > to_a_row:
            self._fail(
                f"the worker died {self._in_a_row[unit.partition]} times in a row on {unit.partition} ({detail})"
            )
        elif self.crashes > self._max_crashes:
            self._fail(f"workers died {self.crashes} times, the last time on {unit.partition} ({detail})")

    def _fail(self, sentence: str) -> None:
        self.failure = self.failure or sentence
