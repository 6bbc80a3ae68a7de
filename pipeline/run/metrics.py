"""What a run tells dashboards, through Ray's own exporter: every name in one place.

Ray prefixes `ray_`, and adds `_total` to counters: `twotower_inputs` is scraped as `ray_twotower_inputs_total`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Counter, Gauge

from pipeline.run.progress import Progress, stage_waits


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        kind: `counter` or `gauge`.
        tags: its labels; Ray adds some of its own.
    """

    name: str
    kind: str
    description: str
    tags: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """The name that Prometheus scrapes."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


METRICS = (
    Metric("twotower_inputs", "counter", "Texts and images: embedded, reused or rejected", ("actor", "outcome")),
    Metric("twotower_rejects", "counter", "Rejected inputs and rows by reason", ("actor", "reason")),
    Metric("twotower_stage_seconds", "counter", "Busy seconds; fetch and decode over threads", ("actor", "stage")),
    Metric("twotower_stage_wait_seconds", "counter", "Seconds that a stage waited for others", ("actor", "stage")),
    Metric("twotower_queue_depth", "gauge", "Prepared batches that wait for the towers", ("actor",)),
    Metric("twotower_partitions_pending", "gauge", "Partitions of the run that are not staged yet"),
    Metric("twotower_partitions_done", "gauge", "Partitions of the run that are staged"),
)
_BY_NAME = {metric.name: metric for metric in METRICS}


class ActorMetrics:
    """An actor's metrics: told its progress, they grow by the difference."""

    def __init__(self, actor: int | str) -> None:
        self._tags = {"actor": str(actor)}
        names = ("inputs", "rejects", "stage_seconds", "stage_wait_seconds")
        self._counters = {name: _made(f"twotower_{name}") for name in names}
        self._queue = _made("twotower_queue_depth")
        self._told: dict[tuple[str, str], float] = {}

    def update(self, progress: Progress) -> None:
        """Tell everything that has grown, and how many batches are ready."""
        outcomes = {name: getattr(progress, name) for name in ("embedded", "reused", "rejected")}
        self._grow("inputs", "outcome", outcomes)
        self._grow("rejects", "reason", progress.reasons)
        self._grow("stage_seconds", "stage", progress.seconds)
        self._grow("stage_wait_seconds", "stage", stage_waits(progress.waits))
        self._queue.set(progress.ready_batches, tags=self._tags)

    def _grow(self, name: str, tag: str, totals: Mapping[str, float]) -> None:
        for value, total in totals.items():
            grown = total - self._told.get((name, value), 0)
            if grown > 0:
                self._counters[name].inc(grown, tags={**self._tags, tag: value})
                self._told[name, value] = total


class RunMetrics:
    """The driver's metrics."""

    def __init__(self) -> None:
        self._pending = _made("twotower_partitions_pending")
        self._done = _made("twotower_partitions_done")
        self._rejects = _made("twotower_rejects")

    def update(self, done: int, partitions: int) -> None:
        """Tell how many partitions are staged, of how many."""
        self._pending.set(partitions - done)
        self._done.set(done)

    def reject(self, reason: str) -> None:
        """Tell of a row that no actor lived to reject."""
        self._rejects.inc(1, tags={"actor": "driver", "reason": reason})


def _made(name: str) -> Any:
    metric = _BY_NAME[name]
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, metric.description, tag_keys=metric.tags)
