from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lance
import lancedb
import numpy as np
import pytest
import torch
from lancedb.query import MultiMatchQuery
from model_folder import write_folder
from PIL import Image
from query_tables import DIM, facts, jpeg, make_db, random_db, release, unit
from scipy.stats import kendalltau

from pipeline.errors import MissingExtra, ModelError, QueryError
from pipeline.model import load_model
from pipeline.query import Diversify, Mixture, Searcher
from pipeline.query.encoder import Encoder
from pipeline.query.recent import Recent
from pipeline.store.indices import build_indices

MODES = ("text", "image", "avg")


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    return random_db(tmp_path_factory.mktemp("db"))


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """3,000 products in overlapping clusters, a quarter of them copies, with indices."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(40, DIM))[rng.integers(0, 40, 3000)]
    text, image = (unit(centres + 0.7 * rng.normal(size=centres.shape)) for _ in range(2))
    text[2250:], image[2250:] = text[:750], image[:750]
    path = make_db(tmp_path_factory.mktemp("indexed"), text=text, image=image)
    release(path, index=build_indices(path, min_rows=1000))
    return path


@pytest.fixture(scope="module")
def modelled(tmp_path_factory):
    """A database of a tiny model's own vectors, and the model."""
    folder = tmp_path_factory.mktemp("modelled")
    model = load_model(str(write_folder(folder / "model")))
    texts, colours = ["red dress", "blue coat", "wool shirt"], [(200, 0, 0), (0, 0, 200), (90, 90, 90)]
    columns = {name: values[:3] for name, values in facts(3).items()}
    image = model.embed_images([jpeg(colour) for colour in colours])
    path = make_db(folder / "db", text=model.embed_texts(texts), image=image, columns=columns)
    release(path, model=str(folder / "model"), model_id=model.model_id)
    return path, model, folder / "model"


@pytest.mark.parametrize("scale", [1e308, 1e-300, 1])
def test_only_the_proportions_of_a_mixtures_weights_count(db, scale):
    one, other = unit(np.random.default_rng(3).normal(size=(2, DIM)))
    searcher = Searcher.open(db)
    mixed = (
        Mixture([(one, np.float32(0.75)), (other, 0.25)])
        if scale == 1
        else Mixture([(one, 0.75 * scale), (other, 0.25 * scale)])
    )
    expected = searcher.search(unit(0.75 * one + 0.25 * other), k=np.int64(5))
    assert [hit.product_id for hit in searcher.search(mixed, k=5)] == [hit.product_id for hit in expected]


@pytest.mark.parametrize("parts", [None, 5, "red", [("red", 10**400)], [("red", float("nan"))], [("red", True)]])
def test_a_mixture_that_is_none_is_refused(parts):
    with pytest.raises(QueryError, match="A Mixture"):
        Mixture(parts)


def test_a_release_whose_files_went_away_is_a_sentence(tmp_path):
    searcher = Searcher.open(random_db(tmp_path / "db"))
    for table in ("products", "images"):
        for file in (tmp_path / "db" / f"{table}.lance" / "data").iterdir():
            file.unlink()
    asked = [lambda: searcher.search(unit(np.ones(DIM))), lambda: searcher.thumbnails(["p00001"]),
             lambda: searcher.products(["p00001"], ["title"]), searcher.facets]  # fmt: skip
    for ask in asked:
        with pytest.raises(QueryError, match="Release 1 cannot be read any more"):
            ask()
    with pytest.raises(QueryError, match="No column 'nope'"):
        searcher.products(["p00001"], ["nope"])


def test_deep_pages_read_as_many_partitions_as_they_need(indexed):
    searcher = Searcher.open(indexed)
    searcher.release.index["text"]["probes"] = 1  # of several: what a large index reads is a small share of it
    assert searcher.release.index["text"]["partitions"] > 1
    query = unit(np.random.default_rng(4).normal(size=DIM))
    assert len(searcher.search(query, mode="text", k=3000)) == 3000
    assert len(searcher.search(query, mode="text", k=100, offset=2900)) == 100


