"""How sure a mean over queries is: bootstrap intervals, paired tests, corrections, and tests of not being worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.evaluate.results import Interval

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
CONFIDENCE = 0.95

_COUNTS_AT_ONCE = 10_000_000
_ROUNDING = 1e-12  # differences of counts over k are equal, or far further apart


def bootstrap(
    values: Floats, *, seed: int, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> list[Interval]:
    """Percentile bootstrap intervals of the means of many columns, over the same resampled queries.

    Percentiles, not BCa: means of hundreds of bounded values are hardly skewed, and a column in which every query has
    the same value, as precision at the ceiling has, gets that value as its interval and not NaN.

    Args:
        values: float64 (Q, M), Q at least 1.
        seed: the same one gives the same intervals.
        resamples: how many samples of Q queries are drawn.
        confidence: of the intervals.

    Returns:
        M intervals.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(_resampled(values, seed, resamples), [tail, 1 - tail], axis=0)
    return [Interval(*map(float, row)) for row in zip(values.mean(axis=0), low, high, strict=True)]


def share(part: Floats, whole: Floats, *, seed: int) -> Interval:
    """The ratio of two means over the same queries (Q,), with its percentile bootstrap interval; 0 where whole is."""
    means = _resampled(np.stack([part, whole], axis=1), seed, RESAMPLES)
    ratios = np.divide(means[:, 0], means[:, 1], out=np.zeros(len(means)), where=means[:, 1] > 0)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(part.mean() / whole.mean()) if whole.any() else 0.0, float(low), float(high))


def _resampled(values: Floats, seed: int, resamples: int) -> Floats:
    """float64 (resamples, M): means of the columns over queries drawn with replacement."""
    rng = np.random.default_rng(seed)
    queries = len(values)
    means = np.empty((resamples, values.shape[1]))
    step = max(1, _COUNTS_AT_ONCE // queries)
    for at in range(0, resamples, step):
        rows = min(step, resamples - at)
        drawn = rng.integers(0, queries, size=(rows, queries)) + queries * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * queries).reshape(rows, queries)
        means[at : at + rows] = counts @ values / queries
    return means


def paired(first: Floats, second: Floats, *, seed: int) -> tuple[Interval, float]:
    """The mean difference of two systems on the same queries, and whether it may be chance.

    The test is Student's paired t-test, which agrees with the randomisation test on retrieval measures (Smucker, Allan
    and Carterette, CIKM 2007) and needs no draws.

    Args:
        first: float64 (Q,).
        second: float64 (Q,), of the same queries.
        seed: of the bootstrap interval.

    Returns:
        The interval of first less second, and the two-sided p-value; 1 where no query differs. Where all differ by the
        same amount there is no variance to test with: then it is the randomisation test's, 2 of 2^Q signs.
    """
    from scipy.stats import ttest_1samp

    differences = _differences(first, second)
    interval = bootstrap(differences[:, None], seed=seed)[0]
    if np.ptp(differences) <= _ROUNDING:
        return interval, 2.0 ** (1 - len(differences)) if differences.any() else 1.0
    return interval, float(ttest_1samp(differences, 0.0).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values by Holm's step-down method (Scandinavian Journal of Statistics, 1979), in the given order."""
    order = np.argsort(p, kind="stable")
    stepped = np.asarray(p, np.float64)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0) if len(p) else []
    return [float(value) for value in adjusted]


@dataclass(frozen=True, slots=True)
class NonInferiority:
    """Whether something new may be taken for not worse.

    Attributes:
        difference: new less base, the mean over queries.
        p: one-sided, of the hypothesis that new is worse by the margin or more: small means not worse.
    """

    difference: Interval
    p: float


def non_inferiority(new: Floats, base: Floats, *, margin: float, seed: int = 0) -> NonInferiority:
    """Test that new is not worse than base by as much as the margin: a paired t-test, shifted by it.

    Without variance p is 0 or 1: 0 where no query differs, or where several all differ by the same amount and by less
    than the margin; one query that differs shows nothing. The test keeps its 5% where many queries lose a little. It
    does not where a few lose all, which a sample may miss: if one query in a hundred falls from 1 to 0, and so the
    mean by a margin of 0.01, it passes 8% of the time with 1,000 queries, 21% with 300 and 36% with 100.

    Args:
        new: float64 (Q,).
        base: float64 (Q,), of the same queries.
        margin: the largest loss of the mean that does not matter, in the measure's unit.
        seed: of the bootstrap interval.
    """
    from scipy.stats import ttest_1samp

    differences = _differences(new, base)
    interval = bootstrap(differences[:, None], seed=seed)[0]
    if np.ptp(differences) <= _ROUNDING:
        is_shown = differences[0] == 0 or (len(differences) > 1 and differences[0] > -margin)
        return NonInferiority(interval, 0.0 if is_shown else 1.0)
    return NonInferiority(interval, float(ttest_1samp(differences, -margin, alternative="greater").pvalue))


def _differences(first: Floats, second: Floats) -> Floats:
    """float64 (Q,): first less second, 0 where they differ by rounding alone."""
    differences: Floats = np.where(np.abs(first - second) <= _ROUNDING, 0.0, first - second)
    return differences
