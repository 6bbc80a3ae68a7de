"""Vector and scalar indices of a database, and the probes that reach the wanted recall with the queries users send."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import lance
import lancedb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from lancedb.index import FTS, Bitmap, BTree

from pipeline.errors import ReleaseRefused
from pipeline.store.tables import READ_AHEAD_BYTES
from pipeline.store.transactions import persistently

Vectors = npt.NDArray[np.float32]

MODES = {"text": "text_vector", "image": "image_vector", "avg": "avg_vector"}
"""Search mode to the column of `products` that it searches."""

PRESENT = {"text": "has_text", "image": "n_images > 0", "avg": "has_text OR n_images > 0"}
"""Which products have the mode's vector; reading these columns is much cheaper than reading vectors."""

ROWS_PER_PARTITION, MIN_PARTITIONS, MAX_PARTITIONS = 800, 16, 4096
REFINES = (2, 4, 8, 16)
MIN_RECALL = 0.99
SCALAR_INDICES = {"products": ("product_id", "text_sha256"), "images": ("product_id", "sha256")}
"""Keys, and the hashes by which a later run finds vectors to reuse."""

TEXT_INDICES = ("title", "description")
"""Columns of `products` with a full-text index: lower case, English stems, without stop words, accents folded."""

_QUERIES = 200
_K = 10
_SAMPLE_PER_PARTITION = 48
_ITERATIONS = 8
_BITMAP_VALUES = 1_000
_TIE = 1e-5


@dataclass(frozen=True, slots=True)
class VectorIndex:
    """How one mode is searched in a release.

    Attributes:
        kind: `exact` (no index) or `ivf_sq`.
        rows: products that have the vector.
        partitions: of the index; 0 without one.
        probes: partitions that a query reads; 0 without an index.
        refine: how many times k candidates are scored again with the full vectors.
        recall_at_10: against exact search, measured with text vectors as queries.
        folded: rows that came after the centroids were found.
        unmeasured: those of them that came after recall was measured.
    """

    kind: str
    rows: int
    partitions: int = 0
    probes: int = 0
    refine: int = REFINES[0]
    recall_at_10: float = 1.0
    folded: int = 0
    unmeasured: int = 0


def build_indices(
    db: str, *, seed: int = 0, min_rows: int = 5000, min_recall: float = MIN_RECALL
) -> dict[str, dict[str, Any]]:
    """Index the latest version of `products` and `images`; each index is a commit of its own.

    Args:
        db: folder or URI of the database; nobody else may write to it meanwhile.
        seed: of the centroids' sample and of the measured queries.
        min_rows: with fewer vectors a mode gets no index and is searched exactly.
        min_recall: as many probes are kept for a query as reach this recall@10.

    Returns:
        By mode the fields of `VectorIndex`, for the release's row.

    Raises:
        ReleaseRefused: an index came out with another number of partitions than was asked for.
    """
    connection = lancedb.connect(db)
    built = {
        mode: persistently(partial(build_vector_index, connection, mode, seed, min_rows, min_recall)) for mode in MODES
    }
    _scalar_indices(connection)
    return {mode: asdict(index) for mode, index in built.items()}


def measure_indices(
    db: str, version: int, *, seed: int = 0, min_recall: float = MIN_RECALL
) -> dict[str, dict[str, Any]]:
    """What `build_indices` returns, for the indices that a version of `products` has already."""
    table = lancedb.connect(db).open_table("products")
    table.checkout(version)
    dataset = table.to_lance()
    known = {index.name for index in dataset.describe_indices()}
    measured: dict[str, dict[str, Any]] = {}
    for mode, column in MODES.items():
        index = VectorIndex("exact", dataset.count_rows(filter=PRESENT[mode]))
        if f"{column}_idx" in known:
            parts = [part["num_partitions"] for part in index_statistics(dataset, f"{column}_idx")["indices"]]
            probes, refine, recall = probe_index(table, mode, partitions=max(parts), seed=seed, min_recall=min_recall)
            index = VectorIndex("ivf_sq", index.rows, max(parts), probes, refine, round(recall, 4))
        measured[mode] = asdict(index)
    return measured


def index_statistics(dataset: lance.LanceDataset, name: str) -> dict[str, Any]:
    """Lance's statistics of an index: partitions, and rows that it lacks."""
    os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")  # thousands of vectors that nobody asked for
    return dict(dataset.stats.index_stats(name))