def test_a_catalog_without_any_image_is_searched_and_reordered(tmp_path):
    text = unit(np.random.default_rng(1).normal(size=(30, DIM)))
    columns = {name: values[:30] for name, values in facts(30).items()}
    release(path := make_db(tmp_path, text=text, image=text, has_image=np.zeros(30, bool), columns=columns))
    searcher = Searcher.open(path)
    for options in ({"diversify": Diversify()}, {"collapse_duplicates": 0.02}, {}):
        hits = searcher.search(text[3], mode="text", k=5, **options)
        assert hits[0].product_id == "p00003"
        assert hits.diversity is None
        assert hits.look_alikes() == {}
    assert searcher.search(text[3], mode="image") == []


def test_hybrid_wants_words_when_it_is_explained_too(db):
    with pytest.raises(QueryError, match="needs words"):
        Searcher.open(db).explain(unit(np.ones(DIM)), mode="hybrid")


def vectors_of(db, name):
    rows = lancedb.connect(db).open_table("products").to_arrow().select(["product_id", name]).to_pylist()
    return {row["product_id"]: np.array(row[name], np.float64) for row in rows if row[name] is not None}


def by_numpy(db, mode, query):
    scores = {key: float(row @ query / np.linalg.norm(query)) for key, row in vectors_of(db, f"{mode}_vector").items()}
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def ids(hits):
    return [hit.product_id for hit in hits]


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_ranks_by_cosine(db, mode):
    query = np.random.default_rng(9).normal(size=DIM) * 7
    hits = Searcher.open(db).search(query, mode=mode, k=60)
    truth = by_numpy(db, mode, query)
    assert ids(hits) == [product_id for product_id, _ in truth]
    assert [hit.score for hit in hits] == pytest.approx([score for _, score in truth], abs=1e-5)
    assert [hit.rank for hit in hits] == list(range(1, len(truth) + 1))
    assert all(hit.cluster is None for hit in hits)


def test_hits_carry_the_asked_columns(db):
    searcher = Searcher.open(db)
    first = searcher.search(np.ones(DIM))[0]
    assert {"title", "broad_category", "price", "Shop name", "n_images"} <= set(first.fields)
    assert not {"product_id", "text_vector", "avg_vector", "text_sha256", "partition"} & set(first.fields)
    asked = searcher.search(np.ones(DIM), columns=["price", "product_id", "price", "avg_vector"])[0]
    assert list(asked.fields) == ["price", "product_id", "avg_vector"]
    assert asked.fields["product_id"] == first.product_id
    assert searcher.search(np.ones(DIM), columns=[])[0].fields == {}


@pytest.mark.parametrize("query", [[1] * DIM, np.ones(DIM, np.int8), np.full(DIM, 1e300), np.full(DIM, 1e-310)])
def test_vectors_of_any_length_and_type_are_normalised(db, query):
    assert ids(Searcher.open(db).search(query)) == ids(Searcher.open(db).search(np.ones(DIM)))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_pages_join_to_one_list_also_among_equal_products(indexed, mode, exact):
    searcher = Searcher.open(indexed)
    query = np.random.default_rng(2).normal(size=DIM)
    whole = searcher.search(query, mode=mode, k=60, exact=exact)
    pages = [searcher.search(query, mode=mode, k=7, offset=at, exact=exact) for at in range(0, 60, 7)]
    assert [hit for page in pages for hit in page][:60] == whole
    scores = [(-hit.score, hit.product_id) for hit in whole]
    assert scores == sorted(scores)


