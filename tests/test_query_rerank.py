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
from pipeline.query.rerank import rerank

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
