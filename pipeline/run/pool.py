"""Ray: actors pinned to GPUs around the plain Embedder, and tasks for what needs no tower."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.catalog.partitions import Catalog, Partition
from pipeline.catalog.products import RowPlan
from pipeline.config import Config
from pipeline.errors import ClusterError, RunError, RunInterrupted, TwotowerError
from pipeline.paths import exists
from pipeline.run.embed import Embedder, EmbedSettings, ReuseSource, has_cuda
from pipeline.run.partition import PartitionResult, stage_partition
from pipeline.run.progress import Progress
from pipeline.run.schedule import Schedule

log = logging.getLogger(__name__)

_JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_POLL_S = 0.5
_NODE_CHECK_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ActorInfo:
    """What an actor got: its GPUs as Ray numbers them, and the device that torch uses."""

    actor: int
    node: str
    pid: int
    gpu_ids: tuple[str, ...]
    cuda_visible_devices: str | None
    device: str
    model_id: str
    fingerprint: str


@dataclass(frozen=True)
class PoolSize:
    """How many actors, with what each, on the cluster as it is."""

    actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    gpus: float
    decode_threads: int
    torch_threads: int | None


@dataclass(frozen=True)
class Work:
    """One partition for an actor, with where its staged file goes."""

    partition: Partition
    plan: RowPlan
    staged_path: str


class EmbedWorker:
    """The actor: an Embedder that is loaded once and takes partitions one after another."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._embedder: Embedder | None = None
        self._catalog: Catalog | None = None
        self._metrics: _Metrics | None = None

    def start(self, settings: EmbedSettings, catalog: Catalog, reuse: ReuseSource | None, gpus: float) -> ActorInfo:
        """Load the model on the device that this actor owns, and check that it is the only one it can see."""
        gpu_ids = tuple(str(i) for i in ray.get_runtime_context().get_accelerator_ids().get("GPU", []))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if gpus and (visible is None or tuple(visible.split(",")) != gpu_ids):
            raise ClusterError(
                f"Ray gave this actor GPU {','.join(gpu_ids)} but CUDA_VISIBLE_DEVICES is {visible!r} on "
                f"{socket.gethostname()}; unset RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES there"
            )
        device = settings.device if settings.device != "auto" else _device(gpus)
        settings = EmbedSettings(**{**vars(settings), "device": device})
        self._embedder = Embedder(settings, catalog.root, reuse)
        self._catalog = catalog
        self._metrics = _Metrics(self._number)
        model = self._embedder.model
        return ActorInfo(
            self._number, socket.gethostname(), os.getpid(), gpu_ids, visible, device, model.model_id, model.fingerprint
        )

    def embed(self, work: Work) -> PartitionResult:
        """Stage one partition."""
        assert self._embedder is not None
        assert self._catalog is not None
        return stage_partition(self._embedder, self._catalog, work.partition, work.plan, work.staged_path)

    def progress(self) -> Progress | None:
        """Counts so far; answered while a partition is being embedded. Feeds the metrics too."""
        if self._embedder is None or self._metrics is None:
            return None
        self._metrics.update(self._embedder.progress)
        return self._embedder.progress


class _Metrics:
    """Counters for dashboards, through ray.util.metrics."""

    def __init__(self, actor: int) -> None:
        from ray.util.metrics import Counter

        tags = {"actor": str(actor)}
        self._inputs = Counter("twotower_inputs", "Inputs by outcome", tag_keys=("actor", "outcome"))
        self._stages = Counter("twotower_stage_seconds", "Busy seconds by stage", tag_keys=("actor", "stage"))
        self._inputs.set_default_tags(tags)
        self._stages.set_default_tags(tags)
        self._told: dict[str, float] = {}

    def update(self, progress: Progress) -> None:
        for outcome in ("embedded", "reused", "rejected"):
            self._add(self._inputs, "outcome", outcome, getattr(progress, outcome))
        for stage, seconds in progress.seconds.items():
            self._add(self._stages, "stage", stage, seconds)

    def _add(self, counter: Any, tag: str, value: str, total: float) -> None:
        grown = total - self._told.get(value, 0)
        if grown > 0:
            counter.inc(grown, tags={tag: value})
            self._told[value] = total


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


def ray_address(config: Config) -> str:
    """`local`, or the address of a running cluster; inside a Ray job the default is that job's cluster."""
    return config.ray.address or ("auto" if is_inside_job() else "local")


def is_inside_job() -> bool:
    """Whether this process is the entrypoint of `ray job submit`."""
    return _JOB_MARK in os.environ


