"""Which partition is worked on next: a pure class, so that any order of faults can be tried without a cluster."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable


class Schedule:
    """Every partition ends done or failed, exactly once.

    Args:
        names: the partitions, in the order in which they are wanted.
        max_attempts: how often a partition whose worker died is tried.
    """

    def __init__(self, names: Iterable[str], *, max_attempts: int) -> None:
        self._pending = deque(names)
        self._running: set[str] = set()
        self._crashes: Counter[str] = Counter()
        self._max_attempts = max_attempts
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}

    @property
    def is_over(self) -> bool:
        """Whether nothing is pending or running."""
        return not self._pending and not self._running

    def take(self) -> str | None:
        """The next partition to start, or None while nothing is pending."""
        if not self._pending:
            return None
        name = self._pending.popleft()
        self._running.add(name)
        return name

    def finish(self, name: str) -> None:
        """The partition is staged."""
        self._running.remove(name)
        self.done.add(name)

    def give_back(self, name: str) -> None:
        """The partition's worker went away before it began: it goes to the front, at no charge."""
        self._running.remove(name)
        self._pending.appendleft(name)

    def crash(self, name: str, detail: str) -> None:
        """The worker died while it ran the partition: it is tried again, a bounded number of times."""
        self._running.remove(name)
        self._crashes[name] += 1
        if self._crashes[name] >= self._max_attempts:
            self.failed[name] = detail
        else:
            self._pending.append(name)
