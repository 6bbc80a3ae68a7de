"""One partition's way: read and prepared a batch ahead, embedded, and staged in one file."""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.catalog.partitions import Catalog, Partition
from pipeline.catalog.products import RowPlan, product_ids, read_products, row_digest
from pipeline.records import Product, Reason, Rejected
from pipeline.run.embed import Begun, Embedder, Pending
from pipeline.run.progress import Progress
from pipeline.run.schedule import Unit
from pipeline.run.staging import SeenRow, StagedWriter, staged_schema
from pipeline.run.wanted import read_wanted

_PREPARED_BATCHES = 2
_PER_TASK = 200_000


@dataclass(frozen=True)
class StagedFile:
    """A staged file, its digest, and how often its rows were tried."""

    path: str
    sha256: str
    attempt: int = 1


@dataclass(frozen=True)
class PartitionResult:
    """What became of a partition, or of a part of it: its staged files, and the counts that must add up."""

    name: str
    files: tuple[StagedFile, ...]
    counts: Mapping[str, int]
    seconds: Mapping[str, float]
    wall_s: float
    waits: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Staged:
    """A staged file and the partition that it came from."""

    path: str
    partition: str
    attempt: int = 1


@dataclass(frozen=True)
class Work:
    """Rows of a partition for an actor, with where its staged file goes.

    Attributes:
        wanted_path: names the only inputs that are to be embedded; the staged file then holds their vectors alone.
    """

    partition: Partition
    plan: RowPlan
    unit: Unit
    staged_path: str
    wanted_path: str | None = None


def joined(parts: Sequence[PartitionResult]) -> PartitionResult:
    """Parts of one partition as one result."""
    total = Progress()
    for part in parts:
        total.add(part.counts, part.seconds, part.waits)
    files = tuple(file for part in parts for file in part.files)
    wall_s = sum(part.wall_s for part in parts)
    return PartitionResult(parts[0].name, files, total.counts(), total.seconds, wall_s, total.waits)


def staged_files(results: Sequence[PartitionResult]) -> list[Staged]:
    """The files of all partitions."""
    return [Staged(file.path, result.name, file.attempt) for result in results for file in result.files]


def grouped(
    sources: Sequence[Staged], results: Sequence[PartitionResult], counted: Sequence[str]
) -> list[list[Staged]]:
    """Staged files, for tasks: in groups of about 200,000 of what is counted.

    Args:
        sources: from `staged_files`.
        results: their partitions.
        counted: names of counts.
    """
    each = {result.name: sum(result.counts[name] for name in counted) / len(result.files) for result in results}
    groups: list[list[Staged]] = [[]]
    size = 0.0
    for source in sources:
        if size and size + each[source.partition] > _PER_TASK:
            groups.append([])
            size = 0.0
        groups[-1].append(source)
        size += each[source.partition]
    return [group for group in groups if group]


def stage_partition(embedder: Embedder, catalog: Catalog, work: Work) -> PartitionResult:
    """Read, embed and stage rows of one partition.

    The towers have the next batch in hand as one is written, and reading and decoding run ahead of both.
    """
    start = time.perf_counter()
    embedder.forget()
    progress = embedder.progress
    counts, seconds, waits = progress.counts(), dict(progress.seconds), dict(progress.waits)
    schema = staged_schema(embedder.model.dim, catalog.carried)
    with StagedWriter(work.staged_path, schema, catalog.carried) as writer:
        for products, row_rejects, begun in _begun(embedder, catalog, work):
            seen = _seen(products, row_rejects, begun.pending)
            inputs, rejects = embedder.finish(begun)
            with progress.timed("write", embedder.busy):
                if work.wanted_path is None:
                    writer.write(products, inputs, [*row_rejects, *rejects], seen)
                else:
                    writer.write([], inputs, [*row_rejects, *rejects])
            progress.products += sum(product.is_first for product in products)
            progress.rows += len(products) + len(row_rejects)
            progress.rejected_rows += len(row_rejects)
            for reject in row_rejects:
                progress.reasons[reject.reason] += 1
        written = time.perf_counter()
    progress.spend("write", time.perf_counter() - written)  # closing the file is most of it on a slow disk or store
    wall_s = time.perf_counter() - start
    embedder.settle(wall_s, seconds)
    counts = {name: value - counts[name] for name, value in progress.counts().items()}
    seconds = {stage: value - seconds[stage] for stage, value in progress.seconds.items()}
    waits = {cause: value - waits[cause] for cause, value in progress.waits.items()}
    file = StagedFile(work.staged_path, writer.sha256, work.unit.attempt)
    return PartitionResult(work.partition.name, (file,), counts, seconds, wall_s, waits)


