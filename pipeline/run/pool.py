"""Ray actors that embed partitions, replaced when they die, and tasks for what needs no tower."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from pipeline.catalog.partitions import Catalog
from pipeline.config import Config
from pipeline.errors import ClusterError, RunError
from pipeline.run.cluster import PoolSize, cause, first_line, too_few
from pipeline.run.embed import EmbedSettings, ReuseSource
from pipeline.run.partition import PartitionResult
from pipeline.run.progress import Progress
from pipeline.run.schedule import Schedule
from pipeline.run.signals import Stop
from pipeline.run.worker import ActorInfo, EmbedWorker, Work, with_control

log = logging.getLogger(__name__)


_POLL_S = 0.5


class Pool:
    """Embedding actors, started together.

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
        self._arguments = (settings, catalog, reuse, size.gpus_per_actor)
        self._config = config
        self._count = 0
        self._actors: dict[int, Any] = {}
        self._asked: dict[int, Any] = {}
        self._told: dict[int, Progress] = {}
        self.infos: list[ActorInfo] = []

    def __enter__(self) -> Pool:
        """Start all actors and wait until each has its GPU and its model.

        Raises:
            ClusterError: not all came up within `pool.start_timeout_s`.
            ModelError: the model is refused, by the first actor that says so.
            RunInterrupted: `stop` was set.
        """
        try:
            self.infos = self._answers([self._launch() for _ in range(self._size.actors)])
        except BaseException:
            self._kill_all()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kill_all()

    def embed(
        self,
        works: Mapping[str, Work],
        *,
        on_done: Callable[[PartitionResult], None],
        on_progress: Callable[[Progress], None],
    ) -> None:
        """Embed all partitions, a bounded number in flight, replacing actors that die.

        Args:
            works: by partition name.
            on_done: called in the driver with each staged partition, which is where the ledger is written.
            on_progress: called now and then with the counts of all actors.

        Raises:
            RunInterrupted: `stop` was set; what was staged by then is done.
            RunError: a partition's worker died too often.
            TwotowerError: an error that an actor raised on purpose.
        """
        schedule = Schedule(works, max_attempts=self._config.pool.max_attempts)
        queues: dict[int, list[tuple[Any, str]]] = {number: [] for number in self._actors}
        next_progress = 0.0
        while not schedule.is_over:
            if not self._stop.is_set:
                self._hand_out(schedule, works, queues)
            heads = {queue[0][0]: number for number, queue in queues.items() if queue}
            timeout = 0 if self._stop.is_set else _POLL_S
            done = ray.wait(list(heads), num_returns=1, timeout=timeout)[0] if heads else []
            if not done:
                self._stop.check()  # only now: what was finished before the signal has gone into the ledger
            for reference in done:
                self._collect(heads[reference], queues, schedule, on_done)
            if time.monotonic() >= next_progress:
                on_progress(self.progress())
                next_progress = time.monotonic() + _POLL_S
        on_progress(self.progress())
        if schedule.failed:
            name, detail = next(iter(schedule.failed.items()))
            raise RunError(
                f"the worker died {self._config.pool.max_attempts} times on {name} ({detail}); nothing was released, "
                "the other partitions are staged"
            )

    def progress(self) -> Progress:
        """Counts of all actors as they last told them, those that are gone included.

        An actor is asked again only when it has answered: a busy one may take longer than the time between two looks.
        """
        for number, actor in self._actors.items():
            if number not in self._asked:
                self._asked[number] = actor.progress.remote()
        ready, _ = (
            ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        )
        for number in [number for number, answer in self._asked.items() if answer in ready]:
            with contextlib.suppress(RayActorError, RayTaskError):  # a dead actor's loss is told by its work
                self._told[number] = ray.get(self._asked.pop(number)) or Progress()
        total = Progress()
        for told in self._told.values():
            _add(total, told)
        return total

    def _hand_out(
        self, schedule: Schedule, works: Mapping[str, Work], queues: dict[int, list[tuple[Any, str]]]
    ) -> None:
        """Fill the actors' queues evenly, up to the bound."""
        for _ in range(self._config.pool.partitions_per_actor):
            for number, queue in sorted(queues.items(), key=lambda item: len(item[1])):
                if len(queue) < self._config.pool.partitions_per_actor and (name := schedule.take()) is not None:
                    queue.append((self._actors[number].embed.remote(works[name]), name))

    def _collect(
        self,
        number: int,
        queues: dict[int, list[tuple[Any, str]]],
        schedule: Schedule,
        on_done: Callable[[PartitionResult], None],
    ) -> None:
        """Take an actor's finished partition; where the actor died, charge that one and give the others back."""
        reference, name = queues[number].pop(0)
        try:
            result = ray.get(reference)
        except RayActorError as error:
            log.warning("actor %d died while it ran %s: %s", number, name, first_line(error))
            for _, waiting in reversed(queues.pop(number)):
                schedule.give_back(waiting)
            schedule.crash(name, first_line(error))
            self._actors.pop(number)
            if not schedule.is_over:
                self._answers([self._launch()])
                queues[self._count - 1] = []
            return
        except RayTaskError as error:
            raise cause(error) from error
        on_done(result)
        schedule.finish(name)

    def _launch(self) -> Any:
        """Create an actor and begin to load its model."""
        options: dict[str, Any] = {
            "num_gpus": self._size.gpus_per_actor,
            "num_cpus": self._size.cpus_per_actor,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
        }
        worker = ray.remote(concurrency_groups={"control": 1})(with_control(EmbedWorker)).options(**options)
        actor = worker.remote(self._count)
        self._actors[self._count] = actor
        self._count += 1
        return actor.start.remote(*self._arguments)

    def _answers(self, starts: Sequence[Any]) -> list[ActorInfo]:
        """What the started actors say of themselves, once all are ready."""
        deadline = time.monotonic() + self._config.pool.start_timeout_s
        infos: dict[Any, ActorInfo] = {}
        while len(infos) < len(starts):
            self._stop.check()
            waiting = [start for start in starts if start not in infos]
            for start in ray.wait(waiting, num_returns=1, timeout=_POLL_S)[0]:
                try:
                    infos[start] = ray.get(start)
                except RayActorError as error:
                    raise ClusterError(f"an actor died while it loaded the model: {first_line(error)}") from error
                except RayTaskError as error:
                    raise cause(error) from error
            if len(infos) < len(starts) and time.monotonic() > deadline:
                raise ClusterError(
                    f"{too_few(self._size.actors, self._size.gpus_per_actor, self._size.cpus_per_actor)}; "
                    f"{len(infos)} of {len(starts)} actors were ready after pool.start_timeout_s = "
                    f"{self._config.pool.start_timeout_s:g} seconds"
                )
        return [infos[start] for start in starts]

    def _kill_all(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()


def run_tasks(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, stop: Stop, is_brief: bool = False
) -> list[Any]:
    """Run a function over argument tuples, as Ray tasks.

    Args:
        function: takes what a tuple holds.
        arguments: one tuple a task.
        stop: cancels the tasks when it is set.
        is_brief: a single call takes a second or two; it is made here, where it costs no process.

    Raises:
        RunInterrupted: `stop` was set.
    """
    stop.check()
    if not arguments:
        return []
    if is_brief and len(arguments) == 1:
        return [function(*arguments[0])]
    task = ray.remote(num_cpus=1, max_retries=2)(function)
    waiting = [task.remote(*a) for a in arguments]
    pending = waiting
    while pending:
        if stop.is_set:
            for reference in pending:
                ray.cancel(reference, force=True)
            stop.check()
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=_POLL_S)
    try:
        return list(ray.get(waiting))
    except RayTaskError as error:
        raise cause(error) from error
    except RayError as error:
        raise RunError(f"a worker failed: {first_line(error)}") from error


def _add(total: Progress, part: Progress | None) -> None:
    if part is not None:
        for name, value in part.counts().items():
            setattr(total, name, getattr(total, name) + value)
        for stage, seconds in part.seconds.items():
            total.seconds[stage] += seconds
