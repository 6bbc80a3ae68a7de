"""Calls that take turns, so that what else the machine does meets all of them alike; and a result as a row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

TURNS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        part: which part of the benchmark.
        what: what was measured.
        rate: units a second, the median of the turns.
        low: of the slowest turn.
        high: of the quickest.
        unit: of the rate, such as `images/s`.
        ratio: to what `beside` names, the median of the turns' own ratios; None where there is nothing beside.
        beside: what the ratio is to.
        aim: the ratio that is aimed at; None without one.
    """

    part: str
    what: str
    rate: float
    low: float
    high: float
    unit: str
    ratio: float | None = None
    beside: str = ""
    aim: float | None = None


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of each turn, of calls that took turns."""

    seconds: Mapping[str, tuple[float, ...]]

    def ratio(self, name: str, beside: str) -> float:
        """How many times as quick as another: the median over turns."""
        pairs = zip(self.seconds[beside], self.seconds[name], strict=True)
        return statistics.median(other / own for other, own in pairs)

    def row(
        self,
        part: str,
        name: str,
        units: float,
        unit: str,
        *,
        beside: str = "",
        aim: float | None = None,
        what: str = "",
    ) -> Row:
        """One call's rate.

        Args:
            part: of the benchmark.
            name: of the call.
            units: how many units one call does.
            unit: of the rate.
            beside: another call, for a ratio of times.
            aim: for that ratio.
            what: the row's name where it is another one than the call's.
        """
        rates = [units / seconds for seconds in self.seconds[name]]
        ratio = self.ratio(name, beside) if beside else None
        return Row(part, what or name, statistics.median(rates), min(rates), max(rates), unit, ratio, beside, aim)


def in_turns(calls: Mapping[str, Callable[[], object]], *, turns: int = TURNS, warm: bool = True) -> Timed:
    """Call each once to warm it up, and then all in turns.

    Args:
        calls: by name.
        turns: how often each is timed.
        warm: whether the first, untimed calls are made.
    """
    if warm:
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begun)
    return Timed({name: tuple(found) for name, found in seconds.items()})
