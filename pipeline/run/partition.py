"""One partition's way: read and prepared a batch ahead, embedded, and staged in one file."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.catalog.partitions import Catalog, Partition
from pipeline.catalog.products import RowPlan, read_products
from pipeline.records import Product, Rejected
from pipeline.run.embed import Embedder, Pending
from pipeline.run.staging import StagedWriter, staged_schema

_PREPARED_BATCHES = 2


@dataclass(frozen=True)
class PartitionResult:
    """What became of a partition: its staged file, and the counts that must add up."""

    name: str
    path: str
    sha256: str
    counts: Mapping[str, int]
    seconds: Mapping[str, float]
    wall_s: float


def stage_partition(
    embedder: Embedder, catalog: Catalog, partition: Partition, plan: RowPlan, path: str
) -> PartitionResult:
    """Read, embed and stage one partition; reading and decoding run one batch ahead of the towers."""
    start = time.perf_counter()
    embedder.forget()
    progress = embedder.progress
    counts_before, seconds_before = progress.counts(), dict(progress.seconds)
    schema = staged_schema(embedder.model.dim, catalog.carried)
    with StagedWriter(path, schema, catalog.carried) as writer:
        for products, row_rejects, pending in _prepared(embedder, catalog, partition, plan):
            inputs, rejects = embedder.finish(pending)
            with progress.timed("write"):
                writer.write(products, inputs, [*row_rejects, *rejects])
            progress.products += sum(product.is_first for product in products)
            progress.rows += len(products) + len(row_rejects)
            progress.rejected_rows += len(row_rejects)
    counts = {name: value - counts_before[name] for name, value in progress.counts().items()}
    seconds = {name: value - seconds_before[name] for name, value in progress.seconds.items()}
    return PartitionResult(partition.name, path, writer.sha256, counts, seconds, time.perf_counter() - start)


def _prepared(
    embedder: Embedder, catalog: Catalog, partition: Partition, plan: RowPlan
) -> Iterator[tuple[list[Product], list[Rejected], list[Pending]]]:
    """Batches read and prepared by a thread of their own, a bounded number ahead."""
    batches: queue.Queue[Any] = queue.Queue(_PREPARED_BATCHES)
    is_over = threading.Event()

    def put(item: object) -> None:
        while not is_over.is_set():
            try:
                batches.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def produce() -> None:
        try:
            reader = read_products(catalog, partition, plan)
            while not is_over.is_set():
                with embedder.progress.timed("read"):
                    batch = next(reader, None)
                if batch is None:
                    return put(None)
                put((*batch, embedder.prepare(batch[0])))
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=produce, name="reader", daemon=True)
    thread.start()
    try:
        while (item := batches.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_over.set()
        thread.join()
