"""How far a run is: a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

from pipeline.run.embed import Progress

log = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0
_BAR_WIDTH = 24


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