def stage_condemned(catalog: Catalog, work: Work, dim: int, detail: str) -> PartitionResult:
    """Stage a row that no worker survives as one reject. Only its id is read, which the plan did before."""
    row = work.unit.first_row
    (ids,) = catalog.read(work.partition, [catalog.columns.product_id], rows=(row, row + 1))
    (product_id,) = product_ids(ids.column(0)).to_pylist()
    reject = Rejected(product_id, row, "row", Reason.WORKER_CRASHED, detail)
    with StagedWriter(work.staged_path, staged_schema(dim, catalog.carried), catalog.carried) as writer:
        writer.write([], [], [reject], [SeenRow(product_id, row, None)] if product_id is not None else [])
    file = StagedFile(work.staged_path, writer.sha256, work.unit.attempt)
    counts = Progress(rows=1, rejected_rows=1).counts()
    return PartitionResult(work.partition.name, (file,), counts, {}, 0.0)


def _seen(products: Sequence[Product], rejects: Sequence[Rejected], pending: Sequence[Pending]) -> list[SeenRow]:
    """What each row with an id says, for later runs to compare; rows that were not read to their end say nothing."""
    marks: dict[int, list[tuple[int | None, str]]] = defaultdict(list)
    for item in pending:
        if item.mark is not None:
            marks[item.row].append(item.mark)
    seen = [SeenRow(p.product_id, p.row, row_digest(p.content, marks[p.row])) for p in products]
    return seen + [SeenRow(r.product_id, r.row, None) for r in rejects if r.product_id is not None]


def _begun(embedder: Embedder, catalog: Catalog, work: Work) -> Iterator[tuple[list[Product], list[Rejected], Begun]]:
    """Batches that the towers have begun with, each once they have the one after it too."""
    before: tuple[list[Product], list[Rejected], Begun] | None = None
    for products, rejects, pending in _prepared(embedder, catalog, work):
        begun = products, rejects, embedder.begin(pending)
        if before is not None:
            yield before
        before = begun
    if before is not None:
        yield before


def _prepared(
    embedder: Embedder, catalog: Catalog, work: Work
) -> Iterator[tuple[list[Product], list[Rejected], list[Pending]]]:
    """Batches read and prepared by a thread of their own, a bounded number ahead."""
    batches: queue.Queue[Any] = queue.Queue(_PREPARED_BATCHES)
    is_over = threading.Event()
    progress = embedder.progress

    def put(item: object) -> None:
        while not is_over.is_set():
            try:
                batches.put(item, timeout=0.1)
            except queue.Full:
                continue
            progress.ready_batches = batches.qsize()
            return

    def produce() -> None:
        try:
            unit = work.unit
            wanted = _wanted(work.wanted_path)
            rows = (unit.first_row, unit.stop_row)
            reader = read_products(catalog, work.partition, work.plan, rows=rows, batch_rows=unit.batch_rows)
            while not is_over.is_set():
                with progress.timed("read"):
                    batch = next(reader, None)
                prepared = None if batch is None else (*batch, embedder.prepare(batch[0], wanted))
                with progress.waited("room"):
                    put(prepared)
                if prepared is None:
                    return
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=produce, name="reader", daemon=True)
    thread.start()
    try:
        while True:
            with progress.waited("batch", embedder.busy):
                item = batches.get()
            progress.ready_batches = batches.qsize()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_over.set()
        thread.join()


def _wanted(path: str | None) -> frozenset[tuple[str, str]] | None:
    """Kind and sha256 of the inputs that a wanted file names."""
    if path is None:
        return None
    table = read_wanted(path)
    return frozenset(zip(table["kind"].to_pylist(), table["sha256"].to_pylist(), strict=True))
