"""SIGTERM and SIGINT as a flag that a run looks at."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import RunInterrupted


class Stop:
    """SIGTERM and SIGINT, as a flag: the first one lets the run end in order, a second one ends the process."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def is_set(self) -> bool:
        """Whether a signal came."""
        return self._event.is_set()

    def set(self) -> None:
        """Ask the run to end in order, as a signal does."""
        self._event.set()

    def check(self) -> None:
        """Go on, unless a signal came.

        Raises:
            RunInterrupted: it did.
        """
        if self._event.is_set():
            raise RunInterrupted("stopped by a signal; what was staged is kept: run the same command to go on")

    @contextmanager
    def installed(self) -> Iterator[Stop]:
        """Handle both signals within the block."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # signals belong to the main thread, and whoever runs there
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def take_over(self) -> None:
        """Put our handlers in place again: Ray's native part sets one that prints a stack and aborts 3 seconds on."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self.is_set:
            signal.alarm(0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if self.is_set else self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.SIG_DFL)  # the next one ends the process, even within a call of C
        # Not through the log: the signal may have come while a line was being written there.
        os.write(2, f"{signal.Signals(number).name}: ending in order; once more ends at once\n".encode())
        self._event.set()
