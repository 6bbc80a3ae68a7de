"""Diversity over the candidates' image vectors: k-means and turns, maximal marginal relevance, and duplicates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import QueryError

Vectors = npt.NDArray[np.float32]

_GRID = 1e-4
"""Image vectors closer than this in every coordinate count as one point for k-means."""

_ROUNDING = 1e-6
"""What float32 makes of the distance of a vector to itself."""

_STARTS = 50
"""So many starts are drawn for k-means, and the best one is followed: following each, as `n_init` does, costs 2 ms a
start on 50 points, nearly all of it Python."""


METHODS = ("kmeans", "mmr")


@dataclass(frozen=True, slots=True)
class Diversify:
    """How a result is diversified.

    Attributes:
        candidates: how many of the best hits are reordered; at least offset + k are.
        clusters: into how many groups of similar pictures they fall, at most.
        seed: of the k-means; the same candidates always give the same order.
        method: `kmeans`: one hit from each cluster in turn. `mmr`: each next hit is the one of maximal marginal
            relevance (Carbonell and Goldstein, SIGIR 1998), which has no clusters.
        trade_off: of `mmr`, from 0, only different pictures, to 1, only the query.
    """

    candidates: int = 50
    clusters: int = 5
    seed: int = 0
    method: str = "kmeans"
    trade_off: float = 0.5

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise QueryError(f"Diversify: method is one of {', '.join(METHODS)}, not {self.method!r}.")
        if isinstance(self.trade_off, bool) or not isinstance(self.trade_off, int | float):
            raise QueryError(f"Diversify: trade_off is a number from 0 to 1, not {self.trade_off!r}.")
        if not 0 <= self.trade_off <= 1:
            raise QueryError(f"Diversify: trade_off is a number from 0 to 1, not {self.trade_off!r}.")
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


def rerank(
    vectors: Sequence[npt.ArrayLike | None], diversify: Diversify, scores: Sequence[float] | None = None
) -> Reranked:
    """Reorder the candidates so that different pictures come first.

    Candidates without a vector belong to no cluster and keep their place. The others fill the places that are left.
    By `kmeans` clusters are ordered by their best hit and give one hit each in turn, best first. So the result is a
    permutation, and of the hits with pictures the first min(clusters, distinct vectors) come from different clusters.

    Args:
        vectors: image vectors (D,) of the candidates, best first, or None.
        diversify: candidates beyond what it says are reordered too: the caller cuts.
        scores: of the candidates, higher is better, which `mmr` weighs; None: they fall evenly with the place.
    """
    places = [place for place, vector in enumerate(vectors) if vector is not None]
    clusters: list[int | None] = [None] * len(vectors)
    order = list(range(len(vectors)))
    if places:
        points = np.stack([np.asarray(vectors[place], dtype=np.float32) for place in places])  # (n, D)
        if diversify.method == "mmr":
            scores = range(len(vectors), 0, -1) if scores is None else scores
            members = _mmr(points, np.array([scores[place] for place in places], np.float64), diversify.trade_off)
        else:
            labels = _by_first_seen(_cluster(points, diversify.clusters, diversify.seed))
            for place, label in zip(places, labels, strict=True):
                clusters[place] = label
            members = _round_robin(labels)
        for place, member in zip(places, members, strict=True):
            order[place] = places[member]
    return Reranked(order=tuple(order), clusters=tuple(clusters))


def is_distance(value: object) -> bool:
    """Whether it is a cosine distance: a number from 0 to 2."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 2


def distinct(vectors: Sequence[npt.ArrayLike | None], within: float) -> tuple[list[int], dict[int, list[int]]]:
    """Leave out candidates that look like a better one.

    Args:
        vectors: image vectors (D,) of the candidates, best first, or None: those are always kept.
        within: cosine distance up to which two images are the same.

    Returns:
        Places of the candidates that are kept, and by place those that were left out for it. Whether a candidate is
        kept depends on better ones alone, so pages of a longer list agree with those of a shorter one.
    """
    kept: list[int] = []
    left_out: dict[int, list[int]] = {}
    with_image: list[int] = []
    units: Vectors | None = None
    for place, vector in enumerate(vectors):
        if vector is not None:
            point = _units(np.asarray(vector, dtype=np.float32))
            if units is None:
                units = np.empty((len(vectors), len(point)), np.float32)
            near = np.flatnonzero(units[: len(with_image)] @ point >= 1.0 - within - _ROUNDING)
            if len(near):
                left_out.setdefault(with_image[near[0]], []).append(place)
                continue
            units[len(with_image)] = point
            with_image.append(place)
        kept.append(place)
    return kept, left_out


def _mmr(points: Vectors, scores: npt.NDArray[np.float64], trade_off: float) -> list[int]:
    """The members by maximal marginal relevance; of equal ones the better hit first.

    Both the scores and the images' similarities are stretched to 0..1 over the candidates: a text's similarities to
    images span a fraction of what those of images to each other do, so that unstretched ones would hardly count.
    """
    units = _units(points)
    relevance = _stretched(scores)
    similarity = _stretched(_products(units))
    nearest = np.zeros(len(points))
    order: list[int] = []
    for _ in points:
        marginal = trade_off * relevance - (1 - trade_off) * nearest
        marginal[order] = -np.inf
        order.append(int(np.argmax(marginal)))
        nearest = np.maximum(nearest, similarity[order[-1]])
    return order


def _products(points: Vectors) -> npt.NDArray[np.float64]:
    """Inner products (n, n), without BLAS: its threads wait for each other on busy cores, 30 ms in place of 0.2."""
    products: npt.NDArray[np.float64] = np.einsum("id,jd->ij", points, points).astype(np.float64)
    return products


def _units(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    units: Vectors = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return units


def _stretched(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    low, high = float(values.min()), float(values.max())
    stretched: npt.NDArray[np.float64] = (values - np.float64(low)) / ((high - low) or 1.0)
    return stretched


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

    wide = points.astype(np.float64)
    model = KMeans(n_clusters=clusters, init=wide[_starts(points, weights, clusters, seed)], n_init=1)
    labels: npt.NDArray[np.int64] = model.fit_predict(wide, sample_weight=weights).astype(np.int64)
    return labels


def _starts(points: Vectors, weights: npt.NDArray[np.int64], clusters: int, seed: int) -> npt.NDArray[np.int64]:
    """Which points k-means starts from: the best of many draws by k-means++ (Arthur and Vassilvitskii, SODA 2007)."""
    rng = np.random.default_rng(seed)
    products = _products(points)
    squares = np.diag(products)
    squared = np.maximum(squares[:, None] + squares - 2 * products, 0)  # (n, n) distances
    nearest = np.ones((_STARTS, len(points)))  # squared, to the points that a start has so far
    chosen = np.empty((_STARTS, clusters), np.int64)
    for turn in range(clusters):
        shares = np.cumsum(nearest * weights, axis=1)
        drawn = (shares <= rng.random((_STARTS, 1)) * shares[:, -1:]).sum(axis=1)
        chosen[:, turn] = np.minimum(drawn, len(points) - 1)
        nearest = np.minimum(nearest if turn else np.inf, squared[chosen[:, turn]])
    best: npt.NDArray[np.int64] = chosen[np.argmin((nearest * weights).sum(axis=1))]
    return best


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
    import sklearn
    import sklearn.cluster  # loads the OpenMP library that is limited
    from threadpoolctl import threadpool_limits

    threadpool_limits(limits=1, user_api="openmp")
    sklearn.set_config(assume_finite=True, skip_parameter_validation=True)  # of this thread; what comes here is checked
