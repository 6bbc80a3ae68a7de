"""How far a run is: counts and stage seconds, told as a bar on a terminal or a plain line every ten seconds."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

log = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0
_BAR_WIDTH = 24
_TIMING = threading.Lock()
STAGES = ("read", "fetch", "decode", "tokenise", "towers", "write")


@dataclass
class Progress:
    """Counts and stage seconds, as they grow; decode and fetch seconds are summed over threads.

    Attributes:
        tower_batches: that went through a tower; a sign of life, and no count of the run.
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
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's wall time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with _TIMING:
                self.seconds[stage] += time.perf_counter() - start

    def add(self, counts: Mapping[str, int], seconds: Mapping[str, float]) -> None:
        """Add the counts and stage seconds of a part."""
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)
        for stage, spent in seconds.items():
            self.seconds[stage] += spent

    def counts(self) -> dict[str, int]:
        """The counts alone."""
        return {name: value for name, value in vars(self).items() if name not in ("seconds", "tower_batches")}


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