def test_a_tie_wider_than_the_page_is_ordered_by_key(tmp_path):
    same = np.tile(unit(np.ones((1, DIM))), (40, 1))
    shuffled = facts(40)
    shuffled["product_id"] = [f"p{i * 7 % 40:05d}" for i in range(40)]
    db = make_db(tmp_path, text=same, image=same, columns=shuffled)
    release(db)
    searcher = Searcher.open(db)
    assert ids(searcher.search(np.ones(DIM), k=3, offset=3)) == ["p00003", "p00004", "p00005"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("passing", [3, 20, 500])
def test_a_rare_filter_gives_every_product_that_belongs(indexed, mode, passing):
    searcher = Searcher.open(indexed)
    assert searcher.release.index[mode]["kind"] == "ivf_sq"
    where = {"product_id": {"in": [f"p{i * 6:05d}" for i in range(passing)]}}
    for query in np.random.default_rng(passing).normal(size=(5, DIM)):
        hits = searcher.search(query, mode=mode, where=where)
        assert len(hits) == min(10, passing)
        assert ids(hits) == ids(searcher.search(query, mode=mode, where=where, exact=True))


def test_a_common_filter_fills_k(indexed):
    hits = Searcher.open(indexed).search(np.ones(DIM), k=50, where={"broad_category": "dress", "stock": {"ge": 0}})
    assert len(hits) == 50
    assert all(hit.fields["broad_category"] == "dress" and hit.fields["stock"] >= 0 for hit in hits)
    assert Searcher.open(indexed).search(np.ones(DIM), where={"title": "none such"}, diversify=Diversify()) == []


def test_a_filter_on_a_list_is_one_like_others(indexed, worded):
    searcher = Searcher.open(indexed)
    where = {"tags": {"contains": "it's 100% silk_"}, "stock": {"between": [20, 200]}, "listed": {"ge": "2026-01-09"}}
    rare = searcher.search(np.ones(DIM), k=100, where=where)
    assert len(rare) == sum(1 for i in range(30, 211) if i % 3 and i % 5 == 2 and i % 4 and i % 9)
    assert ids(rare) == ids(searcher.search(np.ones(DIM), k=100, where=where, exact=True))
    common = searcher.search(np.ones(DIM), k=50, where={"not": {"tags": {"contains": "a"}}}, columns=["tags"])
    assert len(common) == 50
    assert all("a" not in hit.fields["tags"] for hit in common)
    assert searcher.explain(np.ones(DIM), where=where).passing == len(rare)
    by_words = Searcher.open(worded).search("red coat", mode="hybrid", k=50, where={"tags": {"contains": "silk"}})
    assert by_words
    assert all("silk" in hit.fields["tags"] for hit in by_words)


def test_the_index_finds_what_exact_search_finds(indexed):
    searcher = Searcher.open(indexed)
    for mode in MODES:
        share = [
            len(set(ids(searcher.search(query, mode=mode))) & set(ids(searcher.search(query, mode=mode, exact=True))))
            for query in np.random.default_rng(7).normal(size=(30, DIM))
        ]
        assert np.mean(share) >= 9.5


def test_diversified_hits_are_a_permutation_with_clusters(db):
    searcher, query = Searcher.open(db), np.ones(DIM)
    plain = searcher.search(query, mode="text", k=30, columns=["n_images"])
    spread = searcher.search(query, mode="text", k=30, columns=["n_images"], diversify=Diversify(30, 4))
    assert sorted(ids(spread)) == sorted(ids(plain))
    assert [hit.rank for hit in spread] == list(range(1, 31))
    assert list(spread[0].fields) == ["n_images"]
    assert {hit.product_id: hit.score for hit in spread} == {hit.product_id: hit.score for hit in plain}
    pictured = [hit for hit in spread if hit.fields["n_images"]]
    assert [hit.cluster for hit in pictured[:4]] == [0, 1, 2, 3]
    for place, hit in enumerate(plain):
        if not hit.fields["n_images"]:
            assert spread[place].product_id == hit.product_id
            assert spread[place].cluster is None
    page = searcher.search(query, mode="text", k=5, offset=5, columns=["n_images"], diversify=Diversify(30, 4))
    assert page == spread[5:10]


def test_threads_and_batches_give_what_one_call_gives(indexed):
    searcher = Searcher.open(indexed)
    queries = list(np.random.default_rng(3).normal(size=(80, DIM)))
    one = [searcher.search(query, diversify=Diversify(20, 3)) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda query: searcher.search(query, diversify=Diversify(20, 3)), queries)) == one
    assert searcher.search_many(queries, diversify=Diversify(20, 3)) == one
    assert searcher.search_many([]) == []


