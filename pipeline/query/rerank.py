"""Diversity: k-means over the candidates' image vectors, then one hit from each cluster in turn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from pipeline.errors import QueryError

Vectors = npt.NDArray[np.float32]

_GRID = 1e-4
"""Image vectors closer than this in every coordinate count as one point for k-means."""

_STARTS = 3
"""K-means from so many drawn starts; more cost 2 ms each and change little on so few points."""


@dataclass(frozen=True, slots=True)
class Diversify:
    """How a result is diversified.

    Attributes:
        candidates: how many of the best hits are reordered; at least offset + k are.
        clusters: into how many groups of similar pictures they fall, at most.
        seed: of the k-means; the same candidates always give the same order.
    """

    candidates: int = 50
    clusters: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("candidates", 1, 10_000), ("clusters", 1, 1_000), ("seed", 0, 2**32 - 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise QueryError(f"Diversify: {name} is a whole number from {low} to {high}, not {value!r}.")


@dataclass(frozen=True, slots=True)
class Reranked:
    """A permutation of the candidates.

    Attributes:
        order: positions of the candidates, in their new order.
        clusters: cluster of each candidate in the old order; None without an image. Cluster 0 holds the best hit.
    """

    order: tuple[int, ...]
    clusters: tuple[int | None, ...]


def rerank(vectors: Sequence[npt.ArrayLike | None], diversify: Diversify) -> Reranked:
    """Spread the candidates over clusters of similar pictures.

    Candidates without a vector belong to no cluster and keep their place. The others fill the places that are left:
    clusters are ordered by their best hit and give one hit each in turn, best first. So the result is a permutation,
    and of the hits with pictures the first min(clusters, distinct vectors) come from different clusters.

    Args:
        vectors: image vectors (D,) of the candidates, best first, or None.
        diversify: candidates beyond what it says are reordered too: the caller cuts.
    """
    places = [place for place, vector in enumerate(vectors) if vector is not None]
    clusters: list[int | None] = [None] * len(vectors)
    order = list(range(len(vectors)))
    if places:
        points = np.stack([np.asarray(vectors[place], dtype=np.float32) for place in places])  # (n, D)
        labels = _by_first_seen(_cluster(points, diversify.clusters, diversify.seed))
        for place, label in zip(places, labels, strict=True):
            clusters[place] = label
        for place, member in zip(places, _round_robin(labels), strict=True):
            order[place] = places[member]
    return Reranked(order=tuple(order), clusters=tuple(clusters))


def _round_robin(labels: Sequence[int]) -> list[int]:
    """Members of clusters 0, 1, 2 ... in turn, each cluster's in order. Labels are numbered by first appearance."""
    seen: dict[int, int] = {}
    turns: list[tuple[int, int, int]] = []
    for member, label in enumerate(labels):
        seen[label] = seen.get(label, -1) + 1
        turns.append((seen[label], label, member))
    return [member for _, _, member in sorted(turns)]


def _by_first_seen(labels: npt.NDArray[np.int64]) -> list[int]:
    numbers: dict[int, int] = {}
    return [numbers.setdefault(int(label), len(numbers)) for label in labels]


def _cluster(points: Vectors, wanted: int, seed: int) -> npt.NDArray[np.int64]:
    """Labels (n,) in min(wanted, distinct points) clusters, none of them empty."""
    groups: dict[bytes, int] = {}
    rounded = np.round(points / _GRID) + 0.0  # + 0.0: one zero, not two
    place = np.array([groups.setdefault(row.tobytes(), len(groups)) for row in rounded])
    labels = place
    if len(groups) > wanted:
        firsts = points[np.unique(place, return_index=True)[1]]
        labels = _workers().submit(_k_means, firsts, np.bincount(place), wanted, seed).result()[place]
    return _fill(points, labels, wanted)


def _k_means(points: Vectors, weights: npt.NDArray[np.int64], clusters: int, seed: int) -> npt.NDArray[np.int64]:
    from sklearn.cluster import KMeans

    model = KMeans(n_clusters=clusters, n_init=_STARTS, random_state=seed)
    labels: npt.NDArray[np.int64] = model.fit_predict(points.astype(np.float64), sample_weight=weights).astype(np.int64)
    return labels


def _fill(points: Vectors, labels: npt.NDArray[np.int64], wanted: int) -> npt.NDArray[np.int64]:
    """Split clusters that hold distinct points until there are min(wanted, distinct points) of them."""
    labels = labels.copy()
    while len(used := np.unique(labels)) < wanted:
        for label in used:
            members = np.flatnonzero(labels == label)
            far = np.abs(points[members] - points[members[0]]).max(axis=1)
            if far.max() > 0:
                labels[members[far == far.max()]] = labels.max() + 1
                break
        else:
            break
    return labels


@cache
def _workers() -> ThreadPoolExecutor:
    """Threads of our own, with OpenMP limited once in each: 50 points are too few to share out between cores."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="rerank", initializer=_limit_threads)


def _limit_threads() -> None:
    import sklearn.cluster  # noqa: F401  # loads the OpenMP library that is limited
    from threadpoolctl import threadpool_limits

    threadpool_limits(limits=1, user_api="openmp")
