"""The experiment on a planted catalog where every number is known, exact search, recipes, files, and the colours."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from query_tables import facts, make_db, random_db, release, unit

from pipeline.errors import QueryError
from pipeline.evaluate.answers import DEPTH, Answers, relevance_of
from pipeline.evaluate.colours import COLOURS, colours_of, without_colours
from pipeline.evaluate.diversity import METHODS, diversity, read_images
from pipeline.evaluate.evaluation import categories, comparisons, figures, is_fashion200k, per_query
from pipeline.evaluate.exact import exact_search
from pipeline.evaluate.products import Block, Products, labels, read_blocks, read_products
from pipeline.evaluate.queries import RECIPES, Query, draw_queries
from pipeline.evaluate.query_files import read_queries
from pipeline.evaluate.vocabulary import frequencies, noun_of, phrase_of, spoken, type_of
from pipeline.query import Searcher
from pipeline.store.releases import get_release
from pipeline.store.tables import Database

MODES = ("text", "image", "avg")
N = 12
BROAD = ["dress"] * 6 + ["top"] * 4 + ["skirt"] * 2
FINE = ["mini"] * 3 + ["maxi"] * 3 + ["shirt"] * 4 + ["tulle"] * 2
QUERIES = [
    Query("q1", "a", "file", "dress", "mini"),
    Query("q2", "b", "file", "top", "shirt"),
    Query("q3", "c", "file", "skirt", "tulle"),
    Query("q4", "d", "file", "dress", "maxi", source="p00003"),
]
ORDERS = [range(N), range(N - 1, -1, -1), range(N), range(N)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Database, int]:
    """Twelve products whose text vectors are the axes, and whose image vectors are the axes in reverse."""
    columns = {name: values[:N] for name, values in facts(N).items()}
    columns |= {"broad_category": BROAD, "fine_category": FINE, "title": [f"thing {i}" for i in range(N)]}
    axes = np.eye(N, dtype=np.float32)
    path = make_db(tmp_path_factory.mktemp("planted"), text=axes, image=axes[::-1], columns=columns)
    release(path)
    return Database(path), get_release(path, 1).versions["products"]


@pytest.fixture(scope="module")
def answered(planted) -> Answers:
    """Four queries whose vectors rank the products by text as ORDERS says, and by image in reverse."""
    db, version = planted
    products = read_products(db, version)
    weights = np.zeros((4, N), np.float32)
    for row, order in zip(weights, ORDERS, strict=True):
        row[list(order)] = np.arange(N, 0, -1)
    vectors = unit(weights)
    left_out = products.places([query.source or "" for query in QUERIES])
    rankings = exact_search(read_blocks(db, version, products, MODES), vectors, modes=MODES, k=DEPTH, left_out=left_out)
    return Answers(products, QUERIES, vectors, left_out, rankings, {}, relevance_of(QUERIES, products, left_out), {})


def test_what_is_relevant_among_some_products(answered):
    some = np.array([0, 3, 6, 10], np.int32)  # mini, maxi, shirt, tulle
    assert answered.relevance["broad"].totals_of(some).tolist() == [2, 1, 1, 1]  # of q4 its own product is none
    assert answered.relevance["fine"].totals_of(some).tolist() == [1, 1, 1, 0]
    assert answered.relevance["fine"].totals_of(np.arange(N, dtype=np.int32)).tolist() == [3, 4, 2, 2]
    assert sorted(answered.rankings["text"].compared.tolist()) == list(range(N))


def dcg(*ranks: int) -> float:
    return float(sum(1 / np.log2(rank + 1) for rank in ranks))


IDEAL = {n: dcg(*range(1, n + 1)) for n in (2, 3, 4, 5, 6)}
BY_HAND = {  # of q1, q2, q3, q4
    ("broad", "text", "precision", 10): [0.6, 0.4, 0.0, 0.5],
    ("broad", "text", "precision", 20): [0.3, 0.2, 0.1, 0.25],
    ("broad", "text", "recall", 10): [1, 1, 0, 1],
    ("broad", "text", "ndcg", 10): [1, dcg(3, 4, 5, 6) / IDEAL[4], 0, 1],
    ("broad", "text", "mrr", 100): [1, 1 / 3, 1 / 11, 1],
    ("broad", "image", "precision", 10): [0.4, 0.4, 0.2, 0.4],
    ("broad", "image", "mrr", 100): [1 / 7, 1 / 7, 1, 1 / 7],
    ("fine", "text", "precision", 10): [0.3, 0.4, 0.0, 0.2],
    ("fine", "text", "recall", 10): [1, 1, 0, 1],
    ("fine", "text", "ndcg", 20): [1, dcg(3, 4, 5, 6) / IDEAL[4], dcg(11, 12) / IDEAL[2], dcg(4, 5) / IDEAL[2]],
    ("fine", "text", "mrr", 100): [1, 1 / 3, 1 / 11, 1 / 4],
    ("fine", "image", "precision", 10): [0.1, 0.4, 0.2, 0.2],
    ("fine", "image", "mrr", 100): [1 / 10, 1 / 7, 1, 1 / 7],
}


def test_every_number_of_the_planted_case(answered):
    found = {(f.level, f.mode, f.measure, f.k): f for f in figures(answered, seed=0)}
    for key, values in BY_HAND.items():
        assert found[key].micro.mean == pytest.approx(np.mean(values), abs=1e-12), key
        groups = {"broad": [[0, 3], [1], [2]], "fine": [[0], [1], [2], [3]]}[key[0]]
        macro = np.mean([np.mean([values[i] for i in group]) for group in groups])
        assert found[key].macro == pytest.approx(macro, abs=1e-12), key
    precision = found["broad", "text", "precision", 10]
    assert precision.ceiling == pytest.approx(np.mean([0.6, 0.4, 0.2, 0.5]))
    assert precision.floor == pytest.approx(np.mean([6 / 12, 4 / 12, 2 / 12, 5 / 11]))
    assert found["fine", "text", "recall", 10].floor == pytest.approx(np.mean([10 / 12] * 3 + [10 / 11]))
    assert precision.index is None


def test_the_average_of_opposite_orders_ties_and_ties_are_in_order_of_the_key(answered):
    ranking = answered.rankings["avg"]
    assert ranking.places[0, :N].tolist() == list(range(N))  # every sum of opposite weights is 13
    assert ranking.places[0, N:].tolist() == [-1] * (DEPTH - N)
    assert ranking.candidates.tolist() == [12, 12, 12, 11]
    assert 3 not in ranking.places[3]


def test_comparisons_and_categories_of_the_planted_case(answered):
    found = {(c.level, c.k, c.first, c.second): c for c in comparisons(answered, seed=0)}
    assert len(found) == 2 * 4 * 3
    assert found["broad", 10, "text", "image"].difference.mean == pytest.approx(np.mean([0.2, 0.0, -0.2, 0.1]))
    assert all(c.p_holm >= c.p for c in found.values())
    worst = categories(answered)
    assert (worst[0].level, worst[0].category) == ("broad", "skirt")
    assert worst[0].precision["text"] == 0
    assert (worst[0].queries, worst[0].products) == (1, 2)


def test_a_row_for_each_query(answered):
    rows = per_query(answered).to_pylist()
    assert rows[0]["broad_text_precision_10"] == 0.6
    assert rows[3]["broad_relevant"] == 5
    assert rows[3]["text_hits"][:3] == ["p00000", "p00001", "p00002"]
    assert "p00003" not in rows[3]["text_hits"]
    assert len(rows[3]["text_scores"]) == 11


def test_diversity_of_the_planted_case(planted, answered):
    images = read_images(*planted, answered)
    found = {f.method: f for f in diversity(answered, images, seed=0)}
    assert list(found) == ["text", "avg", *METHODS]
    assert found["text"].distance.mean == pytest.approx(1.0)  # axes are at right angles
    assert found["text"].near_duplicates_10.mean == 0
    assert found["text"].precision["broad"].mean == pytest.approx(0.375)
    pool = np.mean([6 / 12, 4 / 12, 2 / 12, 5 / 11])
    assert found["text"].kept["broad"].mean == pytest.approx(0.375 / pool)
    assert found["text"].milliseconds is None
    assert all(found[method].milliseconds > 0 for method in METHODS)
    assert found["text"].fine_categories.mean == pytest.approx(np.mean([3, 4, 3, 4]))


def test_near_duplicates_fall_and_distance_rises_where_pictures_repeat(tmp_path):
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.arange(5), 12)
    image = unit(np.eye(16, dtype=np.float32)[kinds] + 0.001 * rng.normal(size=(60, 16)))
    text = unit(rng.normal(size=(60, 16)) * 0.05 + np.eye(16)[0] + 0.05 * (5 - kinds)[:, None] * np.eye(16)[1])
    columns = {"broad_category": ["dress"] * 60}
    release(path := make_db(tmp_path, text=text, image=image, columns=columns))
    db, version = Database(path), 1
    products = read_products(db, version)
    queries = [Query("q", "a", "file", "dress")]
    vectors = unit(np.eye(16, dtype=np.float32)[:1] + np.eye(16, dtype=np.float32)[1:2])
    none = np.array([-1], np.int32)
    rankings = exact_search(read_blocks(db, version, products, MODES), vectors, modes=MODES, k=DEPTH)
    answers = Answers(products, queries, vectors, none, rankings, {}, relevance_of(queries, products, none), {})
    found = {f.method: f for f in diversity(answers, read_images(db, version, answers), seed=0)}
    assert found["kmeans-5"].near_duplicates_5.mean == 0
    assert found["text"].near_duplicates_10.mean > found["kmeans-5"].near_duplicates_10.mean
    assert found["kmeans-5"].distance.mean > found["text"].distance.mean
    assert found["kmeans-5"].kept["broad"].mean == pytest.approx(1.0)


def test_a_page_without_two_images_says_nothing_of_distance(tmp_path):
    columns = {name: values[:N] for name, values in facts(N).items()} | {"broad_category": ["a"] * 2 + ["b"] * 10}
    axes = np.eye(N, dtype=np.float32)
    release(path := make_db(tmp_path, text=axes, image=axes, has_image=np.arange(N) < 2, columns=columns))
    db, products = Database(path), read_products(Database(path), 1)
    queries = [Query("first", "x", "file", "a"), Query("last", "x", "file", "b")]
    falling, none = np.arange(N, 0, -1), np.full(2, -1, np.int32)
    vectors = unit(np.stack([falling, falling[::-1]]))  # the two with images come first, and last of twelve
    rankings = exact_search(read_blocks(db, 1, products, MODES), vectors, modes=MODES, k=DEPTH)
    answers = Answers(products, queries, vectors, none, rankings, {}, relevance_of(queries, products, none), {})
    found = {f.method: f for f in diversity(answers, read_images(db, 1, answers), seed=0)}
    assert found["text"].distance.mean == pytest.approx(1.0)  # not 0.5


def blocks(vectors, present, rows):
    places = np.random.default_rng(1).permutation(len(vectors)).astype(np.int32)
    for at in range(0, len(vectors), rows):
        part = places[at : at + rows]
        yield Block(part, {"text": vectors[part]}, {"text": present[part]})


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 60), st.integers(1, 20))
def test_exact_search_equals_a_sort(seed, count, rows, k):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (count, 3)).astype(np.float32)  # with many ties
    present, kept = rng.random(count) > 0.2, rng.random(count) > 0.2
    queries = rng.integers(-2, 3, (4, 3)).astype(np.float32)
    left_out = rng.integers(-1, count, 4).astype(np.int32)
    found = exact_search(blocks(vectors, present, rows), queries, modes=["text"], k=k, left_out=left_out, kept=kept)[
        "text"
    ]
    for number, query in enumerate(queries):
        allowed = [place for place in range(count) if present[place] and kept[place] and place != left_out[number]]
        best = sorted(allowed, key=lambda place: (-float(vectors[place] @ query), place))[:k]
        assert found.places[number].tolist() == best + [-1] * (k - len(best))
        assert found.candidates[number] == len(allowed)


def test_exact_search_agrees_with_the_searcher(tmp_path):
    path = random_db(tmp_path, 60)
    searcher = Searcher.open(path)
    db, version = Database(path), searcher.release.versions["products"]
    products = read_products(db, version)
    queries = unit(np.random.default_rng(3).normal(size=(5, 16)))
    found = exact_search(read_blocks(db, version, products, MODES), queries, modes=MODES, k=20)
    for mode in MODES:
        for places, hits in zip(found[mode].places, searcher.search_many(list(queries), mode=mode, k=20), strict=True):
            assert [products.ids[place].as_py() for place in places] == [hit.product_id for hit in hits]


SHOP = [
    ("a1", "Red midi dress", "dresses", "midi dress"),
    ("a2", "Blue midi dress", "dresses", "midi dress"),
    ("a3", "Red striped maxi dress", "dresses", "maxi dress"),
    ("b1", "Blue striped shirt", "tops", "shirt"),
    ("b2", "Red shirt Zorjen", "tops", "shirt"),
    ("b3", None, "tops", "shirt"),
    ("c1", "Mystery", None, None),
]


@pytest.fixture
def shop(tmp_path) -> tuple[Database, int]:
    rng = np.random.default_rng(0)
    ids, titles, broad, fine = (list(column) for column in zip(*SHOP, strict=True))
    columns = {name: values[: len(SHOP)] for name, values in facts(len(SHOP)).items()}
    columns |= {"product_id": ids, "title": titles, "broad_category": broad, "fine_category": fine}
    columns["description"] = [None] * len(SHOP)
    vectors = unit(rng.normal(size=(len(SHOP), 16)))
    release(path := make_db(tmp_path / "shop", text=vectors, image=vectors, columns=columns))
    return Database(path), 1


def test_recipes_draw_what_they_say(shop):
    products = read_products(*shop)
    assert [q.text for q in draw_queries(products, "broad", count=9, seed=0)] == ["dresses", "tops"]
    fine = draw_queries(products, "fine", count=9, seed=0)
    assert [(q.text, q.broad, q.fine) for q in fine] == [
        ("maxi dress", "dresses", "maxi dress"), ("midi dress", "dresses", "midi dress"), ("shirt", "tops", "shirt"),
    ]  # fmt: skip
    described = draw_queries(products, "description", count=9, seed=0)
    assert {q.text for q in described} == {title for _, title, broad, _ in SHOP if title and broad}
    article = draw_queries(products, "article", count=50, seed=0)
    assert {"red dress", "striped dress", "blue midi dress"} <= {q.text for q in article}
    assert all(q.text.split()[-1] in ("dress", "tops", "shirt") for q in article)
    assert not any("zorjen" in q.text for q in article)  # a name: no other product has it
    assert all(q.source and q.broad and q.fine for q in article)
    attribute = draw_queries(products, "attribute", count=50, seed=0)
    assert {"red midi dress", "blue shirt"} <= {q.text for q in attribute}
    assert len({q.text for q in article}) == len(article)


def test_queries_are_the_same_by_seed(shop):
    products = read_products(*shop)
    for recipe in RECIPES:
        assert draw_queries(products, recipe, count=4, seed=1) == draw_queries(products, recipe, count=4, seed=1)
    drawn = {tuple(q.text for q in draw_queries(products, "article", count=4, seed=seed)) for seed in range(5)}
    assert len(drawn) > 1


def test_a_query_that_only_its_own_product_answers_says_so(shop):
    products = read_products(*shop)
    found = {q.text: q.is_own_text_only for q in draw_queries(products, "article", count=99, seed=0)}
    assert found["red dress"] is False  # a1 and a3
    assert found["striped dress"] is True  # a3 alone
    assert not any(q.is_own_text_only for q in draw_queries(products, "broad", count=9, seed=0))


def test_recipes_refuse_what_they_cannot_use(shop, planted):
    with pytest.raises(QueryError, match="no recipe 'best'"):
        draw_queries(read_products(*shop), "best", count=1, seed=0)
    nothing = read_products(*shop).subset(np.array([False] * 6 + [True]))
    bare = nothing.__class__(nothing.ids, nothing.phrases, nothing.texts, {
        "broad": nothing.levels["broad"].__class__((), nothing.levels["broad"].codes),
        "fine": nothing.levels["fine"],
    })  # fmt: skip
    with pytest.raises(QueryError, match="broad_category, so nothing"):
        draw_queries(bare, "article", count=1, seed=0)
    with pytest.raises(QueryError, match="No query could be drawn"):
        draw_queries(nothing, "article", count=1, seed=0)


def test_fine_categories_of_one_name_are_apart(tmp_path):
    columns = {name: values[:4] for name, values in facts(4).items()}
    columns |= {"broad_category": ["Men", "Women", "Men", "Women"], "fine_category": ["Tees", "Tees", "Tees", "Hats"]}
    vectors = unit(np.random.default_rng(0).normal(size=(4, 16)))
    release(path := make_db(tmp_path, text=vectors, image=vectors, columns=columns))
    products = read_products(Database(path), 1)
    assert products.levels["fine"].names == ("Hats", "Men › Tees", "Women › Tees")
    assert [q.text for q in draw_queries(products, "fine", count=9, seed=0)] == ["hats", "men tees", "women tees"]
    (tmp_path / "q.csv").write_text("text,broad_category,fine_category\nshirt,Men,Tees\n")
    assert read_queries(tmp_path / "q.csv", products)[0].fine == "Men › Tees"


def test_types_are_what_texts_say(shop):
    products = read_products(*shop, fine="type")
    assert products.levels["fine"].names == ()  # fewer than five products share any word
    counts = {"knit": 9, "midi": 9, "dress": 9, "black": 9, "zorjen": 1}
    assert type_of("Zorjen black knit midi dress", Counter(counts)) == "knit midi dress"
    assert type_of("black", Counter(counts)) is None


@pytest.mark.parametrize(("fine", "is_it"), [("dresses/casual_and_day_dresses", True), ("midi dress", False)])
def test_fashion200k_is_known_by_its_categories(fine, is_it):
    broad = ["dress", "jacket", "pants", "skirt", "top"]
    levels = {"broad": labels(broad), "fine": labels([fine, *"abcd"])}
    assert is_fashion200k(Products(pa.array("12345"), *2 * [pa.array([""] * 5)], levels)) is is_it


def test_article_queries_of_real_labels(shared):
    """Attributes in the order of the descriptions and a noun, as in the published examples."""
    rows = pq.read_table(shared / "data" / "fashion200k" / "products.parquet").sort_by("product_id").to_pylist()
    texts = [row["description"] or "" for row in rows]
    levels = {name: labels([row[f"{name}_category"] for row in rows]) for name in ("broad", "fine")}
    products = Products(pa.array([row["product_id"] for row in rows]), *2 * [pa.array(texts)], levels)
    drawn = draw_queries(products, "article", count=1000, seed=0)
    assert len(drawn) == 1000
    assert {query.text.split()[-1] for query in drawn} == {"dress", "jacket", "pants", "skirt", "top"}
    lengths = Counter(len(query.text.split()) for query in drawn)
    assert set(lengths) == {2, 3, 4}
    assert sum(bool(colours_of(query.text)) for query in drawn) > 300
    counts = frequencies(texts)
    types = Counter(type_of(text, counts) for text in texts)
    assert types["maxi dress"] > 5
    assert not any(colours_of(name) for name in types if name)


def test_words():
    assert spoken("dresses/casual_and_day_dresses") == "casual and day dresses"
    assert noun_of("dresses", ["red dress", "blue dress"]) == "dress"
    assert noun_of("pants", ["cargo pants", "blue pants", "pant"]) == "pants"
    assert noun_of("Women Tops", ["a top"]) == "women top"
    assert noun_of("Accessories", []) == "accessories"
    assert phrase_of(None, "A coat. It is warm.") == "A coat"
    assert phrase_of("  Red   coat ", "x") == "Red coat"
    assert phrase_of(None, None) == ""


@pytest.mark.parametrize(
    ("text", "colours"),
    [("Navy blue dress", {"navy"}), ("RED and off-white", {"red", "white"}), ("multicolor henley", {"multicolour"}),
     ("a bored, tanned rosette", set()), ("gray/charcoal", {"grey"}), ("red-hot", set()),
     ("navy-blue, light  blue", {"navy", "blue"}), ("Off White, Multi-Color", {"white", "multicolour"}),
     ("a pınk roſe of SİLVER", set())],
)  # fmt: skip
def test_colours_are_whole_words(text, colours):
    assert colours_of(text) == colours


@given(st.lists(st.sampled_from([*sum(COLOURS.values(), ()), "dress", "a", "-", "NAVY"]), max_size=8).map(" ".join))
def test_without_colours_leaves_none(text):
    assert colours_of(without_colours(text)) == set()


@given(st.text("royalbuednvKıſİ -\u00a0\u2028", max_size=30))
def test_any_text_may_be_asked_for_its_colours(text):
    assert colours_of(without_colours(text)) == set()
    assert colours_of(text) <= set(COLOURS)


def test_a_users_file(shop, tmp_path):
    products = read_products(*shop)
    rows = [{"query_id": "1", "text": "red dress", "broad_category": "dresses"}, {"query_id": "2", "text": "that one"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "qrels").write_text("2 0 b1 3\n2 0 b2 1\n2 0 gone 3\n2 0 a1 -1\n")
    queries = read_queries(tmp_path / "q.jsonl", products, qrels=tmp_path / "qrels")
    assert [(q.query_id, q.text, q.broad, q.judged) for q in queries] == [
        ("1", "red dress", "dresses", None), ("2", "that one", None, {"b1": 3, "b2": 1, "gone": 3, "a1": 0}),
    ]  # fmt: skip
    judged = relevance_of(queries, products, np.array([-1, -1], np.int32))["judged"]
    assert judged.asked.tolist() == [False, True]
    assert judged.totals.tolist() == [0, 2]  # what is gone cannot be found
    places = products.places(["b2", "a1", "b1"])
    assert judged.gains_of(np.stack([places, places])).tolist() == [[0, 0, 0], [1, 0, 3]]
    assert judged.ideal[1, :3].tolist() == [3, 1, 0]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("q.csv", "query,x\nred,1\n", "no column `text`"), ("q.csv", "text,broad_category\nred,hats\n", "2.*no broad"),
     ("q.csv", "text\nred\n", "nothing says what is relevant"), ("q.csv", "text,broad_category\n ,tops\n", "no text"),
     ("q.csv", "text,broad_category\na,tops,x\n", "more fields"), ("q.csv", "text,colour\na,b\n", "no column 'colour'"),
     ("q.jsonl", '{"text": "a", "broad_category": "tops"}\n{"text"', "line 2 is no JSON"),
     ("q.jsonl", "[1]", "no JSON object"), ("q.csv", "text,broad_category\n", "holds no query"),
     ("q.csv", "query_id,text,broad_category\n1,a,tops\n1,b,tops\n", "above already")],
)  # fmt: skip
def test_a_users_file_that_cannot_be_used(shop, tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(QueryError, match=said):
        read_queries(tmp_path / name, read_products(*shop))


def test_judgements_that_cannot_be_used(shop, tmp_path):
    products = read_products(*shop)
    (tmp_path / "q.csv").write_text("query_id,text,broad_category\n1,a,tops\n")
    for content, said in (("1 0 a1\n", "line 1 is not of the form"), ("9 0 a1 1\n", "judges 1 queries")):
        (tmp_path / "qrels").write_text(content)
        with pytest.raises(QueryError, match=said):
            read_queries(tmp_path / "q.csv", products, qrels=tmp_path / "qrels")
    with pytest.raises(QueryError, match="cannot be read"):
        read_queries(Path(tmp_path / "none.csv"), products)
