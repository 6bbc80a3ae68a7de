"""Measures of rankings, vectorised over queries, with what an oracle and a random order would reach.

Gains are float64 (Q, depth): of each query's hits, best first, 0 for one that is not relevant; a ranking shorter than
depth is padded with 0. Values equal those of trec_eval, as ir-measures gives them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def precision(gains: Floats, k: int) -> Floats:
    """float64 (Q,): relevant hits among the first k, over k, however few hits there are."""
    found: Floats = (gains[:, :k] > 0).sum(axis=1) / k
    return found


def recall(gains: Floats, totals: Counts, k: int) -> Floats:
    """float64 (Q,): relevant hits among the first k, over all `totals` (Q,) relevant products; 0 without any."""
    found: Floats = (gains[:, :k] > 0).sum(axis=1) / np.maximum(totals, 1)
    return found


def ndcg(gains: Floats, ideal: Floats, k: int) -> Floats:
    """float64 (Q,): discounted gain of the first k over that of the best ranking; 0 where nothing is relevant.

    The gain is linear and the discount 1 / log2(rank + 1), as in Jarvelin and Kekalainen, TOIS 2002, and trec_eval.

    Args:
        gains: (Q, depth).
        ideal: (Q, depth), gains of the best possible ranking.
        k: how many hits are looked at.
    """
    weights = _discounts(min(k, gains.shape[1]))
    best = ideal[:, :k] @ weights
    found: Floats = np.divide(gains[:, :k] @ weights, best, out=np.zeros(len(gains)), where=best > 0)
    return found


def reciprocal_rank(gains: Floats) -> Floats:
    """float64 (Q,): one over the rank of the first relevant hit; 0 where there is none."""
    relevant = gains > 0
    found: Floats = np.where(relevant.any(axis=1), 1.0 / (1 + relevant.argmax(axis=1)), 0.0)
    return found


def binary_ideal(totals: Counts, depth: int) -> Floats:
    """float64 (Q, depth): gains of the best ranking where each of `totals` (Q,) products counts 1."""
    ideal: Floats = (np.arange(depth) < totals[:, None]).astype(np.float64)
    return ideal


def ceiling(measure: str, totals: Counts, k: int) -> Floats:
    """float64 (Q,): what an oracle reaches, which ranks all `totals` (Q,) relevant products first."""
    reached = np.minimum(totals, k)
    if measure == "precision":
        return reached / k
    if measure == "recall":
        return reached / np.maximum(totals, 1)
    return (totals > 0).astype(np.float64)


def floor(
    measure: str,
    totals: Counts,
    candidates: Counts,
    k: int,
    *,
    ideal: Floats,
    mean_gain: Floats,
    found: Counts | None = None,
) -> Floats:
    """float64 (Q,): what a uniformly random order of the candidates is expected to reach.

    Each place holds a relevant product with probability R / N, which settles precision, recall and, by the linearity
    of expectation, nDCG. The first relevant hit is at rank i with probability R / (N - i + 1) times that of none
    before it, the product of 1 - R / (N - j + 1) for j < i.

    Args:
        measure: `precision`, `recall`, `ndcg` or `mrr`.
        totals: (Q,), the relevant products.
        candidates: (Q,), N, the products that are ranked.
        k: how many hits are looked at; for `mrr` too.
        ideal: (Q, depth), gains of the best possible ranking, for nDCG.
        mean_gain: (Q,), mean gain of a relevant product, for nDCG.
        found: (Q,), R, those of `totals` that are candidates; None: all. A product without an image is not found by it.
    """
    number = np.maximum(candidates, 1).astype(np.float64)
    found = np.minimum(totals if found is None else found, candidates)
    share = found / number
    seen = np.minimum(k, candidates)
    if measure == "precision":
        return share * seen / k
    if measure == "recall":
        return share * seen / np.maximum(totals, 1)
    ranks = np.arange(min(k, ideal.shape[1]))
    is_there = ranks < candidates[:, None]
    if measure == "ndcg":
        weights = _discounts(len(ranks))
        best = ideal[:, :k] @ weights
        expected = share * mean_gain * (is_there * weights).sum(axis=1)
        ratio: Floats = np.divide(expected, best, out=np.zeros(len(totals)), where=best > 0)
        return ratio
    hit = np.clip(found[:, None] / np.maximum(number[:, None] - ranks, 1), 0, 1) * is_there
    none_before = np.cumprod(np.hstack([np.ones((len(totals), 1)), 1 - hit[:, :-1]]), axis=1)
    expected_rank: Floats = (hit * none_before / (ranks + 1)).sum(axis=1)
    return expected_rank


def macro(values: Floats, groups: npt.NDArray[np.integer]) -> float:
    """The mean over groups of the means of their values (Q,); values of group -1 are left out."""
    inside = groups >= 0
    if not inside.any():
        return float("nan")
    _, places = np.unique(groups[inside], return_inverse=True)
    return float((np.bincount(places, values[inside]) / np.bincount(places)).mean())


def _discounts(k: int) -> Floats:
    weights: Floats = 1.0 / np.log2(np.arange(2, k + 2))
    return weights