def test_a_searcher_stays_on_its_release_until_refreshed(tmp_path):
    db = random_db(tmp_path)
    follower, pinned = Searcher.open(db), Searcher.open(db, release=1)
    assert follower.refresh() is False
    before = follower.search(np.ones(DIM), k=60)
    lance.dataset(f"{db}/products.lance").delete("product_id < 'p00030'")
    assert follower.search(np.ones(DIM), k=60) == before
    release(db, 2)
    assert (follower.refresh(), pinned.refresh()) == (True, False)
    assert (follower.release.release, pinned.release.release) == (2, 1)
    assert min(ids(follower.search(np.ones(DIM), k=60))) >= "p00030"
    assert pinned.search(np.ones(DIM), k=60) == before
    assert pinned.thumbnails(["p00001"]).keys() <= {"p00001"}


def test_thumbnails_are_the_first_images(db):
    searcher = Searcher.open(db)
    products = lancedb.connect(db).open_table("products").to_arrow()
    pictured = {
        product_id
        for product_id, count in zip(*(products[name].to_pylist() for name in ("product_id", "n_images")), strict=True)
        if count
    }
    thumbnails = searcher.thumbnails([*products["product_id"].to_pylist(), "p' OR 1=1", "p00001"])
    assert thumbnails.keys() == pictured
    number = int(min(pictured)[1:])
    assert thumbnails[min(pictured)] == jpeg((number * 7 % 256, 20, 90))


@pytest.mark.parametrize(
    ("query", "options", "sentence"),
    [
        (np.zeros(DIM), {}, "all zeros"),
        (np.array([np.nan] * DIM), {}, "not finite"),
        (np.array([np.inf] * DIM), {}, "not finite"),
        (np.ones(DIM + 1), {}, r"shape \(17,\).*needs \(16,\)"),
        (np.ones((1, DIM)), {}, r"shape \(1, 16\)"),
        ([], {}, "A query is|shape"),
        (["red"], {}, "A query is"),
        ([[1], [1, 2]], {}, "regular shape"),
        (None, {}, "A query is"),
        (3.5, {}, r"shape \(\)"),
        ({"text": "red"}, {}, "A query is"),
        ("", {}, "text is empty"),
        (" \n", {}, "text is empty"),
        ("\ud800", {}, "half of a surrogate pair"),
        (Path("a\0b"), {}, "cannot be read: embedded null byte"),
        (torch.ones(DIM, requires_grad=True), {}, "cannot be read as an array"),
        (np.ones(DIM), {"k": 10**5000}, "k is a whole number|offset \\+ k is a int"),
        (np.ones(DIM), {"offset": -(10**5000)}, "not a int"),
        (np.ones(DIM), {"mode": "\x1b[31m" * 100}, r"No mode '\\x1b\[31m"),
        (np.ones(DIM), {"collapse_duplicates": float("nan")}, "cosine distance"),
        ("x" * 20_001, {}, "20001 characters"),
        (b"", {}, "image is empty"),
        (bytes(50_000_001), {}, "50000001 bytes"),
        (np.ones(DIM), {"k": 0}, "k is a whole number from 1"),
        (np.ones(DIM), {"k": -1}, "k is a whole number"),
        (np.ones(DIM), {"k": 2.0}, "k is a whole number"),
        (np.ones(DIM), {"k": True}, "k is a whole number"),
        (np.ones(DIM), {"k": 10**9}, "reach to 10000"),
        (np.ones(DIM), {"offset": -1}, "offset is a whole number from 0"),
        (np.ones(DIM), {"mode": "average"}, "No mode 'average'; there are text, image, avg"),
        (np.ones(DIM), {"columns": ["colour"]}, "No column 'colour'; there are product_id"),
        (np.ones(DIM), {"columns": "title"}, "list of column names"),
        (np.ones(DIM), {"columns": [["title"]]}, "No column"),
        (np.ones(DIM), {"where": {"colour": "red"}}, "No column 'colour'"),
        (np.ones(DIM), {"diversify": 5}, "takes a Diversify"),
    ],
)
def test_what_has_no_answer_is_refused_in_a_sentence(db, query, options, sentence):
    with pytest.raises(QueryError, match=sentence) as error:
        Searcher.open(db).search(query, **options)
    assert "\n" not in str(error.value)


