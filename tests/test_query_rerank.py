from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from query_tables import unit

from pipeline.errors import QueryError
from pipeline.query import Diversify
from pipeline.query.rerank import distinct, rerank

ROWS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 30), st.just(4)), elements=st.sampled_from([0.0, 1.0, -0.5, 1.0001, 1e-9, 0.3])
)


@given(rows=ROWS, missing=st.sets(st.integers(0, 29)), clusters=st.integers(1, 8), seed=st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_any_candidates_are_spread(rows, missing, clusters, seed):
    vectors = [None if place in missing else row for place, row in enumerate(rows)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = rerank(vectors, Diversify(clusters=clusters, seed=seed))
    assert sorted(result.order) == list(range(len(vectors)))
    for place, vector in enumerate(vectors):
        assert (result.clusters[place] is None) == (vector is None)
        if vector is None:
            assert result.order[place] == place
    pictured = [place for place in result.order if vectors[place] is not None]
    distinct = len({vectors[place].tobytes() for place in pictured})
    first = [result.clusters[place] for place in pictured[: min(clusters, distinct)]]
    assert first == list(range(min(clusters, distinct)))
    assert rerank(vectors, Diversify(clusters=clusters, seed=seed)) == result


def test_clusters_of_pictures_alternate():
    rng = np.random.default_rng(1)
    centres = np.eye(8)[[0, 0, 0, 0, 1, 1, 2, 0, 1, 2]]
    result = rerank(list(unit(centres + 0.05 * rng.normal(size=centres.shape))), Diversify(clusters=3))
    assert result.clusters == (0, 0, 0, 0, 1, 1, 2, 0, 1, 2)
    assert result.order == (0, 4, 6, 1, 5, 9, 2, 8, 3, 7)


def test_nothing_and_no_pictures():
    assert rerank([], Diversify()).order == ()
    assert rerank([None, None], Diversify()).order == (0, 1)


@pytest.mark.parametrize("option", [{"clusters": 0}, {"candidates": -1}, {"clusters": 2.0}, {"seed": True}])
def test_odd_options_are_refused(option):
    with pytest.raises(QueryError, match="whole number"):
        Diversify(**option)


@given(rows=ROWS, missing=st.sets(st.integers(0, 29)), trade_off=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_marginal_relevance_is_a_permutation_that_begins_with_the_best(rows, missing, trade_off):
    vectors = [None if place in missing else row for place, row in enumerate(rows)]
    options = Diversify(method="mmr", trade_off=trade_off)
    result = rerank(vectors, options, [1.0 - place / 100 for place in range(len(vectors))])
    assert sorted(result.order) == list(range(len(vectors)))
    assert all(result.order[place] == place for place, vector in enumerate(vectors) if vector is None)
    pictured = [place for place in result.order if vectors[place] is not None]
    assert pictured[:1] == [place for place, vector in enumerate(vectors) if vector is not None][:1]
    assert set(result.clusters) <= {None}


def test_marginal_relevance_against_a_plain_loop():
    rng = np.random.default_rng(3)
    points, scores = unit(rng.normal(size=(20, 8)) + 1), np.sort(rng.random(20))[::-1]
    relevance = (scores - scores.min()) / np.ptp(scores)
    alike = (points @ points.T).astype(np.float64)
    alike = (alike - alike.min()) / np.ptp(alike)
    order = [0]
    while len(order) < 20:
        rest = [i for i in range(20) if i not in order]
        order.append(max(rest, key=lambda i: 0.7 * relevance[i] - 0.3 * max(alike[i][j] for j in order)))
    assert list(rerank(list(points), Diversify(method="mmr", trade_off=0.7), list(scores)).order) == order
    assert rerank(list(points), Diversify(method="mmr", trade_off=1.0), list(scores)).order == tuple(range(20))


@given(
    rows=ROWS, missing=st.sets(st.integers(0, 29)), within=st.sampled_from([0.0, 0.01, 0.3, 2.0]), cut=st.integers(0)
)
@settings(max_examples=100, deadline=None)
def test_duplicates_are_left_out_for_a_better_one(rows, missing, within, cut):
    rows = [row if row.any() else row + 1 for row in rows]
    vectors = [None if place in missing else row for place, row in enumerate(rows)]
    kept, left_out = distinct(vectors, within)
    everything = sorted([*kept, *(place for places in left_out.values() for place in places)])
    assert everything == list(range(len(vectors)))
    assert set(left_out) <= set(kept)
    for better, places in left_out.items():
        for place in places:
            assert better < place
            assert 1 - unit(vectors[better]) @ unit(vectors[place]) <= within + 1e-5
    shorter = distinct(vectors[:cut], within)[0]
    assert shorter == [place for place in kept if place < cut]


@pytest.mark.parametrize(
    ("option", "sentence"), [({"method": "random"}, "kmeans, mmr"), ({"trade_off": 1.5}, "from 0 to 1")]
)
def test_odd_methods_are_refused(option, sentence):
    with pytest.raises(QueryError, match=sentence):
        Diversify(**option)
