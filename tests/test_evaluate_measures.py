"""Measures against ir-measures, by hand and by exhaustion; what an interval, a test and a correction have to hold."""

from __future__ import annotations

import itertools
import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_measures import RR, P, R, nDCG
from scipy.stats import bootstrap as scipy_bootstrap

from pipeline.evaluate import measures
from pipeline.evaluate.statistics import bootstrap, holm, non_inferiority, paired, share

DEPTH = 30
KS = (1, 5, 10, 20)


def test_measures_equal_ir_measures_on_1000_random_rankings():
    rng = np.random.default_rng(0)
    qrels, run = {}, {}
    gains, ideal = np.zeros((1000, DEPTH)), np.zeros((1000, DEPTH))
    totals = np.zeros(1000, np.int64)
    for number in range(1000):
        grades = rng.integers(0, 4, 60) * (rng.random(60) < rng.choice([0.0, 0.05, 0.3, 0.9]))
        length = int(rng.choice([0, 3, DEPTH]))
        order = rng.permutation(60)[:length]
        qrels[f"q{number}"] = {f"d{i}": int(grade) for i, grade in enumerate(grades)}
        run[f"q{number}"] = {f"d{i}": float(DEPTH - rank) for rank, i in enumerate(order)}
        gains[number, :length] = grades[order]
        best = np.sort(grades)[::-1][:DEPTH]
        ideal[number, : len(best)] = best
        totals[number] = (grades > 0).sum()
    asked = [kind @ k for kind in (P, R, nDCG) for k in KS] + [RR]
    found = {(str(m.measure), m.query_id): m.value for m in ir_measures.iter_calc(asked, qrels, run)}
    ours = {
        **{f"P@{k}": measures.precision(gains, k) for k in KS},
        **{f"R@{k}": measures.recall(gains, totals, k) for k in KS},
        **{f"nDCG@{k}": measures.ndcg(gains, ideal, k) for k in KS},
        "RR": measures.reciprocal_rank(gains),
    }
    assert len(found) >= 13 * 600
    for name, values in ours.items():
        theirs = [found.get((name, f"q{number}"), 0.0) for number in range(1000)]  # no ranking, no value
        np.testing.assert_allclose(values, theirs, atol=1e-9, rtol=0, err_msg=name)


@pytest.mark.parametrize(("relevant", "candidates"), [(1, 5), (2, 5), (3, 6), (0, 4), (5, 5)])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_floor_is_the_mean_over_all_orders(relevant, candidates, k):
    depth = 8
    orders = np.array(list(itertools.permutations(range(candidates))))
    gains = np.zeros((len(orders), depth))
    gains[:, :candidates] = orders < relevant
    totals, numbers = np.array([relevant]), np.array([candidates])
    ideal = measures.binary_ideal(totals, depth)
    every = np.repeat(totals, len(orders))
    exact = {
        "precision": measures.precision(gains, k),
        "recall": measures.recall(gains, every, k),
        "ndcg": measures.ndcg(gains, np.repeat(ideal, len(orders), axis=0), k),
        "mrr": measures.reciprocal_rank(gains[:, :k]),
    }
    for name, values in exact.items():
        floor = measures.floor(name, totals, numbers, k, ideal=ideal, mean_gain=np.ones(1))
        assert floor[0] == pytest.approx(values.mean(), abs=1e-12), name
        best = measures.ceiling(name, totals, k)[0]
        assert values.max() == pytest.approx(best), name


def test_floor_of_graded_gains():
    grades = np.array([3, 1, 0, 0, 2])
    orders = np.array(list(itertools.permutations(grades.tolist())), float)
    ideal = np.array([[3.0, 2, 1, 0, 0]])
    values = measures.ndcg(orders, np.repeat(ideal, len(orders), axis=0), 3)
    floor = measures.floor("ndcg", np.array([3]), np.array([5]), 3, ideal=ideal, mean_gain=np.array([2.0]))
    assert floor[0] == pytest.approx(values.mean(), abs=1e-12)