def test_many_queries_are_a_list(db):
    with pytest.raises(QueryError, match="list of queries"):
        Searcher.open(db).search_many("red")


def test_what_cannot_be_opened_is_refused(tmp_path, db):
    with pytest.raises(QueryError, match="Nothing is released"):
        Searcher.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    for number in (9, 0, -1, 10**30):
        with pytest.raises(QueryError, match=f"no release {number};"):
            Searcher.open(db, release=number)
    for number in ("1", 1.0, True):
        with pytest.raises(QueryError, match="A release is a whole number"):
            Searcher.open(db, release=number)
    assert Searcher.open(db).thumbnails(["\ud800", 3, "p'"]) == {}


def test_missing_images_of_the_query_are_named(db, tmp_path):
    with pytest.raises(QueryError, match="cannot be read"):
        Searcher.open(db).search(tmp_path / "none.jpg")


def test_texts_and_images_find_their_products(modelled, tmp_path):
    db, _, _ = modelled
    searcher = Searcher.open(db)
    assert searcher.search("blue coat", mode="text")[0].product_id == "p00001"
    assert searcher.search("blue coat", mode="text")[0].score == pytest.approx(1, abs=1e-5)
    (tmp_path / "red.jpg").write_bytes(jpeg((200, 0, 0)))
    for query in (jpeg((200, 0, 0)), tmp_path / "red.jpg", Image.open(tmp_path / "red.jpg")):
        hit = searcher.search(query, mode="image")[0]
        assert (hit.product_id, hit.score) == ("p00000", pytest.approx(1, abs=1e-5))
    lists = searcher.search_many(["wool shirt", jpeg((0, 0, 200)), "red dress"], mode="text", k=1)
    assert [hits[0].product_id for hits in lists][::2] == ["p00002", "p00000"]
    with pytest.raises(QueryError, match="query image cannot be used"):
        searcher.search(b"no image at all", mode="image")


def test_the_model_is_loaded_as_the_release_says(tmp_path):
    folder = write_folder(tmp_path / "model")
    model = load_model(str(folder), preprocessing="published", max_tokens=4)
    vectors = model.embed_texts(["red dress", "blue coat of wool"])
    columns = {name: values[:2] for name, values in facts(2).items()}
    path = make_db(tmp_path / "db", text=vectors, image=vectors, columns=columns)
    settings = {"preprocessing": "published", "max_tokens": 4, "jpeg_draft": False, "revision": None}
    release(path, model="another place", model_id=model.model_id, settings=settings)
    hit = Searcher.open(path, model=folder).search("blue coat of wool", mode="text")[0]
    assert (hit.product_id, hit.score) == ("p00001", pytest.approx(1, abs=1e-5))


def test_a_text_is_embedded_once_and_without_the_image_tower(modelled):
    db, model, _ = modelled
    encoder = Searcher.open(db)._pinned.encoder
    first = encoder.encode(["red dress", "red dress"])[0]
    tower = encoder._towers.pop("text")
    with pytest.raises(ModelError, match="without its image tower"):
        _ = tower.image_tower
    assert encoder.encode(["red dress"])[0] is first
    np.testing.assert_allclose(first, model.embed_texts(["red dress"])[0], atol=1e-6)


def test_an_image_is_embedded_once(modelled):
    db, model, _ = modelled
    encoder, photo = Searcher.open(db)._pinned.encoder, jpeg((0, 0, 200))
    first = encoder.encode([photo])[0]
    del encoder._towers["image"]
    assert encoder.encode([photo])[0] is first
    assert "image" not in encoder._towers
    np.testing.assert_allclose(first, model.embed_images([photo])[0], atol=1e-6)


def test_only_what_was_asked_lately_is_remembered():
    recent = Recent(2)
    recent.put("a", 0)
    recent.put("b", 1)
    assert recent.get("a") == 0
    recent.put("c", 2)
    assert ("a" in recent, "b" in recent, "c" in recent, recent.get("b")) == (True, False, True, None)