def index_partitions(rows: int) -> int:
    """How many partitions an index over so many vectors should have."""
    return min(max(rows // ROWS_PER_PARTITION, MIN_PARTITIONS), MAX_PARTITIONS, rows)


def build_vector_index(connection: Any, mode: str, seed: int, min_rows: int, min_recall: float) -> VectorIndex:
    """Build the index of one mode over the latest version, and find its probes; none where there are few vectors."""
    table = connection.open_table("products")
    dataset = table.to_lance()
    rows = dataset.count_rows(filter=PRESENT[mode])
    if rows < max(min_rows, 1):
        if f"{MODES[mode]}_idx" in {index.name for index in table.list_indices()}:
            table.drop_index(f"{MODES[mode]}_idx")
        return VectorIndex(kind="exact", rows=rows)
    partitions = index_partitions(rows)
    rng = np.random.default_rng(seed)
    _, sample = _sample(dataset, mode, partitions * _SAMPLE_PER_PARTITION, rng)
    centroids = k_means(sample, partitions, rng)
    _create(dataset, mode, centroids)
    probes, refine, recall = probe_index(
        connection.open_table("products"), mode, partitions=partitions, seed=seed, min_recall=min_recall
    )
    return VectorIndex("ivf_sq", rows, partitions, probes, refine, round(recall, 4))


def _create(dataset: lance.LanceDataset, mode: str, centroids: Vectors) -> None:
    """Build IVF_SQ on our own centroids: Lance's training collapses above 256 partitions."""
    name = f"{MODES[mode]}_idx"
    create = partial(
        dataset.create_index,
        MODES[mode],
        "IVF_SQ",
        name=name,
        metric="cosine",
        replace=True,
        num_partitions=len(centroids),
        ivf_centroids=centroids,
    )
    persistently(create)
    counts = [index["num_partitions"] for index in index_statistics(dataset, name)["indices"]]
    if counts != [len(centroids)]:
        raise ReleaseRefused(f"The index on {MODES[mode]} has {counts} partitions instead of {len(centroids)}.")


def k_means(points: Vectors, clusters: int, rng: np.random.Generator) -> Vectors:
    """Spherical k-means by matrix products: centroids float32 (clusters, D), unit L2 norm.

    Args:
        points: float32 (n, D), unit L2 norm, n >= clusters.
        clusters: how many; a centroid that loses all its points moves to a random one.
        rng: draws the first centroids.
    """
    centroids = points[rng.choice(len(points), clusters, replace=False)].copy()
    for _ in range(_ITERATIONS):
        labels = np.concatenate(
            [np.argmax(points[at : at + 8192] @ centroids.T, axis=1) for at in range(0, len(points), 8192)]
        )
        order = np.argsort(labels, kind="stable")
        used, starts = np.unique(labels[order], return_index=True)
        sums = np.add.reduceat(points[order], starts, axis=0)
        centroids[used] = sums
        lost = np.setdiff1d(np.arange(clusters), used)
        centroids[lost] = points[rng.choice(len(points), len(lost))]
        centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    return centroids


def probe_index(
    table: Any, mode: str, *, partitions: int, seed: int = 0, min_recall: float = MIN_RECALL
) -> tuple[int, int, float]:
    """Find the fewest probes, doubling from 8, whose recall@10 reaches `min_recall`; then more candidates to score.

    Text vectors of sampled products are the queries, because recall differs across the gap between text and images;
    in text mode, and where no product has text, rows are queried without themselves.

    Returns:
        The probes, how many times k candidates are scored again, and the recall@10 that they gave; all partitions and
        the most candidates where even those are not enough.
    """
    dataset = table.to_lance()
    source = "text" if dataset.count_rows(filter=PRESENT["text"]) else "image"
    own_ids, queries = _sample(dataset, source, _QUERIES, np.random.default_rng(seed + 1))
    skip = own_ids if source == mode or source == "image" else [""] * len(queries)
    floor = _tenth_best(dataset, mode, queries, skip)
    probes, refine = min(8, partitions), REFINES[0]
    while True:
        recall = _recall(table, mode, queries, skip, floor, probes, refine)
        if recall >= min_recall or (probes, refine) == (partitions, REFINES[-1]):
            return probes, refine, recall
        if probes < partitions:
            probes = min(probes * 2, partitions)
        else:
            refine *= 2


def _recall(
    table: Any, mode: str, queries: Vectors, skip: list[str], floor: npt.NDArray[np.float32], probes: int, refine: int
) -> float:
    """Share of the ten best, ties counted as equal, that `probes` partitions give."""
    found = (
        table.search(queries, vector_column_name=MODES[mode])  # all queries in one call
        .distance_type("cosine")
        .nprobes(probes)
        .refine_factor(refine)
        .select(["product_id", "_distance"])
        .limit(_K + 1)
        .to_arrow()
    )
    query = found["query_index"].to_numpy()
    order = np.lexsort((found["_distance"].to_numpy(), query))
    query, scores = query[order], 1 - found["_distance"].to_numpy()[order]
    ids = found["product_id"].to_numpy(zero_copy_only=False)[order]
    hits = 0
    for at, (own_id, tenth) in enumerate(zip(skip, floor, strict=True)):
        mine = query == at
        hits += int(np.count_nonzero(scores[mine][ids[mine] != own_id][:_K] >= tenth - _TIE))
    return hits / (_K * len(queries))


def _tenth_best(dataset: lance.LanceDataset, mode: str, queries: Vectors, skip: list[str]) -> npt.NDArray[np.float32]:
    """Exact score of each query's tenth best product other than `skip`, in one pass: float32 (queries,)."""
    own = {product_id: query for query, product_id in enumerate(skip)}
    best = np.full((len(queries), _K), -np.inf, dtype=np.float32)
    for ids, vectors in _vectors(dataset, mode):
        scores = queries @ vectors.T
        for row, product_id in enumerate(ids):
            if product_id in own:
                scores[own[product_id], row] = -np.inf
        both = np.concatenate([best, scores], axis=1)
        best = np.partition(both, both.shape[1] - _K, axis=1)[:, -_K:]
    return np.asarray(best.min(axis=1))


def _sample(dataset: lance.LanceDataset, mode: str, count: int, rng: np.random.Generator) -> tuple[list[str], Vectors]:
    """Ids and vectors float32 (count, D), unit L2 norm, of random products that have the mode's vector."""
    present = dataset.to_table(columns=[], filter=PRESENT[mode], with_row_address=True)["_rowaddr"].to_numpy()
    chosen = rng.choice(present, min(count, len(present)), replace=False)
    taken = dataset._take_rows(np.sort(chosen).tolist(), columns=["product_id", MODES[mode]])
    return taken["product_id"].to_pylist(), _matrix(taken[MODES[mode]].combine_chunks())


def _vectors(dataset: lance.LanceDataset, mode: str) -> Iterator[tuple[list[str], Vectors]]:
    """Ids and vectors float32 (batch, D) of all products that have the mode's vector."""
    columns = ["product_id", MODES[mode]]
    for batch in dataset.to_batches(
        columns=columns, filter=PRESENT[mode], batch_size=8192, io_buffer_size=READ_AHEAD_BYTES
    ):
        yield batch["product_id"].to_pylist(), _matrix(batch[MODES[mode]])


def _matrix(column: pa.Array) -> Vectors:
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False), dtype=np.float32).reshape(len(column), -1)


def scalar_columns(table: Any, name: str) -> dict[str, type]:
    """Columns of a table that get a scalar index, and its kind: keys, hashes, texts, and categories with few values."""
    columns: dict[str, type] = dict.fromkeys(SCALAR_INDICES[name], BTree)
    if name == "products":
        columns |= dict.fromkeys(TEXT_INDICES, FTS)
    for column in ("broad_category", "fine_category") if name == "products" else ():
        if len(table.to_lance().to_table(columns=[column])[column].unique()) <= _BITMAP_VALUES:
            columns[column] = Bitmap
    return columns


def build_scalar_index(table: Any, column: str, kind: type) -> None:
    """Build a scalar index over all rows."""
    table.create_index(column, config=kind(), replace=True)


def _scalar_indices(connection: Any) -> None:
    for name in SCALAR_INDICES:
        table = persistently(partial(connection.open_table, name))
        for column, kind in scalar_columns(table, name).items():
            persistently(partial(build_scalar_index, table, column, kind))