@pytest.mark.parametrize("measure", ["precision", "recall", "ndcg", "mrr"])
def test_floor_is_the_mean_over_random_orders(measure):
    """Of a catalog far larger than the ranking is deep: the mean of 20,000 draws lies within four standard errors."""
    rng = np.random.default_rng(4)
    grades = np.zeros(300)
    grades[:7] = [3, 2, 1, 1, 1, 3, 2]
    draws, k = 20_000, 20
    order = rng.random((draws, 300)).argpartition(np.arange(DEPTH), axis=1)[:, :DEPTH]
    gains, totals = grades[order], np.array([7])
    ideal = np.zeros((1, DEPTH))
    ideal[0, :7] = np.sort(grades)[:-8:-1]
    values = {
        "precision": lambda: measures.precision(gains, k),
        "recall": lambda: measures.recall(gains, np.repeat(totals, draws), k),
        "ndcg": lambda: measures.ndcg(gains, np.repeat(ideal, draws, axis=0), k),
        "mrr": lambda: measures.reciprocal_rank(gains[:, :k]),
    }[measure]()
    floor = measures.floor(measure, totals, np.array([300]), k, ideal=ideal, mean_gain=np.array([13 / 7]))[0]
    assert abs(values.mean() - floor) < 4 * values.std() / np.sqrt(draws)


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_values_and_floors_stay_between_nothing_and_the_ceiling(seed, depth, relevant, others, k):
    hits = np.random.default_rng(seed).permutation(np.arange(relevant + others) < relevant)[:depth]
    gains = np.zeros((1, depth))
    gains[0, : len(hits)] = hits
    totals, candidates, ideal = (
        np.array([relevant]), np.array([relevant + others]), measures.binary_ideal(np.array([relevant]), depth)
    )  # fmt: skip
    for measure, value in {
        "precision": measures.precision(gains, k),
        "recall": measures.recall(gains, totals, k),
        "ndcg": measures.ndcg(gains, ideal, k),
        "mrr": measures.reciprocal_rank(gains[:, :k]),
    }.items():
        ceiling = measures.ceiling(measure, totals, k)[0]
        floor = measures.floor(measure, totals, candidates, k, ideal=ideal, mean_gain=np.ones(1))[0]
        assert 0 <= value[0] <= ceiling + 1e-12 <= 1 + 1e-12, measure
        assert 0 <= floor <= ceiling + 1e-12, measure


def test_relevant_products_without_a_vector_are_not_found_by_chance():
    totals, candidates, found = np.array([20]), np.array([50]), np.array([10])
    kept = {"ideal": measures.binary_ideal(totals, 100), "mean_gain": np.ones(1), "found": found}
    assert measures.floor("precision", totals, candidates, 10, **kept)[0] == pytest.approx(0.2)
    assert measures.floor("recall", totals, candidates, 10, **kept)[0] == pytest.approx(10 * 0.2 / 20)


def test_products_without_a_vector_lower_the_floor_of_recall():
    totals, candidates = np.array([4]), np.array([2])
    ideal = measures.binary_ideal(totals, 10)
    kept = {"ideal": ideal, "mean_gain": np.ones(1)}
    assert measures.floor("recall", totals, candidates, 10, **kept)[0] == pytest.approx(0.5)
    assert measures.floor("precision", totals, candidates, 10, **kept)[0] == pytest.approx(0.2)


