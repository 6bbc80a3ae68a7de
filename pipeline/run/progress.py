"""How far a run is: counts, busy and wait seconds, told as a bar on a terminal or a plain line every ten seconds."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from pipeline.records import Reason

log = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0
_BAR_WIDTH = 24
_TIMING = threading.Lock()
STAGES = ("read", "fetch", "decode", "tokenise", "towers", "write")
WAITS = {
    "room": "read",
    "fetched": "read",
    "fetch_idle": "fetch",
    "decode_idle": "decode",
    "batch": "towers",
    "decoded": "towers",
}
"""What is waited for, and by which stage: the reader for room in its queue and for bytes that are fetched; the fetch
and decode threads for work; the towers for a prepared batch and for decoded images. Tokenising and writing wait for
nothing."""
_NOT_COUNTS = ("seconds", "waits", "reasons", "tower_batches", "ready_batches")


@dataclass
class Progress:
    """Counts and seconds, as they grow; those of fetch and decode are summed over threads.

    A block's seconds are added when it ends: a worker that hangs tells the same progress again and again, which is how
    it is known.

    Attributes:
        tower_batches: that went through a tower; a sign of life, and no count of the run.
        ready_batches: that are prepared and wait for the towers, at this moment.
        seconds: busy, by stage; of tokenising and writing, which go on beside the towers, what these stood still for.
        waits: idle, by what was waited for.
        reasons: rejected inputs and rows.
    """

    rows: int = 0
    products: int = 0
    texts: int = 0
    images: int = 0
    embedded: int = 0
    reused: int = 0
    rejected: int = 0
    rejected_rows: int = 0
    truncated_texts: int = 0
    fetch_failed: int = 0
    tower_batches: int = 0
    ready_batches: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    waits: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WAITS, 0.0))
    reasons: dict[str, int] = field(default_factory=lambda: dict.fromkeys(map(str, Reason), 0))

    @contextmanager
    def timed(self, stage: str, beside: Busy | None = None) -> Iterator[None]:
        """Add the block's wall time to a stage, less what another one was busy meanwhile."""
        start = _clock(beside)
        try:
            yield
        finally:
            self.spend(stage, _clock(beside) - start)

    @contextmanager
    def waited(self, cause: str, beside: Busy | None = None) -> Iterator[None]:
        """Add the block's wall time to what was waited for, likewise."""
        start = _clock(beside)
        try:
            yield
        finally:
            self.wait(cause, _clock(beside) - start)

    def wait(self, cause: str, seconds: float) -> None:
        """Add seconds to what was waited for."""
        with _TIMING:
            self.waits[cause] += seconds

    def spend(self, stage: str, seconds: float) -> None:
        """Add busy seconds to a stage."""
        with _TIMING:
            self.seconds[stage] += seconds

    def add(
        self, counts: Mapping[str, int], seconds: Mapping[str, float], waits: Mapping[str, float] | None = None
    ) -> None:
        """Add the counts, stage seconds and waits of a part."""
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)
        for stage, spent in seconds.items():
            self.seconds[stage] += spent
        for cause, waited in (waits or {}).items():
            self.waits[cause] += waited

    def counts(self) -> dict[str, int]:
        """The counts alone."""
        return {name: value for name, value in vars(self).items() if name not in _NOT_COUNTS}


class Busy:
    """Wall time in which at least one of several threads works; safe for them.

    Args:
        spend: told the seconds as they pass, at the latest when the last thread is done.
    """

    def __init__(self, spend: Callable[[float], None]) -> None:
        self._spend, self._lock = spend, threading.Lock()
        self._working, self._since, self._told_s = 0, 0.0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._working:
                self._since = time.perf_counter()
            self._working += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            now = time.perf_counter()
            spent, self._since = now - self._since, now
            self._told_s += spent
            self._working -= 1
        self._spend(spent)

    def idle_clock(self) -> float:
        """Seconds by a clock that stands still while any of them works."""
        with self._lock:
            now = time.perf_counter()
            return now - self._told_s - (now - self._since if self._working else 0.0)


def _clock(beside: Busy | None) -> float:
    return beside.idle_clock() if beside else time.perf_counter()


def stage_waits(waits: Mapping[str, float]) -> dict[str, float]:
    """Wait seconds by the stage that waited."""
    result = dict.fromkeys(STAGES, 0.0)
    for cause, waited in waits.items():
        result[WAITS[cause]] += waited
    return result


class ProgressDisplay:
    """Tells partitions done, products and images a second, rejects and the time left, on standard error.

    Args:
        partitions: to be embedded in this run.
        rows: catalog rows to be read in this run.
        stream: where to write; a terminal gets a bar.
    """

    def __init__(self, partitions: int, rows: int, stream: TextIO = sys.stderr) -> None:
        self._partitions = partitions
        self._rows = rows
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._start = time.monotonic()
        self._next = self._start if self._is_terminal else self._start + _LINE_EVERY_S
        self.done = 0

    def update(self, progress: Progress) -> None:
        """Show the counts if it is time to."""
        if time.monotonic() < self._next:
            return
        line = describe(progress, self.done, self._partitions, self._rows, time.monotonic() - self._start)
        if self._is_terminal:
            filled = int(_BAR_WIDTH * _share(progress, self._rows))
            self._stream.write(f"\r\x1b[K[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {line}")
            self._stream.flush()
            self._next = time.monotonic() + 0.2
        else:
            log.info("%s", line)
            self._next = time.monotonic() + _LINE_EVERY_S

    def close(self) -> None:
        """Leave the terminal's line."""
        if self._is_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def describe(progress: Progress, done: int, partitions: int, rows: int, seconds: float) -> str:
    """The line: `3/12 partitions, 41% of rows, 812 products/s, 2,310 images/s, 4 rejects, 1m20s left`."""
    share = _share(progress, rows)
    left = f"{_duration(seconds * (1 - share) / share)} left" if 0 < share < 1 else "no estimate yet"
    rate = max(seconds, 1e-9)
    return (
        f"{done}/{partitions} partitions, {share:.0%} of rows, {progress.products / rate:,.0f} products/s, "
        f"{progress.images / rate:,.0f} images/s, {progress.rejected + progress.rejected_rows:,} rejects, "
        f"{'done' if share >= 1 else left}"
    )


def _share(progress: Progress, rows: int) -> float:
    return min(1.0, progress.rows / rows) if rows else 1.0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
