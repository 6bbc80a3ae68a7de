"""Ray found or started, its nodes checked, and the pool sized by what it has."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import Config
from pipeline.errors import ClusterError, RunError, TwotowerError, described, first_line
from pipeline.paths import exists
from pipeline.run.signals import Stop

log = logging.getLogger(__name__)
_POLL_S = 0.5


_JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"


_NODE_CHECK_TIMEOUT_S = 120.0


_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class PoolSize:
    """How many actors, with what each, on the cluster as it is.

    Attributes:
        actors: at most.
        gpus: of the whole cluster.
        actors_per_node: where GPUs do not say how many a node takes.
        decode_threads: of each actor; None: as its node has cores for it.
        torch_threads: likewise.
    """

    actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    gpus: float
    actors_per_node: int
    decode_threads: int | None
    torch_threads: int | None

    def cores_of_an_actor(self, node: Mapping[str, float]) -> int:
        """An actor's share of the cores of the node that it is on, at least one.

        Args:
            node: the node's resources, as Ray counts them.
        """
        there = slots(node.get("GPU", 0.0), self.gpus_per_actor) if self.gpus_per_actor else self.actors_per_node
        return max(1, int(node.get("CPU", 1)) // max(1, min(there, self.actors)))


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
    except ClusterError:
        raise
    except Exception as error:  # a bare Exception too: Ray raises it where its processes do not come up in time
        reason = first_line(error).rstrip(".")
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

    Ray has read an explicit mode as it was imported, so another one would hold for its processes, but not for us. Its
    workers run at nice 15 by default, where anything else on the machine starves them; here they are the job itself.
    """
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_worker_niceness")}
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_worker_niceness", "0")
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
    resources = ray.cluster_resources()
    gpus = float(resources.get("GPU", 0))
    per_actor = pool.gpus_per_actor if pool.gpus_per_actor is not None else (1.0 if gpus else 0.0)
    for name, value in (("gpus", per_actor), ("cpus", pool.cpus_per_actor)):
        if value > 1 and value != int(value):
            raise ClusterError(f"pool.{name}_per_actor is a fraction up to 1, or a whole number; got {value:g}")
    actors = pool.actors if pool.actors is not None else actors_that_fit(per_actor)
    if ray_address(config) == "local" and (
        (per_actor and actors > slots(gpus, per_actor))
        or actors * pool.cpus_per_actor > float(resources.get("CPU", 0)) + 1e-9
    ):
        raise ClusterError(too_few(actors, per_actor, pool.cpus_per_actor))
    actors = min(actors, max(1, partitions))
    nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
    per_node = math.ceil(actors / max(1, nodes))
    return PoolSize(actors, per_actor, pool.cpus_per_actor, gpus, per_node, pool.decode_threads, pool.torch_threads)


def actors_that_fit(per_actor: float) -> int:
    """How many actors the cluster has room for as it is now, at least one: GPU by GPU, or one on each node without."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if per_actor:
        return max(1, sum(slots(float(node.get("GPU", 0)), per_actor) for node in nodes))
    return sum(node.get("CPU", 0) > 0 for node in nodes) or 1


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
            raise ClusterError(f"node {node_address} cannot run this project: {described(error.cause)}") from error
        except RayError as error:
            raise ClusterError(f"node {node_address} cannot run this project: {described(error)}") from error
        if missing:
            raise ClusterError(
                f"node {node_address} cannot read {missing[0]}; use an object store or a folder that all nodes share"
            )


def slots(gpus: float, per_actor: float) -> int:
    """How many actors fit: a fraction shares a GPU, but does not straddle two."""
    if per_actor >= 1:
        return int(gpus // per_actor)
    return int(gpus) * int(1 / per_actor + 1e-9)


def too_few(actors: int, gpus: float, cpus: float) -> str:
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


def _unreadable(paths: Sequence[str]) -> list[str]:
    """Those of the paths that this node cannot see."""

    def is_there(path: str) -> bool:
        try:
            return exists(path)
        except OSError:
            return False

    return [path for path in paths if not is_there(path)]


def cause(error: RayTaskError) -> BaseException:
    """The error as it was raised in the other process, if it was raised on purpose; else a sentence about it."""
    cause = error.cause
    return cause if isinstance(cause, TwotowerError) else RunError(f"a worker failed: {described(cause)}")
