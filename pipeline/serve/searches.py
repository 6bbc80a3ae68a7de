"""The threads that search: a bounded number at once, a bounded number that wait, and nothing behind them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class Busy(Exception):
    """As many requests as may wait do so already."""


class Searches:
    """Runs functions in threads.

    A search cannot be broken off: one whose asker gave up keeps its thread, and its place, until it ends. One that has
    not begun is dropped.

    Args:
        threads: how many search at once.
        waiting: how many more may wait for a thread.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="search")
        self._places = threading.Semaphore(threads + waiting)
        self._running: set[Future[Any]] = set()

    def __len__(self) -> int:
        """How many run or wait."""
        return len(self._running)

    async def run(self, search: Callable[[], Answer]) -> Answer:
        """What the function gives.

        Raises:
            Busy: all places are taken.
        """
        if not self._places.acquire(blocking=False):
            raise Busy
        try:
            future = self._pool.submit(search)
        except RuntimeError:  # it is closed
            self._places.release()
            raise Busy from None
        self._running.add(future)
        future.add_done_callback(self._ended)
        return await asyncio.wrap_future(future)

    def _ended(self, future: Future[Any]) -> None:
        self._running.discard(future)
        self._places.release()

    def close(self, within_s: float) -> bool:
        """Take no more, and wait for those that run; whether all ended."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + within_s
        while self._running and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self._running
