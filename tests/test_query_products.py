"""Products by their keys, what columns hold, and the searcher that stays where it is."""

from __future__ import annotations

import numpy as np
import pytest
from query_tables import DIM, facts, make_db, random_db, release, unit

from pipeline.query import Searcher
from pipeline.query.nearest import image_vectors


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    return random_db(tmp_path_factory.mktemp("db"))


def test_products_by_key(db):
    searcher = Searcher.open(db)
    wanted = ["p00003", "p00001", "nope", "x' OR '1'='1", "p00003"]
    found = searcher.products(wanted, ["price", "text_vector"])
    assert set(found) == {"p00001", "p00003"}
    assert found["p00003"]["price"] == 3 * 1.5 - 20
    assert len(found["p00001"]["text_vector"]) == DIM
    assert searcher.products([], ["price"]) == {}


def test_facets_count_categories_and_find_ranges(db):
    facets = {facet.name: facet for facet in Searcher.open(db).facets()}
    plain = facts(60)
    assert facets["broad_category"].values == (("dress", 20), ("skirt", 20), ("top", 20))
    assert facets["fine_category"].distinct == 7
    assert facets["Shop name"].values[0] == ("shop 0", 6)
    for name in ("price", "stock", "listed", "changed", "cost"):
        present = [value for value in plain[name] if value is not None]
        assert (facets[name].low, facets[name].high) == (min(present), max(present))
    assert [facets[name].values for name in ("title", "description", "product_id")] == [(), (), ()]
    assert facets["on_sale"].kind == "bool"
    assert not {"tags", "partition", "avg_vector", "text_sha256"} & set(facets)


def test_a_column_of_many_texts_is_no_category(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.query.products._MOST_VALUES", 10)
    monkeypatch.setattr("pipeline.query.products.COMMONEST", 3)
    vectors = unit(np.random.default_rng(0).normal(size=(20, DIM)))
    columns = facts(20) | {"broad_category": [f"c{i}" for i in range(20)], "price": [float("nan")] * 20}
    db = make_db(tmp_path, text=vectors, image=vectors, columns=columns)
    release(db)
    facets = {facet.name: facet for facet in Searcher.open(db).facets()}
    assert (facets["broad_category"].values, facets["broad_category"].distinct) == ((), None)
    assert (len(facets["fine_category"].values), facets["fine_category"].distinct) == (3, 7)
    assert (facets["price"].low, facets["price"].high) == (None, None)


def test_look_alikes_of_a_page(db):
    searcher = Searcher.open(db)
    hits = searcher.search(np.ones(DIM), k=30)
    vectors = image_vectors(searcher._pinned, [hit.product_id for hit in hits])
    for within in (0.0, 0.6, 2.0):
        for place, better in hits.look_alikes(within).items():
            assert better < place
            assert 1 - float(np.dot(vectors[place], vectors[better])) <= within + 1e-5
    assert hits.look_alikes(0.0) == {}
    assert len(hits.look_alikes(2.0)) == sum(vector is not None for vector in vectors) - 1


def test_a_held_searcher_stays(tmp_path):
    db = random_db(tmp_path)
    searcher = Searcher.open(db)
    held = searcher.held()
    release(db, 2)
    assert searcher.refresh()
    assert not held.refresh()
    assert (searcher.release.release, held.release.release) == (2, 1)
    assert held.held().release.release == 1
    assert held.modes == ("text", "image", "avg")
    assert not held.knows("red dress")