def test_macro_counts_categories_alike():
    values, groups = np.array([1.0, 1.0, 1.0, 0.0, 9.0]), np.array([0, 0, 0, 2, -1])
    assert measures.macro(values, groups) == pytest.approx(0.5)
    assert math.isnan(measures.macro(values, np.full(5, -1)))


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(3).random((400, 2))
    ours = bootstrap(values, seed=0, resamples=4000)
    for column, interval in zip(values.T, ours, strict=True):
        theirs = scipy_bootstrap((column,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
        assert interval.mean == pytest.approx(column.mean())
        assert interval.low == pytest.approx(theirs.low, abs=0.003)
        assert interval.high == pytest.approx(theirs.high, abs=0.003)


def test_bootstrap_is_the_same_by_seed_and_narrow_where_nothing_varies():
    values = np.column_stack([np.random.default_rng(0).random(50), np.full(50, 0.7)])
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4) != bootstrap(values, seed=5)
    constant = bootstrap(values, seed=4)[1]
    assert constant.low == pytest.approx(0.7)
    assert constant.high == pytest.approx(0.7)
    assert bootstrap(np.array([[0.3]]), seed=0)[0].low == pytest.approx(0.3)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(8)
    hits = sum(
        interval.low <= 0.3 <= interval.high
        for run in range(20)
        for interval in bootstrap((rng.random((300, 20)) < 0.3).astype(float), seed=run, resamples=500)
    )
    assert 0.90 < hits / 400 < 0.99


def test_paired_test_tells_a_difference_from_none():
    rng = np.random.default_rng(1)
    first = rng.random(500)
    assert paired(first, first, seed=0)[1] == 1.0
    interval, p = paired(first + 0.05 + 0.1 * rng.normal(size=500), first, seed=0)
    assert p < 1e-6
    assert interval.low > 0
    assert paired(first + 0.1, first, seed=0)[1] < 1e-6
    assert paired(np.array([1.0]), np.array([0.0]), seed=0)[1] == 1.0  # one query tells nothing


def test_paired_test_without_variance_is_that_of_the_signs():
    second = np.array([0.2, 0.3, 0.4])
    signs = np.array(list(itertools.product([-1, 1], repeat=3)))
    as_far = np.abs((0.1 * signs).mean(axis=1)) >= 0.1 - 1e-12
    assert paired(second + 0.1, second, seed=0)[1] == pytest.approx(as_far.mean())
    assert paired(np.ones(2000), np.zeros(2000), seed=0)[1] == 0.0  # underflows


def test_rounding_is_no_difference():
    first, second = np.array([0.1 + 0.2, 0.5, 0.5]), np.array([0.3, 0.5, 0.5])
    assert first[0] != second[0]
    assert paired(first, second, seed=0)[1] == 1.0
    assert non_inferiority(first[:1], second[:1], margin=0.01).p == 0.0
    assert non_inferiority(second[:1], first[:1], margin=0.01).p == 0.0


def test_share_is_a_ratio_of_means():
    part, whole = np.array([0.5, 0.0, 1.0]), np.array([1.0, 0.5, 0.5])
    ratio = share(part, whole, seed=0)
    assert ratio.mean == pytest.approx(0.75)
    assert ratio.low <= 0.75 <= ratio.high
    assert share(np.zeros(3), np.zeros(3), seed=0).mean == 0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_and_keeps_the_order(values):
    adjusted = holm(values)
    assert all(a >= p for a, p in zip(adjusted, values, strict=True))
    assert max(adjusted) <= 1
    for (p, a), (q, b) in itertools.combinations(zip(values, adjusted, strict=True), 2):
        assert (p <= q) <= (a <= b)
    assert holm(values[::-1]) == pytest.approx(adjusted[::-1])


@pytest.mark.parametrize(
    "losses",
    [
        lambda rng: -0.01 + 0.1 * rng.normal(size=400),
        lambda rng: rng.choice([-0.1, 0.0, 0.1], size=400, p=[0.2, 0.7, 0.1]),  # as precision@10 changes, -0.01 too
    ],
    ids=["normal", "steps"],
)
def test_non_inferiority_rejects_as_often_as_it_says_at_the_margin(losses):
    rng = np.random.default_rng(2)
    base = np.zeros(400)
    passed = sum(non_inferiority(losses(rng), base, margin=0.01).p <= 0.05 for _ in range(200))
    assert passed <= 20  # of 200, 10 are expected


@pytest.mark.parametrize(("queries", "share"), [(100, 0.36), (300, 0.21), (1000, 0.08)])
def test_non_inferiority_misses_rare_and_large_losses_as_often_as_its_docstring_says(queries, share):
    """No query of few may be one that lost all: the test's limit, not its promise."""
    rng = np.random.default_rng(0)
    counts, times = np.unique(rng.binomial(queries, 0.01, size=20_000), return_counts=True)
    new = [np.where(np.arange(queries) < lost, 0.0, 1.0) for lost in counts]
    passed = [non_inferiority(values, np.ones(queries), margin=0.01).p <= 0.05 for values in new]
    assert times[passed].sum() / 20_000 == pytest.approx(share, abs=0.015)


def test_non_inferiority_has_power_where_nothing_is_lost():
    rng = np.random.default_rng(6)
    base = np.zeros(1000)
    passed = sum(non_inferiority(0.1 * rng.normal(size=1000), base, margin=0.01).p <= 0.05 for _ in range(100))
    assert passed >= 85


@pytest.mark.parametrize(
    ("new", "base", "p"),
    [
        ([0.5, 0.7], [0.5, 0.7], 0.0),
        ([0.495, 0.695], [0.5, 0.7], 0.0),
        ([0.4, 0.6], [0.5, 0.7], 1.0),
        ([0.9], [0.5], 1.0),
    ],
)
def test_non_inferiority_without_variance(new, base, p):
    assert non_inferiority(np.array(new), np.array(base), margin=0.01).p == p