def test_another_model_is_refused_by_name(modelled, db, tmp_path):
    released, _, folder = modelled
    with pytest.raises(QueryError, match=r"model is not the model of this release.*a model"):
        Searcher.open(db, model=folder).search("red dress")
    assert Searcher.open(released, model=folder).search("red dress")
    with pytest.raises(ModelError):
        Searcher.open(released, model=tmp_path / "none").search("red dress")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pipeline.model", None)
    with pytest.raises(MissingExtra, match=r"twotower\[search\]"):
        Encoder("demo", "id", 4).encode(["red"])


def test_a_table_without_products_has_no_hits(tmp_path):
    empty = np.ones((0, DIM), np.float32)
    db = make_db(tmp_path, text=empty, image=empty, columns={name: [] for name in facts(0)})
    release(db, index=build_indices(db))
    searcher = Searcher.open(db)
    for mode in MODES:
        hits = searcher.search(np.ones(DIM), mode=mode, diversify=Diversify(), collapse_duplicates=0.1)
        assert (hits, hits.diversity, hits.look_alikes()) == ([], None, {})
    assert searcher.search(np.ones(DIM), where={"tags": {"contains": "a"}, "stock": {"ge": 0}}, exact=True) == []
    assert "every vector" in str(searcher.explain(np.ones(DIM)))
    assert searcher.thumbnails(["p"]) == {}


