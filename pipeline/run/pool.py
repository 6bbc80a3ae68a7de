"""Ray actors that embed units of work, and are replaced when they die."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from pipeline.catalog.partitions import Catalog
from pipeline.config import Config
from pipeline.errors import ClusterError, RunError, described
from pipeline.run.cluster import PoolSize, actors_that_fit, cause, too_few
from pipeline.run.embed import EmbedSettings, ReuseSource
from pipeline.run.memory import is_out_of_memory
from pipeline.run.partition import PartitionResult, Work
from pipeline.run.progress import Progress
from pipeline.run.scan import fetch_threads
from pipeline.run.schedule import Schedule, Unit
from pipeline.run.signals import Stop
from pipeline.run.usage import ActorUsage, Usage
from pipeline.run.worker import ActorInfo, EmbedWorker, with_control
from pipeline.store.holder import process_start

log = logging.getLogger(__name__)


_POLL_S = 0.5
_MAX_FAILED_STARTS = 3
_LOOK_S = 3.0  # between two looks at the cluster's nodes
_GONE_WITHIN_S = 5.0  # Ray kills in the background


@dataclass
class _Actor:
    """An actor and what it was given, the running unit first.

    Attributes:
        start: the reference of its start.
        info: what it answered; None until then.
        ready_at: when it could take work, by the monotonic clock; 0 until then.
        told: its counts as it last told them.
        done: counts and seconds of the units that it finished, which took `working_s`.
        moved_at: when they, or the running unit, were last seen to change, by the monotonic clock.
    """

    handle: Any
    start: Any
    asked_at: float
    info: ActorInfo | None = None
    ready_at: float = 0.0
    queue: deque[tuple[Any, Unit]] = field(default_factory=deque)
    question: Any = None
    told: Progress = field(default_factory=Progress)
    done: Progress = field(default_factory=Progress)
    working_s: float = 0.0
    moved_at: float = 0.0

    @property
    def latest(self) -> Progress:
        """Its counts: as it told them, unless it has finished more since it was asked."""
        return self.done if self.done.rows > self.told.rows else self.told


class Pool:
    """Embedding actors, started together, and replaced one by one.

    Args:
        size: from `size_pool`.
        settings: what each embedder is made of.
        catalog: what they read.
        reuse: released tables to take vectors from, or None.
        config: for time limits and attempts.
        stop: ends the start and the work when it is set.
    """

    def __init__(
        self,
        size: PoolSize,
        settings: EmbedSettings,
        catalog: Catalog,
        reuse: ReuseSource | None,
        *,
        config: Config,
        stop: Stop,
    ) -> None:
        self._size = size
        self._stop = stop
        self._arguments = (settings, catalog, reuse, size)
        self._config = config
        self._wanted = size.actors
        self._next_look = 0.0
        self._count = 0
        self._actors: dict[int, _Actor] = {}
        self._gone = Progress()
        self._gone_usage: list[ActorUsage] = []
        self._start_s = self._embedding_s = 0.0
        self._failed_starts = 0
        self.infos: list[ActorInfo] = []

    def __enter__(self) -> Pool:
        """Start all actors and wait until each has its GPU and its model.

        Raises:
            ClusterError: not all came up within `pool.start_timeout_s`.
            ModelError: the model is refused, by the first actor that says so.
            RunInterrupted: `stop` was set.
        """
        begun = time.monotonic()
        try:
            for _ in range(self._wanted):
                self._launch()
            while waiting := self._starting():
                self._stop.check()
                ray.wait(waiting, num_returns=1, timeout=_POLL_S)
                self._welcome(is_first=True)
                if self._starting():
                    self._check_start_time()
        except BaseException:
            self._kill_all()
            raise
        self._start_s = time.monotonic() - begun
        return self

    def __exit__(self, *_: object) -> None:
        self._kill_all()

    def embed(
        self,
        schedule: Schedule,
        work_for: Callable[[Unit], Work],
        *,
        on_done: Callable[[Unit, PartitionResult, bool], None],
        on_condemned: Callable[[Unit, str, bool], None],
        on_progress: Callable[[Progress], None],
    ) -> None:
        """Embed all units, a bounded number in flight, replacing actors that die.

        Args:
            schedule: what to embed, and what becomes of it.
            work_for: makes the work for an actor, with a file name of its own for each attempt.
            on_done: called in the driver with each staged unit, and whether its partition is complete with it.
            on_condemned: called with a row that kills every worker, the reason, and whether its partition is complete.
            on_progress: called now and then with the counts of all actors.

        Raises:
            RunInterrupted: `stop` was set; what was staged by then is done.
            RunError: workers died too often.
            TwotowerError: an error that an actor raised on purpose.
        """
        next_progress, begun = 0.0, time.monotonic()
        for actor in self._actors.values():
            actor.ready_at = begun  # until now the first ones waited for each other, and for the lease
        while not schedule.is_over:
            if not self._stop.is_set:
                self._welcome()
                self._hand_out(schedule, work_for)
            self._wait(schedule, on_done)
            self._end_stalled(schedule)
            for condemned in schedule.take_condemned():
                on_condemned(*condemned)
            self._replace(schedule)
            if time.monotonic() >= next_progress:
                on_progress(self.progress())
                next_progress = time.monotonic() + _POLL_S
            self._embedding_s = time.monotonic() - begun
        on_progress(self.progress())
        if schedule.failure is not None:
            raise RunError(f"{schedule.failure}; nothing was released, and the partitions that are staged are kept")

    def progress(self) -> Progress:
        """Counts of all actors as they last told them, those that are gone included.

        An actor is asked again only when it has answered: a busy one may take longer than the time between two looks.
        """
        for actor in self._actors.values():
            if actor.question is None and actor.info is not None:
                actor.question = actor.handle.progress.remote()
        asked = {actor.question: actor for actor in self._actors.values() if actor.question is not None}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0) if asked else ([], [])
        total = Progress()
        total.add(self._gone.counts(), self._gone.seconds)
        for answer in ready:
            actor = asked[answer]
            actor.question = None
            with contextlib.suppress(RayError):  # a dead actor's loss is told by its work
                told = ray.get(answer) or Progress()
                if told != actor.told:
                    actor.told, actor.moved_at = told, time.monotonic()
        for actor in self._actors.values():
            total.add(actor.latest.counts(), actor.latest.seconds)
        return total

    def usage(self) -> Usage:
        """What all actors did with their time so far; of units that were lost only that they took time."""
        actors = [*self._gone_usage, *(self._usage_of(number, actor) for number, actor in self._actors.items())]
        return Usage(
            actors=tuple(sorted(actors, key=lambda actor: actor.actor)),
            at_once=self._wanted,
            gpus=self._wanted * self._size.gpus_per_actor,
            fetch_threads=fetch_threads(self._config.fetch, self._arguments[1].root),
            start_s=self._start_s,
            embedding_s=self._embedding_s,
        )

    def _usage_of(self, number: int, actor: _Actor) -> ActorUsage:
        now = time.monotonic()
        return ActorUsage(
            actor=number,
            node=actor.info.node if actor.info else "",
            node_id=actor.info.node_id if actor.info else "",
            gpus=self._size.gpus_per_actor,
            node_cpus=actor.info.node_cpus if actor.info else 0.0,
            decode_threads=actor.info.decode_threads if actor.info else 0,
            held_s=now - actor.asked_at,
            start_s=(actor.ready_at or now) - actor.asked_at,
            working_s=actor.working_s,
            seconds=actor.done.seconds,
            waits=actor.done.waits,
            counts=actor.done.counts(),
        )

    def _hand_out(self, schedule: Schedule, work_for: Callable[[Unit], Work]) -> None:
        """Fill the actors' queues evenly, up to the bound; an actor with a suspect unit gets nothing beside it."""
        for depth in range(self._config.pool.partitions_per_actor):
            for actor in self._actors.values():
                is_ready = actor.info is not None and len(actor.queue) == depth
                if not is_ready or any(unit.is_suspect for _, unit in actor.queue):
                    continue
                unit = schedule.take(is_idle=not actor.queue)
                if unit is not None:
                    if not actor.queue:
                        actor.moved_at = time.monotonic()
                    actor.queue.append((actor.handle.embed.remote(work_for(unit)), unit))

    def _wait(self, schedule: Schedule, on_done: Callable[[Unit, PartitionResult, bool], None]) -> None:
        """Wait a moment for a running unit to end, one way or another."""
        heads = {actor.queue[0][0]: number for number, actor in self._actors.items() if actor.queue}
        timeout = 0 if self._stop.is_set else _POLL_S
        waiting = [*heads, *self._starting()]
        ready = ray.wait(waiting, num_returns=1, timeout=timeout)[0] if waiting else []
        done = [reference for reference in ready if reference in heads]
        if not done:
            self._stop.check()  # only now: what was finished before the signal has gone into the ledger
        for reference in done:
            self._collect(heads[reference], schedule, on_done)

    def _collect(self, number: int, schedule: Schedule, on_done: Callable[[Unit, PartitionResult, bool], None]) -> None:
        """Take an actor's finished unit, or find out what became of the actor."""
        actor = self._actors[number]
        reference, unit = actor.queue[0]
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            if not is_out_of_memory(error.cause):
                raise cause(error) from error
            actor.queue.popleft()
            log.warning("memory ran out over %s: %s", _describe(unit), described(error.cause))
            schedule.run_out_of_memory(unit, described(error.cause))
        except RayError as error:
            self._lose(number, schedule, error)
        else:
            actor.queue.popleft()
            actor.done.add(result.counts, result.seconds, result.waits)
            actor.working_s += result.wall_s
            on_done(unit, result, schedule.finish(unit))
        actor.moved_at = time.monotonic()

    def _lose(self, number: int, schedule: Schedule, error: RayError) -> None:
        """An actor is gone: its running unit is charged only where it was the worker that died, and not its node."""
        actor, detail = self._actors[number], _death(error)
        unit = actor.queue[0][1]
        log.warning("actor %d is lost over %s: %s", number, _describe(unit), detail)
        self._drop(number, schedule)
        if isinstance(error, RayActorError) and is_out_of_memory(str(error)):
            schedule.run_out_of_memory(unit, detail)
        elif (
            isinstance(error, ActorUnavailableError)
            or not isinstance(error, RayActorError)
            or "node has died" in str(error)
            or not _is_alive(actor.info)
        ):
            schedule.lose(unit, detail)
        else:
            schedule.crash(unit, detail)

    def _end_stalled(self, schedule: Schedule) -> None:
        """Kill actors whose counts did not move for too long."""
        limit = self._config.pool.stall_timeout_s
        for number, actor in list(self._actors.items()):
            if actor.queue and time.monotonic() - actor.moved_at > limit:
                unit = actor.queue[0][1]
                detail = f"no sign of life for pool.stall_timeout_s = {limit:g} seconds"
                log.warning("actor %d is ended over %s: %s", number, _describe(unit), detail)
                self._drop(number, schedule)
                schedule.crash(unit, detail)

    def _drop(self, number: int, schedule: Schedule) -> None:
        """Forget an actor, kill it in case it lives, and give back what it had not begun."""
        actor = self._actors.pop(number)
        with contextlib.suppress(RayError):
            ray.kill(actor.handle)
        for _, waiting in reversed(list(actor.queue)[1:]):
            schedule.give_back(waiting)
        self._gone.add(actor.latest.counts(), actor.latest.seconds)
        self._gone_usage.append(self._usage_of(number, actor))

    def _replace(self, schedule: Schedule) -> None:
        """Start actors in the place of lost ones; the others go on meanwhile."""
        self._follow_cluster(schedule)
        while not schedule.is_over and len(self._actors) < self._wanted:
            self._launch()
        if self._starting() and not any(actor.info for actor in self._actors.values()):
            try:
                self._check_start_time()
            except ClusterError as error:
                raise RunError(f"all workers are gone: {error}; what was staged is kept") from error

    def _follow_cluster(self, schedule: Schedule) -> None:
        """Ask for as many actors as the cluster has room for by now, without `pool.actors`: nodes come late, and go."""
        if self._config.pool.actors is not None or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_S
        room = min(actors_that_fit(self._size.gpus_per_actor), max(1, schedule.unfinished))
        if room > self._wanted:
            log.info("the cluster has room for %d actors now, %d were asked for", room, self._wanted)
            self._wanted = room
        elif room < self._wanted and len(self._actors) < self._wanted:  # one is gone, and its place with it
            self._wanted = max(room, len(self._actors))

    def _launch(self) -> None:
        """Create an actor and begin to load its model."""
        options: dict[str, Any] = {
            "num_gpus": self._size.gpus_per_actor,
            "num_cpus": self._size.cpus_per_actor,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
        }
        if self._config.pool.memory_per_actor_bytes is not None:
            options["memory"] = self._config.pool.memory_per_actor_bytes
        worker = ray.remote(concurrency_groups={"control": 1})(with_control(EmbedWorker)).options(**options)
        handle = worker.remote(self._count)
        self._actors[self._count] = _Actor(handle, handle.start.remote(*self._arguments), time.monotonic())
        self._count += 1

    def _starting(self) -> list[Any]:
        return [actor.start for actor in self._actors.values() if actor.info is None]

    def _welcome(self, *, is_first: bool = False) -> None:
        """Take in the actors that have loaded their model.

        Raises:
            ClusterError: an actor died while it started.
            RunError: several later ones in a row did.
            TwotowerError: what the actor says of the model, or of the catalog that its node cannot see.
        """
        starting = self._starting()
        ready = set(ray.wait(starting, num_returns=len(starting), timeout=0)[0]) if starting else set()
        for number, actor in list(self._actors.items()):
            if actor.start not in ready:
                continue
            try:
                actor.info = ray.get(actor.start)
            except RayTaskError as error:
                self._failed_starts += 1
                if is_first or self._failed_starts >= _MAX_FAILED_STARTS:
                    raise cause(error) from error
                log.warning("an actor could not start, and is tried elsewhere: %s", cause(error))
                ray.kill(actor.handle)
                del self._actors[number]
                continue
            except RayError as error:
                self._failed_starts += 1
                if is_first or self._failed_starts >= _MAX_FAILED_STARTS:
                    kind = ClusterError if is_first else RunError
                    raise kind(f"an actor died while it loaded the model: {_death(error)}") from error
                del self._actors[number]
                continue
            self._failed_starts = 0
            actor.ready_at = time.monotonic()
            self.infos.append(actor.info)

    def _check_start_time(self) -> None:
        """See that the actors that start do not take too long.

        Raises:
            ClusterError: one does; the sentence says what was asked for and what there is.
        """
        limit = self._config.pool.start_timeout_s
        ready = sum(actor.info is not None for actor in self._actors.values())
        if any(time.monotonic() - actor.asked_at > limit for actor in self._actors.values() if actor.info is None):
            raise ClusterError(
                f"{too_few(self._wanted, self._size.gpus_per_actor, self._size.cpus_per_actor)}; {ready} of "
                f"{self._wanted} actors were ready after pool.start_timeout_s = {limit:g} seconds"
            )

    def _kill_all(self) -> None:
        """Kill the actors; those of this machine are gone then, and write nothing more beside what is tidied."""
        for actor in self._actors.values():
            ray.kill(actor.handle)
        here = [a.info.pid for a in self._actors.values() if a.info is not None and a.info.node == socket.gethostname()]
        deadline = time.monotonic() + _GONE_WITHIN_S
        while any(process_start(pid) is not None for pid in here) and time.monotonic() < deadline:
            time.sleep(0.02)
        self._actors.clear()


def _describe(unit: Unit) -> str:
    return f"{unit.partition}, rows {unit.first_row} to {unit.stop_row - 1}, attempt {unit.attempt}"


def _death(error: RayError) -> str:
    """What Ray knows of an actor's end, in one sentence, without its guesses at the cause."""
    lines = [line.strip() for line in str(error).splitlines() if "has died" in line or "exit" in line.lower()]
    told = lines[0] if lines else described(error)
    return " ".join(told.partition(" There are some potential root causes")[0].split())[:300]


def _is_alive(info: ActorInfo | None) -> bool:
    """Whether the cluster still counts the actor's node among its own."""
    return info is None or any(node["NodeID"] == info.node_id and node["Alive"] for node in ray.nodes())
