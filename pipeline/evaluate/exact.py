"""Exact search for many queries at once: blocked matrix products, of which each query keeps its best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.evaluate.products import Block

_SCORES_AT_ONCE = 16_777_216  # float32: 64 MB
_MERGE_SHARE = 2  # candidates are merged once there are so many times as many as are kept


@dataclass(frozen=True)
class Ranking:
    """The best products of each query in one mode.

    Attributes:
        places: int32 (Q, k), best first, equal scores in order of place; -1 where there are fewer than k products.
        scores: float32 (Q, k), cosine similarities; -inf there.
        candidates: int64 (Q,), how many products were compared with each query.
        compared: int32 (n,), places of the products that were compared with queries at all, in any order.
    """

    places: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    candidates: npt.NDArray[np.int64]
    compared: npt.NDArray[np.int32]


def exact_search(
    blocks: Iterable[Block],
    queries: npt.NDArray[np.float32],
    *,
    modes: Sequence[str],
    k: int,
    left_out: npt.NDArray[np.int32] | None = None,
    kept: npt.NDArray[np.bool_] | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Ranking]:
    """Compare every query with every product, in one pass over the blocks for all modes.

    Memory is bounded by the size of a block and Q x k, whatever the number of products.

    Args:
        blocks: the products' vectors.
        queries: float32 (Q, D), of unit length.
        modes: which of the products' vectors are compared, each for itself.
        k: how many products a query keeps.
        left_out: int32 (Q,), place of a product that is no candidate of the query, -1 for none.
        kept: bool (N,), the places that are candidates at all; None: all.
        progress: told how many rows were compared so far.
    """
    units = np.ascontiguousarray(queries, np.float32)
    left_out = np.full(len(units), -1, np.int32) if left_out is None else left_out
    best = {mode: _Best(len(units), k) for mode in modes}
    rows = 0
    step = max(1, _SCORES_AT_ONCE // max(1, len(units)))
    for block in blocks:
        for mode in modes:
            present = block.present[mode]
            present = present if kept is None else present & kept[block.places]
            whole = bool(present.all())
            vectors = block.vectors[mode] if whole else block.vectors[mode][present]
            places = block.places if whole else block.places[present]
            for at in range(0, len(places), step):
                part = places[at : at + step]
                best[mode].offer(units @ vectors[at : at + step].T, part, left_out)
        rows += len(block.places)
        progress(rows)
    return {mode: found.ranking() for mode, found in best.items()}


class _Best:
    """The best k products of each query so far, and candidates that wait to be merged with them."""

    def __init__(self, queries: int, k: int) -> None:
        self._k = k
        self._places = np.full((queries, k), -1, np.int32)
        self._scores = np.full((queries, k), -np.inf, np.float32)
        self._candidates = np.zeros(queries, np.int64)
        self._compared: list[npt.NDArray[np.int32]] = []
        self._waiting: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]] = []

    def offer(
        self, scores: npt.NDArray[np.float32], places: npt.NDArray[np.int32], left_out: npt.NDArray[np.int32]
    ) -> None:
        """Take scores (Q, n) of the products at `places` (n,)."""
        self._candidates += len(places)
        self._compared.append(places)
        order = np.argsort(places, kind="stable")
        at = np.minimum(np.searchsorted(places, left_out, sorter=order), len(places) - 1)
        is_here = places[order[at]] == left_out
        scores[np.flatnonzero(is_here), order[at[is_here]]] = -np.inf
        self._candidates -= is_here
        least = self._scores[:, -1]
        if len(places) > self._k and np.isneginf(least).any():  # the first block: only its own best count
            least = np.maximum(least, np.partition(scores, len(places) - self._k, axis=1)[:, len(places) - self._k])
        queries, columns = np.nonzero(scores >= least[:, None])  # equal ones too: the merge orders them by place
        self._waiting.append((queries, places[columns], scores[queries, columns]))
        if sum(len(found) for found, _, _ in self._waiting) > _MERGE_SHARE * self._scores.size:
            self._merge()

    def ranking(self) -> Ranking:
        """What was found."""
        self._merge()
        self._places[np.isneginf(self._scores)] = -1
        compared = np.concatenate([np.empty(0, np.int32), *self._compared])
        return Ranking(self._places, self._scores, self._candidates, compared)

    def _merge(self) -> None:
        count = len(self._scores)
        own = np.repeat(np.arange(count), self._k)
        queries = np.concatenate([own, *(found for found, _, _ in self._waiting)])
        places = np.concatenate([self._places.ravel(), *(found for _, found, _ in self._waiting)])
        scores = np.concatenate([self._scores.ravel(), *(found for _, _, found in self._waiting)])
        self._waiting.clear()
        order = np.lexsort((places, -scores, queries))
        starts = np.searchsorted(queries[order], np.arange(count))
        chosen = order[starts[:, None] + np.arange(self._k)]  # each query has at least its own k
        self._places, self._scores = places[chosen], scores[chosen]