def test_importing_the_room_loads_nothing_heavy():
    heavy = ["torch", "ray", "transformers", "sklearn", "PIL", "lancedb", "lance"]
    code = f"import sys, pipeline.query; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_vector_query_loads_no_model_and_no_sklearn(db):
    code = (
        "import sys; from pipeline.query import Searcher\n"
        f"assert Searcher.open({db!r}).search([1.0] * {DIM})\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'sklearn', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_hits_tell_how_much_they_differ(db):
    searcher, query = Searcher.open(db), np.random.default_rng(2).normal(size=DIM)
    for method in ("kmeans", "mmr"):
        spread = searcher.search(query, mode="text", k=20, columns=[], diversify=Diversify(40, 4, method=method))
        plain = searcher.search(query, mode="text", k=40, columns=[])
        images = vectors_of(db, "image_vector")
        pictured = [images[product_id] for product_id in ids(spread) if product_id in images]
        pairs = [1 - a @ b for i, a in enumerate(pictured) for b in pictured[:i]]
        assert spread.diversity == pytest.approx(np.mean(pairs), abs=1e-5)
        places = [ids(plain).index(product_id) for product_id in ids(spread)]
        assert spread.rank_correlation == pytest.approx(kendalltau(range(20), places).statistic)
        assert [hit.rank for hit in spread] == list(range(1, 21))
    assert plain.rank_correlation is None
    pictured = np.stack([images[product_id] for product_id in ids(plain) if product_id in images])
    distances = (1 - pictured @ pictured.T)[np.triu_indices(len(pictured), 1)]
    assert plain.diversity == pytest.approx(distances.mean(), abs=1e-5)
    assert searcher.search(query, k=1).diversity is None


@pytest.mark.parametrize("diversify", [None, Diversify(30, 3)])
def test_what_looks_the_same_is_shown_once(indexed, diversify):
    """A quarter of the products are copies of others, picture and all."""
    searcher, query = Searcher.open(indexed), np.random.default_rng(4).normal(size=DIM)
    options = {"mode": "image", "columns": [], "collapse_duplicates": 1e-4, "diversify": diversify, "exact": True}
    hits = searcher.search(query, k=40, **options)
    images = vectors_of(indexed, "image_vector")
    shown = np.stack([images[product_id] for product_id in ids(hits)])
    assert len(hits) == 40
    assert (shown @ shown.T - 2 * np.eye(40)).max() < 1 - 1e-4
    everything = ids(searcher.search(query, mode="image", k=80, columns=[], exact=True))
    left_out = [duplicate for hit in hits for duplicate in hit.duplicates]
    assert left_out
    assert len(set(left_out)) == len(left_out)
    assert not set(left_out) & set(ids(hits))
    for hit in hits:
        assert all(images[hit.product_id] @ images[other] >= 1 - 2e-4 for other in hit.duplicates)
    if diversify is None:
        assert set(everything[:40]) <= {*ids(hits), *left_out}
        pages = [searcher.search(query, k=10, offset=offset, **options) for offset in (0, 10, 20, 30)]
        assert [product_id for page in pages for product_id in ids(page)] == ids(hits)


def test_hits_tell_which_look_like_a_better_one(indexed):
    searcher, query = Searcher.open(indexed), np.random.default_rng(4).normal(size=DIM)
    images = vectors_of(indexed, "image_vector")
    for options in ({}, {"diversify": Diversify(60, 3)}):
        hits = searcher.search(query, k=40, mode="image", columns=[], exact=True, **options)
        expected = {}
        for i, hit in enumerate(hits):
            near = [j for j in range(i) if images[hits[j].product_id] @ images[hit.product_id] >= 1 - 1e-4]
            expected |= {i: near[0]} if near else {}
        assert hits.look_alikes(1e-4) == expected != {}
        assert len(hits.look_alikes(2)) == 39
    assert searcher.search(query, k=1).look_alikes() == {}
    for within in (-1, 3, float("nan"), True, "0.1"):
        with pytest.raises(QueryError, match="cosine distance from 0 to 2"):
            hits.look_alikes(within)


def test_few_products_that_all_look_the_same(tmp_path):
    same = unit(np.ones((30, DIM)))
    db = make_db(tmp_path, text=unit(np.random.default_rng(1).normal(size=(30, DIM))), image=same)
    release(db)
    hits = Searcher.open(db).search(np.ones(DIM), mode="image", k=5, columns=[], collapse_duplicates=0.01)
    assert len(hits) == 1
    assert len(hits[0].duplicates) == 29


def test_a_mixture_is_the_weighted_sum(db, modelled):
    rng, searcher = np.random.default_rng(8), Searcher.open(db)
    first, second = rng.normal(size=(2, DIM)) * 5
    mixed = 0.8 * unit(first) - 0.3 * unit(second)
    options = {"mode": "text", "k": 10, "columns": []}
    mixture = searcher.search(Mixture([(first, 0.8), (second, -0.3)]), **options)
    assert ids(mixture) == ids(searcher.search(mixed, **options))
    path, model, folder = modelled
    photo = jpeg((200, 0, 0))
    searcher = Searcher.open(path, model=folder)
    found = searcher.search_many([Mixture([(photo, 1.0), ("blue coat", 0.5)]), "blue coat"], mode="avg", k=3)
    expected = unit(model.embed_images([photo])[0] + 0.5 * model.embed_texts(["blue coat"])[0])
    assert [hit.score for hit in found[0]] == pytest.approx(
        [hit.score for hit in searcher.search(expected, mode="avg", k=3)], abs=1e-5
    )
    assert ids(found[1]) == ids(searcher.search("blue coat", mode="avg", k=3))


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([], "1 to 64 queries"),
        ([("red", 0)], "finite numbers other than 0, not 0"),
        ([("red", float("nan"))], "finite numbers"),
        ([("red", "much")], "finite numbers"),
        (["red"], "pairs of a query and its weight"),
        ([(np.ones(DIM), 1), (np.ones(DIM), -1)], "cancel each other out"),
        ([(np.ones(DIM - 1), 1)], "has shape"),
        ([("", 1)], "text is empty"),
    ],
)
def test_mixtures_without_a_direction_are_refused(db, parts, sentence):
    with pytest.raises(QueryError, match=sentence):
        Searcher.open(db).search(Mixture(parts))


