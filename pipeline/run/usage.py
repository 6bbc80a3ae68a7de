"""What a run's actors did with their time, as the driver adds it up; and rows over time, for a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.run.progress import STAGES, WAITS, Progress

_MOST_SAMPLES = 300
_MOST_SPANS = 60
_LEAST_SPAN_S = 3.0


@dataclass(frozen=True)
class ActorUsage:
    """One actor's time.

    Attributes:
        gpus: that it holds; a fraction shares one.
        node_cpus: vCPUs of its node, as Ray counts them.
        decode_threads: that it has; 0 where it never came up.
        held_s: from when it was asked for until it was let go: what its GPUs cost.
        start_s: of these, until it had its model; for the first actors, until all of them had, and embedding began.
        working_s: of these, with a partition in hand.
        seconds: busy, by stage; decode and fetch summed over threads.
        waits: idle, by what was waited for.
        counts: of what it finished.
    """

    actor: int
    node: str
    node_id: str
    gpus: float
    node_cpus: float
    decode_threads: int
    held_s: float
    start_s: float
    working_s: float
    seconds: Mapping[str, float]
    waits: Mapping[str, float]
    counts: Mapping[str, int]

    @property
    def embedding_s(self) -> float:
        """Held, and ready to embed."""
        return max(self.held_s - self.start_s, self.working_s)

    @property
    def towers_busy_share(self) -> float:
        """Of the time in which it could have embedded."""
        return min(1.0, self.seconds["towers"] / self.embedding_s) if self.embedding_s > 0 else 0.0


@dataclass(frozen=True)
class Usage:
    """All actors of a run: only what this run did, without what it took over from one that was broken.

    Attributes:
        actors: replaced ones too.
        at_once: how many there are at the same time.
        gpus: that these hold together.
        fetch_threads: of each actor; 0: as many as decode.
        start_s: wall time until all first actors were ready.
        embedding_s: wall time in which they embedded.
    """

    actors: tuple[ActorUsage, ...] = ()
    at_once: int = 0
    gpus: float = 0.0
    fetch_threads: int = 0
    start_s: float = 0.0
    embedding_s: float = 0.0

    def joined(self, other: Usage) -> Usage:
        """With another pool's after it, its actors numbered on."""
        if not self.actors:
            return other
        actors = [*self.actors, *other.actors]
        return replace(
            other,
            actors=tuple(replace(actor, actor=number) for number, actor in enumerate(actors)),
            start_s=self.start_s + other.start_s,
            embedding_s=self.embedding_s + other.embedding_s,
        )

    @property
    def seconds(self) -> dict[str, float]:
        """Busy seconds by stage."""
        return {stage: sum(actor.seconds.get(stage, 0.0) for actor in self.actors) for stage in STAGES}

    @property
    def waits(self) -> dict[str, float]:
        """Wait seconds by what was waited for."""
        return {cause: sum(actor.waits.get(cause, 0.0) for actor in self.actors) for cause in WAITS}

    def count(self, name: str) -> int:
        """A count of all actors together."""
        return sum(actor.counts.get(name, 0) for actor in self.actors)

    @property
    def decode_threads(self) -> int:
        """Of an actor on average; nodes may differ."""
        threads = [actor.decode_threads for actor in self.actors if actor.decode_threads]
        return round(sum(threads) / len(threads)) if threads else 0

    @property
    def actor_s(self) -> float:
        """Seconds of all actors in which they could have embedded."""
        return sum(actor.embedding_s for actor in self.actors)

    @property
    def vcpus_per_gpu(self) -> float | None:
        """Of the nodes that embedded; None without GPUs."""
        cpus = {actor.node_id: actor.node_cpus for actor in self.actors}
        return round(sum(cpus.values()) / self.gpus, 2) if self.gpus else None


@dataclass(frozen=True, slots=True)
class Sample:
    """How far a run was at a moment, in seconds since its start."""

    seconds: float
    rows: int
    inputs: int
    embedded: int
    rejected: int


@dataclass
class Samples:
    """How far a run was over time: a bounded number of moments, evenly thinned as they become too many."""

    kept: list[Sample] = field(default_factory=list)
    every_s: float = 0.0
    _before: Sample = Sample(0.0, 0, 0, 0, 0)
    _last: Sample = Sample(0.0, 0, 0, 0, 0)

    def add(self, seconds: float, progress: Progress) -> None:
        """Keep the moment, if the last kept one is long enough ago."""
        if progress.rows < self._last.rows - self._before.rows:  # another pool begins to count
            self._before = self._last
        before = self._before
        self._last = Sample(
            seconds,
            before.rows + progress.rows,
            before.inputs + progress.texts + progress.images,
            before.embedded + progress.embedded,
            before.rejected + progress.rejected + progress.rejected_rows,
        )
        if self.kept and seconds - self.kept[-1].seconds < self.every_s:
            return
        self.kept.append(self._last)
        if len(self.kept) >= _MOST_SAMPLES:
            del self.kept[1::2]
            self.every_s = 2 * (self.kept[-1].seconds - self.kept[0].seconds) / _MOST_SAMPLES

    def series(self) -> list[Sample]:
        """The moments, the last one among them."""
        is_behind = not self.kept or self._last.seconds > self.kept[-1].seconds
        return [*self.kept, self._last] if is_behind and self._last.seconds > 0 else list(self.kept)


def rows_per_s(series: Sequence[Sample]) -> list[tuple[float, float]]:
    """Rows a second in spans of equal length, each by the second at its end.

    Rows are counted a batch at a time, and moments lie unevenly: only over some seconds is there a rate to speak of.
    """
    span = series[-1].seconds - series[0].seconds if series else 0.0
    spans = min(_MOST_SPANS, int(span / _LEAST_SPAN_S))
    if not spans:
        return []
    edges = np.linspace(series[0].seconds, series[-1].seconds, spans + 1)
    rows = np.interp(edges, [sample.seconds for sample in series], [sample.rows for sample in series])
    rates = np.diff(rows) / np.diff(edges)
    return [(float(edge), max(0.0, float(rate))) for edge, rate in zip(edges[1:], rates, strict=True)]