@contextmanager
def connected(config: Config, stop: Stop) -> Iterator[None]:
    """A Ray for the block: the process's own if one is up, else a local one that ends with the block, or a cluster.

    Raises:
        ClusterError: there is no cluster at the address, or it does not let us in.
        RunInterrupted: a signal came while Ray started.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        with _handlers_kept():
            _init(config, ray_address(config))
        stop.take_over()
        stop.check()
        yield
    finally:
        ray.shutdown()


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Within ray.init Ray sets SIGTERM handlers that exit, which would leave half a Ray behind: ours stays."""
    set_handler = signal.signal

    def keep(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number == signal.SIGTERM else set_handler(number, handler)

    setattr(signal, "signal", keep)  # noqa: B010  # mypy takes no assignment to a function
    try:
        yield
    finally:
        setattr(signal, "signal", set_handler)  # noqa: B010


def _init(config: Config, address: str) -> None:
    """Start a local Ray or connect to a cluster; whatever goes wrong is said in one sentence."""
    quiet = {"log_to_driver": log.isEnabledFor(logging.DEBUG), "logging_level": logging.ERROR}
    try:
        with warnings.catch_warnings():
            # Lance warns of every fork; Ray's are followed by an exec at once, which is safe.
            warnings.filterwarnings("ignore", message=".*fork")
            if address == "local":
                with _local_environment():
                    ray.init(
                        address="local", num_cpus=os.cpu_count(), num_gpus=config.pool.gpus, include_dashboard=False,
                        _node_ip_address="127.0.0.1", **quiet,
                    )  # fmt: skip
                return
            _knock(address)
            ray.init(address=address, **quiet)
    except (RayError, ConnectionError, OSError, ValueError, RuntimeError) as error:
        reason = _first_line(error).partition(": ")[2].rstrip(".")
        if address == "local":
            raise ClusterError(f"cannot start a local Ray: {reason}") from error
        raise ClusterError(
            f"cannot reach Ray at {address!r}: {reason}; check ray.address, and that RAY_AUTH_MODE and the token "
            "(RAY_AUTH_TOKEN_PATH) are the cluster's"
        ) from error


def _knock(address: str) -> None:
    """See whether anything listens at `host:port`: Ray itself tries for minutes.

    Raises:
        ClusterError: the address is of another kind.
        OSError: nothing does.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ClusterError(
            f"ray.address is local, auto or the host:port of a cluster's head, as in 10.0.0.1:6379; got {address!r}"
        )
    socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()


@contextmanager
def _local_environment() -> Iterator[None]:
    """A Ray of our own on loopback needs no token; where the environment asks for one, it has one all the same.

    Ray has read an explicit mode as it was imported, so another one would hold for its processes, but not for us.
    """
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.pop("RAY_ADDRESS", None)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def size_pool(config: Config, partitions: int) -> PoolSize:
    """Settle the number of actors and what each gets, from the settings and from what the cluster has.

    Raises:
        ClusterError: no GPU can be shared that way, or a local Ray cannot ever have what is asked for.
    """
    pool = config.pool
    nodes = [node for node in ray.nodes() if node["Alive"]]
    resources = ray.cluster_resources()
    gpus = float(resources.get("GPU", 0))
    per_actor = pool.gpus_per_actor if pool.gpus_per_actor is not None else (1.0 if gpus else 0.0)
    for name, value in (("gpus", per_actor), ("cpus", pool.cpus_per_actor)):
        if value > 1 and value != int(value):
            raise ClusterError(f"pool.{name}_per_actor is a fraction up to 1, or a whole number; got {value:g}")
    if pool.actors is not None:
        actors = pool.actors
    elif per_actor:
        actors = max(1, _slots(gpus, per_actor))
    else:
        actors = sum(node["Resources"].get("CPU", 0) > 0 for node in nodes) or 1
    actors = min(actors, max(1, partitions)) if pool.actors is None else actors
    if ray_address(config) == "local" and (
        (per_actor and actors > _slots(gpus, per_actor))
        or actors * pool.cpus_per_actor > float(resources.get("CPU", 0)) + 1e-9
    ):
        raise ClusterError(_too_few(actors, per_actor, pool.cpus_per_actor))
    cores = min((int(node["Resources"].get("CPU", 1)) for node in nodes if node["Resources"].get("CPU")), default=1)
    on_one_node = math.ceil(actors / max(1, len(nodes)))
    share = max(1, cores // on_one_node)
    decode_threads = pool.decode_threads or min(16, share)
    torch_threads = pool.torch_threads or (1 if per_actor and has_cuda() else share)
    return PoolSize(actors, per_actor, pool.cpus_per_actor, gpus, decode_threads, torch_threads)


def check_nodes(paths: Sequence[str], stop: Stop) -> None:
    """Have every node of the cluster look at each path.

    Raises:
        ClusterError: names the node and the path that it cannot read.
        RunInterrupted: `stop` was set.
    """
    look = ray.remote(num_cpus=0, max_retries=0)(_unreadable)
    asked = {
        node["NodeManagerAddress"]: look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(list(paths))
        for node in ray.nodes()
        if node["Alive"]
    }
    deadline = time.monotonic() + _NODE_CHECK_TIMEOUT_S
    for node_address, answer in asked.items():
        while not ray.wait([answer], timeout=_POLL_S)[0]:
            stop.check()
            if time.monotonic() > deadline:
                raise ClusterError(f"node {node_address} did not answer within {_NODE_CHECK_TIMEOUT_S:g} seconds")
        try:
            missing = ray.get(answer)
        except RayTaskError as error:
            raise ClusterError(f"node {node_address} cannot run this project: {_first_line(error.cause)}") from error
        except RayError as error:
            raise ClusterError(f"node {node_address} cannot run this project: {_first_line(error)}") from error
        if missing:
            raise ClusterError(
                f"node {node_address} cannot read {missing[0]}; use an object store or a folder that all nodes share"
            )


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
        """Counts of all actors, those that are gone included."""
        total = Progress()
        answers = [actor.progress.remote() for actor in self._actors.values()]
        ready, _ = ray.wait(answers, num_returns=len(answers), timeout=_POLL_S) if answers else ([], [])
        for answer in ready:
            with contextlib.suppress(RayActorError, RayTaskError):  # a dead actor's loss is told by its work
                _add(total, ray.get(answer))
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
            log.warning("actor %d died while it ran %s: %s", number, name, _first_line(error))
            for _, waiting in reversed(queues.pop(number)):
                schedule.give_back(waiting)
            schedule.crash(name, _first_line(error))
            self._actors.pop(number)
            if not schedule.is_over:
                self._answers([self._launch()])
                queues[self._count - 1] = []
            return
        except RayTaskError as error:
            raise _cause(error) from error
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
        worker = ray.remote(concurrency_groups={"control": 1})(_with_control(EmbedWorker)).options(**options)
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
                    raise ClusterError(f"an actor died while it loaded the model: {_first_line(error)}") from error
                except RayTaskError as error:
                    raise _cause(error) from error
            if len(infos) < len(starts) and time.monotonic() > deadline:
                raise ClusterError(
                    f"{_too_few(self._size.actors, self._size.gpus_per_actor, self._size.cpus_per_actor)}; "
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
        raise _cause(error) from error
    except RayError as error:
        raise RunError(f"a worker failed: {_first_line(error)}") from error


def _with_control(cls: type[EmbedWorker]) -> type[EmbedWorker]:
    """The worker with `progress` in a concurrency group of its own, so that it answers during `embed`."""

    class Worker(cls):  # type: ignore[valid-type, misc]
        @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
        def progress(self) -> Progress | None:
            return super().progress()  # type: ignore[no-any-return]

    Worker.__name__ = Worker.__qualname__ = cls.__name__
    return Worker


def _add(total: Progress, part: Progress | None) -> None:
    if part is not None:
        for name, value in part.counts().items():
            setattr(total, name, getattr(total, name) + value)
        for stage, seconds in part.seconds.items():
            total.seconds[stage] += seconds


def _slots(gpus: float, per_actor: float) -> int:
    """How many actors fit: a fraction shares a GPU, but does not straddle two."""
    if per_actor >= 1:
        return int(gpus // per_actor)
    return int(gpus) * int(1 / per_actor + 1e-9)


def _too_few(actors: int, gpus: float, cpus: float) -> str:
    """What was asked for and what is there; CPUs are spoken of where actors reserve them."""
    resources = ray.cluster_resources()
    asked, there, settings = [f"{gpus:g} GPUs"], [f"{resources.get('GPU', 0):g}"], ["pool.actors"]
    settings += ["pool.gpus_per_actor"] if gpus else []
    if cpus:
        asked, there = [*asked, f"{cpus:g} CPUs"], [f"{there[0]} GPUs", f"{resources.get('CPU', 0):g} CPUs"]
        settings.append("pool.cpus_per_actor")
    return (
        f"asked for {actors} x {' and '.join(asked)}, the cluster has {' and '.join(there)}: lower "
        f"{' or '.join(settings)}, or give Ray more"
    )


def _device(gpus: float) -> str:
    return "cuda" if gpus and has_cuda() else "cpu"


def _unreadable(paths: Sequence[str]) -> list[str]:
    """Those of the paths that this node cannot see."""

    def is_there(path: str) -> bool:
        try:
            return exists(path)
        except OSError:
            return False

    return [path for path in paths if not is_there(path)]


def _cause(error: RayTaskError) -> BaseException:
    """The error as it was raised in the other process, if it was raised on purpose; else a sentence about it."""
    cause = error.cause
    return cause if isinstance(cause, TwotowerError) else RunError(f"a worker failed: {_first_line(cause)}")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