def test_explain_tells_what_is_read(db, indexed):
    exact = Searcher.open(db).explain(np.ones(DIM), mode="text")
    assert (exact.index, exact.probes, exact.passing) == ("exact", 0, None)
    assert exact.vectors_compared == len(vectors_of(db, "text_vector"))
    assert "every vector is compared" in str(exact)
    searcher = Searcher.open(indexed)
    index = searcher.release.index["text"]
    found = searcher.explain(np.ones(DIM), mode="text", k=5)
    assert (found.index, found.partitions, found.probes) == (index["kind"], index["partitions"], index["probes"])
    assert 0 < found.vectors_compared < 3000 + 100
    rare = searcher.explain(np.ones(DIM), mode="text", where={"stock": {"lt": 5}}, diversify=Diversify())
    assert rare.passing == len(
        searcher.search(np.ones(DIM), mode="text", k=100, where={"stock": {"lt": 5}}, exact=True)
    )
    assert rare.probes == index["partitions"]
    assert set(rare.seconds) == {"encode", "count", "search and rerank"}
    assert "products pass" in str(rare)
    with pytest.raises(QueryError, match="No mode"):
        searcher.explain(np.ones(DIM), mode="best")


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """Vectors of a tiny model, titles of their own, full-text indices; 400 products."""
    folder = tmp_path_factory.mktemp("worded")
    model = load_model(str(write_folder(folder / "model")))
    colours, things = ["red", "blue", "green", "grey"], ["dress", "coat", "shirt", "skirt", "vest"]
    titles = [f"{colours[i % 4]} {things[i % 5]} number {i}" for i in range(400)]
    titles[7] = "an ultramarine cape"
    columns = {**facts(400), "title": titles}
    vectors = model.embed_texts(titles)
    path = make_db(folder / "db", text=vectors, image=unit(np.random.default_rng(0).normal(size=vectors.shape)),
                   columns=columns)  # fmt: skip
    release(path, index=build_indices(path), model=str(folder / "model"), model_id=model.model_id)
    return path


def test_hybrid_is_the_fusion_of_two_lists(worded):
    searcher = Searcher.open(worded)
    by_vector = ids(searcher.search("red coats", mode="avg", k=200, columns=[]))
    table = lancedb.connect(worded).open_table("products")
    words = table.search(MultiMatchQuery("red coats", ["title", "description"]), query_type="fts").limit(400).to_list()
    by_words = [row["product_id"] for row in sorted(words, key=lambda row: (-row["_score"], row["product_id"]))][:200]
    fused = {}
    for ranked in (by_vector, by_words):
        for rank, product_id in enumerate(ranked, 1):
            fused[product_id] = fused.get(product_id, 0) + 1 / (60 + rank)
    expected = sorted(fused.items(), key=lambda item: (-item[1], item[0]))
    hits = searcher.search("red coats", mode="hybrid", k=50)
    assert [(hit.product_id, hit.score) for hit in hits] == [(i, pytest.approx(s)) for i, s in expected[:50]]
    assert "coat" in hits[0].fields["title"]
    pages = [
        searcher.search("red coats", mode="hybrid", k=10, offset=offset, columns=[]) for offset in range(0, 50, 10)
    ]
    assert [product_id for page in pages for product_id in ids(page)] == ids(hits)


def test_hybrid_finds_the_word_that_vectors_do_not_know(worded):
    searcher = Searcher.open(worded)
    assert ids(searcher.search("ultramarine", mode="hybrid", k=3))[0] == "p00007"
    assert ids(searcher.search(Mixture([("ultramarine", 1), ("dress", -0.1)]), mode="hybrid", k=3))[0] == "p00007"
    few = searcher.search("red coat", mode="hybrid", k=100, where={"stock": {"lt": 15}}, diversify=Diversify(50, 3))
    everything = searcher.search("red coat", mode="avg", k=100, where={"stock": {"lt": 15}})
    assert sorted(ids(few)) == sorted(ids(everything))
    unknown = searcher.search("zzzz", mode="hybrid", k=20)
    assert ids(unknown) == ids(searcher.search("zzzz", mode="avg", k=20))
    assert searcher.search("red", mode="hybrid", k=5, collapse_duplicates=2.0)[0].duplicates
    assert searcher.search('x" OR *:* AND title:(', mode="hybrid", k=5)


@pytest.mark.parametrize(
    ("options", "sentence"), [({"k": 201}, "hybrid results reach to 200"), ({"query": np.ones(48)}, "needs words")]
)
def test_what_hybrid_cannot_answer(worded, options, sentence):
    with pytest.raises(QueryError, match=sentence):
        Searcher.open(worded).search(**{"query": "red", "mode": "hybrid"} | options)


def test_hybrid_without_a_full_text_index_is_refused(modelled):
    with pytest.raises(QueryError, match="Release 1 has no full-text index"):
        Searcher.open(modelled[0]).search("red", mode="hybrid")
