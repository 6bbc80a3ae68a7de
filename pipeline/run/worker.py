"""The actor around the plain Embedder."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace

import ray

from pipeline.catalog.partitions import Catalog
from pipeline.errors import ClusterError
from pipeline.model.resize import IS_COMPILED
from pipeline.paths import exists
from pipeline.run.cluster import PoolSize
from pipeline.run.embed import Embedder, EmbedSettings, ReuseSource, has_cuda
from pipeline.run.memory import limit_memory
from pipeline.run.metrics import ActorMetrics
from pipeline.run.partition import PartitionResult, Work, stage_partition
from pipeline.run.progress import Progress

_MOST_DECODE_THREADS = 16


@dataclass(frozen=True)
class ActorInfo:
    """What an actor got: its GPUs as Ray numbers them, and the device that torch uses."""

    actor: int
    node: str
    node_id: str
    node_cpus: float
    pid: int
    gpu_ids: tuple[str, ...]
    cuda_visible_devices: str | None
    device: str
    decode_threads: int
    is_resize_compiled: bool
    model_id: str
    fingerprint: str


class EmbedWorker:
    """The actor: an Embedder that is loaded once and takes partitions one after another."""

    def __init__(self, number: int) -> None:
        # Read as torch is imported, which is later. By default OpenMP's threads spin for a millisecond as they wait for
        # each other, and take from decoding what the towers do not use; without any spinning the towers are slower.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        self._number = number
        self._embedder: Embedder | None = None
        self._catalog: Catalog | None = None
        self._metrics: ActorMetrics | None = None

    def start(self, settings: EmbedSettings, catalog: Catalog, reuse: ReuseSource | None, size: PoolSize) -> ActorInfo:
        """Load the model on the device that this actor owns, and check that it is the only one it can see."""
        gpu_ids = tuple(str(i) for i in ray.get_runtime_context().get_accelerator_ids().get("GPU", []))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if size.gpus_per_actor and (visible is None or tuple(visible.split(",")) != gpu_ids):
            raise ClusterError(
                f"Ray gave this actor GPU {','.join(gpu_ids)} but CUDA_VISIBLE_DEVICES is {visible!r} on "
                f"{socket.gethostname()}; unset RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES there"
            )
        file = catalog.partitions[0].file
        if not exists(file):  # a node that came late was not asked before
            raise ClusterError(f"node {socket.gethostname()} cannot read {file}; use storage that all nodes share")
        device = settings.device if settings.device != "auto" else _device(size.gpus_per_actor)
        node_id = ray.get_runtime_context().get_node_id()
        node = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id)
        cores = size.cores_of_an_actor(node)
        torch_threads = size.torch_threads or (1 if device == "cuda" else cores)
        # On a CPU towers and decoding share threads, where they are as many.
        decode_threads = torch_threads if device == "cpu" else min(_MOST_DECODE_THREADS, cores)
        settings = replace(
            settings,
            device=device,
            decode_threads=size.decode_threads or decode_threads,
            torch_threads=torch_threads,
        )
        self._embedder = Embedder(settings, catalog.root, reuse)
        self._catalog = catalog
        self._metrics = ActorMetrics(self._number)
        if settings.memory_bytes is not None:
            limit_memory(settings.memory_bytes)
        model = self._embedder.model
        return ActorInfo(
            actor=self._number,
            node=socket.gethostname(),
            node_id=node_id,
            node_cpus=float(node.get("CPU", 0)),
            pid=os.getpid(),
            gpu_ids=gpu_ids,
            cuda_visible_devices=visible,
            device=device,
            decode_threads=settings.decode_threads,
            is_resize_compiled=IS_COMPILED,
            model_id=model.model_id,
            fingerprint=model.fingerprint,
        )

    def embed(self, work: Work) -> PartitionResult:
        """Stage rows of one partition."""
        assert self._embedder is not None
        assert self._catalog is not None
        return stage_partition(self._embedder, self._catalog, work)

    def progress(self) -> Progress | None:
        """Counts so far; answered while a partition is being embedded. Feeds the metrics too."""
        if self._embedder is None or self._metrics is None:
            return None
        progress = self._embedder.progress
        progress.tower_batches = self._embedder.model.n_batches
        self._metrics.update(progress)
        return progress


def with_control(cls: type[EmbedWorker]) -> type[EmbedWorker]:
    """The worker with `progress` in a concurrency group of its own, so that it answers during `embed`."""

    class Worker(cls):  # type: ignore[valid-type, misc]
        @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
        def progress(self) -> Progress | None:
            return super().progress()  # type: ignore[no-any-return]

    Worker.__name__ = Worker.__qualname__ = cls.__name__
    return Worker


def _device(gpus: float) -> str:
    return "cuda" if gpus and has_cuda() else "cpu"
