"""The server's API over real sockets, on a real database and the demo model's vectors."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import lance
import numpy as np
import pytest
from PIL import Image
from query_tables import jpeg, release
from served import COLOURS, Client, catalog, environment, serving

from jobs.serve import main
from pipeline.query import Diversify, Mixture, Searcher
from pipeline.serve import service as service_module
from pipeline.serve.guard import Limits
from pipeline.serve.listen import listening

TOKEN = "a-token-of-twenty-signs"
ODD_IDS = {3: "a/b c?d#e%2F&é\u202e", 4: "'; DROP TABLE products; --"}


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    return catalog(tmp_path_factory.mktemp("served") / "db", ids=ODD_IDS)


@pytest.fixture(scope="module")
def server(db):
    with serving(db) as client:
        yield client


@pytest.fixture(scope="module")
def searcher(db):
    return Searcher.open(db)


def ids(hits):
    return [hit.product_id for hit in hits]


@pytest.mark.parametrize("mode", ["text", "image", "avg", "hybrid"])
def test_a_text_search_is_the_searcher_s(server, searcher, mode):
    reply = server.get("/search", q="red midi dress", mode=mode, k=7)
    hits = searcher.search("red midi dress", mode=mode, k=7)
    assert reply.ids == ids(hits)
    assert [hit["score"] for hit in reply.json["hits"]] == pytest.approx([hit.score for hit in hits], abs=1e-6)
    assert [hit["rank"] for hit in reply.json["hits"]] == list(range(1, 8))
    assert reply.json["release"] == 1
    assert reply.headers["cache-control"] == "no-store"
    assert server.post({"text": "red midi dress", "mode": mode, "k": 7}).ids == ids(hits)


def test_a_hit_tells_what_a_page_shows(server):
    hit = server.get("/search", q="red midi dress", mode="text", k=1).json["hits"][0]
    assert hit["caption"] == {"title": "Red midi dress", "category": "dresses › midi dress"}
    assert hit["fields"]["price"] == 10.0
    assert {"cluster", "duplicates", "looks_like"} <= set(hit)
    assert not [name for name in hit["fields"] if "vector" in name or "sha256" in name]


def test_images_vectors_and_mixtures(server, searcher):
    picture = jpeg(COLOURS["green"], (60, 120))
    coded = base64.b64encode(picture).decode()
    wanted = ids(searcher.search(picture, mode="image", k=5))
    assert server.post({"image": coded, "mode": "image", "k": 5}).ids == wanted
    for kind in ("image/jpeg", "application/octet-stream"):
        sent = server.ask("POST", "/search?mode=image&k=5", picture, {"content-type": kind})
        assert sent.ids == wanted
    vector = [float(x) for x in np.random.default_rng(1).normal(size=len(searcher.encode(["x"])[0]))]
    assert server.post({"vector": vector, "k": 5}).ids == ids(searcher.search(vector, k=5))
    parts = [{"image": coded}, {"text": "blue", "weight": 0.6}, {"text": "coat", "weight": -0.3}]
    mixture = Mixture([(picture, 1.0), ("blue", 0.6), ("coat", -0.3)])
    assert server.post({"mixture": parts, "k": 9}).ids == ids(searcher.search(mixture, k=9))
    assert server.post({"mixture": [*parts, {"vector": vector}], "mode": "hybrid"}).status == 200


def test_options_reach_the_searcher(server, searcher):
    where = {"broad_category": {"in": ["dresses", "jackets"]}, "price": {"ge": 20, "lt": 80}}
    wanted = searcher.search("blue", k=5, offset=3, where=where, columns=["price"])
    reply = server.get("/search", q="blue", k=5, offset=3, where=where, columns=["price"])
    assert reply.ids == ids(wanted)
    assert [hit["fields"] for hit in reply.json["hits"]] == [dict(hit.fields) for hit in wanted]
    body = {"text": "blue", "k": 5, "offset": 3, "where": where, "columns": ["price"], "exact": True}
    assert server.post(body).ids == ids(wanted)
    diverse = searcher.search("blue", k=8, diversify=Diversify(candidates=30, clusters=4))
    reply = server.get("/search", q="blue", k=8, candidates=30, clusters=4)
    assert reply.ids == ids(diverse)
    assert [hit["cluster"] for hit in reply.json["hits"][:4]] == [0, 1, 2, 3]
    assert reply.json["diversity"] == pytest.approx(diverse.diversity)
    assert reply.json["rank_correlation"] == pytest.approx(diverse.rank_correlation)
    spread = {"method": "mmr", "trade_off": 0.3}
    wanted = searcher.search("blue", k=8, diversify=Diversify(**spread))
    assert server.post({"text": "blue", "k": 8, "diversify": spread}).ids == ids(wanted)
    once = server.get("/search", q="blue", k=8, collapse_duplicates=0.02)
    assert once.ids == ids(searcher.search("blue", k=8, collapse_duplicates=0.02))


def test_look_alikes_are_marked(server):
    marked = server.get("/search", q="blue", mode="image", k=20, mark_duplicates=2).json["hits"]
    assert marked[0]["looks_like"] is None
    assert {hit["looks_like"] for hit in marked[1:]} <= {marked[0]["product_id"], None}
    assert any(hit["looks_like"] for hit in marked)
    assert not any(hit["looks_like"] for hit in server.get("/search", q="blue", k=20).json["hits"])


def test_probes_may_ask_with_head(server):
    for path in ("/healthz", "/"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("HEAD", path)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"")
        connection.close()


def test_products_like_one(server, searcher):
    for mode in ("text", "image", "avg"):
        found = server.similar("p00008", mode=mode, k=6)
        vector = searcher.products(["p00008"], [f"{mode}_vector"])["p00008"][f"{mode}_vector"]
        wanted = [product_id for product_id in ids(searcher.search(vector, mode=mode, k=7)) if product_id != "p00008"]
        assert found.ids == wanted[:6]
    narrow = server.similar("p00008", where={"broad_category": "dresses"}, k=50)
    assert len(narrow.ids) == 8
    assert server.similar(ODD_IDS[3], k=3).status == 200
    assert ODD_IDS[3] not in server.similar(ODD_IDS[3], k=48).ids
    unknown = server.similar("nope\x1b[31m")
    assert unknown.status == 404
    assert unknown.error == r"There is no product 'nope\x1b[31m' in release 1."
    assert (server.similar("p00005", mode="image").status, server.similar("p00005").status) == (400, 200)
    assert "has no image" in server.similar("p00005", mode="image").error
    assert "hybrid" in server.similar("p00008", mode="hybrid").error


def test_thumbnails(server):
    reply = server.get("/thumbnail/p00000?release=1")
    assert reply.status == 200
    assert Image.open(io.BytesIO(reply.body)).format == "JPEG"
    assert reply.headers["content-type"] == "image/jpeg"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["cache-control"] == "private, max-age=86400, immutable"
    again = server.get("/thumbnail/p00000", headers={"if-none-match": reply.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    assert again.headers["cache-control"] == "private, max-age=60"
    for missing in ("p00005", "nope"):
        assert server.get(f"/thumbnail/{missing}").status == 404
    with ThreadPoolExecutor(16) as pool:
        wanted = [f"p{i:05d}" for i in (*range(6, 17), 0, 1, 2)]
        replies = list(pool.map(lambda product_id: server.get(f"/thumbnail/{product_id}"), wanted))
    assert [len(reply.body) > 300 for reply in replies] == [True] * len(wanted)
    assert replies[-3].body == reply.body


def test_the_schema_says_what_may_be_asked(server):
    told = server.get("/schema").json
    columns = {column["name"]: column for column in told["columns"]}
    assert told["modes"] == ["text", "image", "avg", "hybrid"]
    assert columns["broad_category"]["values"][0] == ["jackets", 16]
    assert columns["broad_category"]["distinct"] == 5
    assert (columns["price"]["kind"], columns["price"]["low"], columns["price"]["high"]) == ("float", 10.0, 127.5)
    assert columns["title"]["values"] == []
    assert columns["listed"]["kind"] == "date"
    assert not {"partition", "tags", "text_vector"} & set(columns)


def test_health_metrics_and_the_description(server):
    server.get("/search", q="red")
    assert server.get("/healthz").json["ready"] is True
    metrics = server.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = metrics.body.decode()
    assert 'twotower_serve_requests_total{route="/search",status="200"}' in text
    for name in ("seconds_bucket", "text_batch_bucket", "release 1.0", "searches 0.0"):
        assert f"twotower_serve_{name}" in text
    described = server.get("/openapi.json").json
    paths = {"/search", "/similar/{product_id}", "/thumbnail/{product_id}", "/schema", "/healthz", "/metrics"}
    assert set(described["paths"]) == paths
    parts = json.dumps(described)
    for reference in {part.split('"')[0] for part in parts.split("#/components/schemas/")[1:]}:
        assert reference in described["components"]["schemas"], reference
    assert [server.get(path).status for path in ("/docs", "/redoc", "/page/..%2fapp.py", "/nope")] == [404] * 4
    assert server.ask("DELETE", "/search").error == "This address does not take this method."


# Written in the bodies below: a number beyond all floats, a text that is too long, JSON that is nested too deep.
LARGE = {"BIG": "9" * 400, "LONG": "a" * 30_000, "DEEP": "[" * 100_000, "NESTED": '{"a":' * 5_000,
         "NOTS": '{"not":' * 50 + '{"price": 1}' + "}" * 50, "ZEROS": ", ".join(["0"] * 64),
         "NANS": ", ".join(["NaN"] * 64)}  # fmt: skip
REFUSED = [
    ("{", 400, "cannot be read"),
    ("", 400, "cannot be read"),
    ("[]", 422, ""),
    ("null", 422, ""),
    ("{}", 400, "one of"),
    ('{"text": "a", "text_": 1}', 422, "text_"),
    ('{"text": 1}', 422, "text"),
    ('{"text": "\\ud800"}', 400, ""),
    ('{"text": "a", "k": "3"}', 422, "k"),
    ('{"text": "a", "k": true}', 422, "k"),
    ('{"text": ""}', 400, "empty"),
    ('{"text": "a", "k": 0}', 400, "k is"),
    ('{"text": "a", "k": -1}', 400, "k is"),
    ('{"text": "a", "k": 1000000000}', 400, "k is at most 1000"),
    ('{"text": "a", "offset": -1}', 400, "offset"),
    ('{"text": "a", "offset": 1000000000}', 400, "offset"),
    ('{"text": "a", "k": BIG}', 400, "k is"),
    ('{"text": "a", "mode": "best"}', 400, "No mode 'best'"),
    ('{"text": "LONG"}', 400, "characters"),
    ('{"image": "%%%"}', 400, "not base64"),
    ('{"image": ""}', 400, "empty"),
    ('{"image": "aGVsbG8="}', 400, "image"),
    ('{"text": "a", "image": "aGVsbG8="}', 400, "one of"),
    ('{"vector": [1, 2]}', 400, "shape"),
    ('{"vector": []}', 400, "shape"),
    ('{"vector": ["a"]}', 422, "vector.0"),
    ('{"vector": [[1]]}', 422, "vector.0"),
    ('{"vector": [ZEROS]}', 400, ""),
    ('{"vector": [NANS]}', 400, ""),
    ('{"mixture": []}', 400, "Mixture"),
    ('{"mixture": [{"text": "a", "weight": 0}]}', 400, "weights"),
    ('{"mixture": [{"text": "a", "weight": NaN}]}', 400, "weights"),
    ('{"mixture": [{}]}', 400, "Each part"),
    ('{"mixture": [{"text": "a"}, {"text": "a", "weight": -1}]}', 400, "cancel"),
    ('{"mixture": [{"text": "a", "weight": BIG}]}', 400, ""),
    ('{"text": "a", "columns": ["nope"]}', 400, "No column 'nope'"),
    ('{"text": "a", "columns": "title"}', 422, "columns"),
    ('{"text": "a", "diversify": {"clusters": 0}}', 400, "clusters"),
    ('{"text": "a", "diversify": true}', 422, ""),
    ('{"text": "a", "diversify": {"method": "x"}}', 400, "method"),
    ('{"text": "a", "diversify": {"trade_off": NaN}}', 422, "trade_off"),
    ('{"text": "a", "collapse_duplicates": 3}', 400, "collapse_duplicates"),
    ('{"text": "a", "mark_duplicates": -1}', 400, "mark_duplicates"),
    ('{"text": "a", "where": {"nope": 1}}', 400, "No column 'nope'"),
    ('{"text": "a", "where": []}', 422, "where"),
    ('{"text": "a", "where": {"price": "1 OR 1=1"}}', 400, "price"),
    ('{"text": "a", "where": {"price": NaN}}', 400, "price"),
    ('{"text": "a", "where": {"price": {"lt": 1e999}}}', 400, "price"),
    ('{"text": "a", "where": {"price": {"lt": BIG}}}', 400, "price"),
    ('{"text": "a", "where": {"price": {"drop": 1}}}', 400, "drop"),
    ('{"text": "a", "where": {"price < 1 OR true": 1}}', 400, "No column"),
    ('{"text": "a", "where": NOTS}', 400, "levels"),
    ("DEEP", 400, ""),
    ("NESTED", 400, ""),
]


@pytest.mark.parametrize(("body", "status", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_has_no_answer_is_one_sentence(server, body, status, said, caplog):
    for name, text in LARGE.items():
        body = body.replace(name, text)
    reply = server.post(body)
    assert reply.status == status, reply.body
    assert said in reply.error
    assert len(reply.error) < 600
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    ("query", "status"),
    [("", 422), ("q=", 400), ("q=a&k=x", 422), ("q=a&k=0", 400), ("q=a&nope=1", 422), ("q=a&where=x", 400),
     ("q=a&where=[]", 400), ("q=a&where={}&where={}", 200), ('q=a&where={"price":{"lt":"x"}}', 400),
     ('q=a&where={},"k":{}', 400), ("q=a&clusters=-1", 400), ("q=%ED%A0%80", 200), ("q=%00", 200),
     ("q=a&collapse_duplicates=nan", 422)],
)  # fmt: skip
def test_what_an_address_may_say(server, query, status):
    reply = server.ask("GET", "/search?" + query.replace(" ", "+").replace('"', "%22"))
    assert reply.status == status, reply.body
    assert status == 200 or reply.error


def test_bodies_of_another_kind_are_refused(server):
    for kind in ("text/plain", "multipart/form-data; boundary=x", ""):
        reply = server.ask("POST", "/search", b"{}", {"content-type": kind})
        assert reply.status == 422
        assert "application/json" in reply.error
    both = server.ask("POST", "/search?k=3", b'{"text": "a"}', {"content-type": "application/json"})
    assert (both.status, "query string" in both.error) == (422, True)
    broken = server.ask("POST", "/search", b"GIF89a", {"content-type": "image/gif"})
    assert (broken.status, "image" in broken.error) == (400, True)


INJECTIONS = ["' OR '1'='1", "x'; DROP TABLE products; --", '" OR ""="', "1=1", "\\' OR 1=1 --", "%", "_", "*", "\x00",
              "dresses' --", "') OR true OR ('", "{{7*7}}", "${jndi:ldap://x}", "NULL", "true"]  # fmt: skip


@pytest.mark.parametrize("text", INJECTIONS)
def test_no_text_changes_what_a_filter_means(server, text):
    for where in (
        {"broad_category": text},
        {"broad_category": {"in": [text]}},
        {"or": [{"title": text}, {"title": text}]},
    ):
        assert server.post({"text": "red", "k": 48, "where": where}).ids == []
        assert server.get("/search", q="red", k=48, where=where).ids == []
    assert len(server.post({"text": "red", "k": 48, "where": {"broad_category": {"ne": text}}}).ids) == 48
    for where in ({text: "red"}, {"price": text}, {"broad_category": {text: "red"}}):
        assert server.post({"text": "red", "where": where}).status == 400


def test_a_token_is_asked_for_everywhere_but_at_the_door(db):
    with serving(db, token=TOKEN, is_local=False) as client:
        closed = ("/search?q=red", "/similar/p00000", "/thumbnail/p00000", "/schema", "/metrics", "/openapi.json", "/x")
        for path in closed:
            for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"},
                          {"authorization": f"Bearer {TOKEN}x"}, {"authorization": "Bearer é"}):  # fmt: skip
                reply = client.get(path, headers=given)
                assert reply.status == 401
                assert "token" in reply.error
                assert reply.headers["www-authenticate"] == "Bearer"
        assert client.get(f"/search?q=red&token={TOKEN}").status == 401
        assert client.post("x" * 1000).status == 401
        for path in ("/", "/page/index.html", "/healthz"):
            assert client.get(path).status == 200
        client.headers["authorization"] = f"bearer {TOKEN}"
        assert client.get("/search", q="red", k=1, headers={"host": "shop.example"}).status == 200
        assert client.similar("p00000").status == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "", "localhost.evil.example", "[::2]"])
def test_another_site_s_name_is_refused_on_loopback(server, host):
    reply = server.get("/healthz", headers={"host": host})
    assert reply.status == 400
    assert "Host" in reply.error or "not" in reply.error


@pytest.mark.parametrize("host", ["localhost:99", "127.0.0.1", "[::1]:8000", "LOCALHOST"])
def test_its_own_names_are_not(server, host):
    assert server.get("/healthz", headers={"host": host}).status == 200


def test_what_is_too_large_is_refused_while_it_comes(db):
    with serving(db, limits=Limits(body_bytes=50_000)) as client:
        fits = json.dumps({"text": "red"}) + " " * 49_000
        assert client.post(fits).status == 200
        assert client.post(fits + " " * 2_000).status == 413
        pieces = (b" " * 1_000 for _ in range(100))
        reply = client.ask("POST", "/search", pieces, {"content-type": "application/json"})  # chunked
        assert (reply.status, "50000 bytes" in reply.error) == (413, True)
        before = _rss_mb()
        pieces = (bytes(2**20) for _ in range(200))
        for headers in ({}, {"content-length": str(200 * 2**20)}):
            reply = client.ask("POST", "/search", pieces, {"content-type": "image/jpeg", **headers})
            assert reply.status == 413
        assert _rss_mb() - before < 60
        assert client.get("/search", q="red").status == 200


def test_all_together_may_not_send_too_much_either(db):
    limits = Limits(body_bytes=50_000, held_bytes=100_000)
    head = (
        b"POST /search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 50000\r\n\r\n"
    )
    with serving(db, limits=limits) as client:
        held = [socket.create_connection(("127.0.0.1", client.port), timeout=20) for _ in range(3)]
        for connection in held[:2]:
            connection.sendall(head + b" " * 49_000)
        time.sleep(0.2)
        held[2].sendall(head + b" " * 49_000)
        assert held[2].makefile("rb").readline().startswith(b"HTTP/1.1 503")
        for connection in held:
            connection.close()
        deadline = time.monotonic() + 10
        while client.post(json.dumps({"text": "red"}) + " " * 40_000).status != 200:  # what was held is let go
            assert time.monotonic() < deadline


def _rss_mb():
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096 / 1e6


def test_what_is_sent_too_slowly_is_refused(db):
    with serving(db, limits=Limits(seconds=0.5)) as client:
        for head in (b"content-length: 100\r\n", b"transfer-encoding: chunked\r\n"):
            with socket.create_connection(("127.0.0.1", client.port)) as slow:
                slow.sendall(b"POST /search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" + head)
                slow.sendall(b"\r\n")
                assert slow.makefile("rb").readline().startswith(b"HTTP/1.1 408")


def test_a_search_that_takes_too_long_is_given_up_and_the_rest_are_not(db, monkeypatch):
    whole, is_slow = service_module.search_answer, threading.Event()
    is_slow.set()

    def slow(searcher, query, chosen, mark):
        if is_slow.is_set() and query == "slow":
            time.sleep(1.5)
        return whole(searcher, query, chosen, mark)

    monkeypatch.setattr(service_module, "search_answer", slow)
    with serving(db, limits=Limits(seconds=0.4), threads=2, waiting=3) as client:
        client.get("/search", q="slow down")  # the tower is warm
        late = client.get("/search", q="slow")
        assert late.status == 504
        assert "0.4 s" in late.error
        assert client.get("/search", q="red").status == 200  # beside it, on the other thread
        with ThreadPoolExecutor(12) as pool:
            statuses = [reply.status for reply in pool.map(lambda _: client.get("/search", q="slow"), range(12))]
            refused = client.get("/search", q="slow")
        assert set(statuses) == {503, 504}
        assert refused.status in (503, 504)
        is_slow.clear()
        deadline = time.monotonic() + 10
        while (reply := client.get("/search", q="slow")).status != 200:
            assert reply.headers.get("retry-after") == "1" or reply.status == 504
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_an_error_of_ours_is_one_sentence_and_not_the_end(db, monkeypatch, caplog):
    with serving(db) as client:
        for error, status in ((ZeroDivisionError("secret"), 500), (OSError("Not found: x.lance, /a/b.rs:1:2"), 503)):
            with monkeypatch.context() as patch:
                patch.setattr(service_module, "search_answer", lambda *_, error=error: (_ for _ in ()).throw(error))
                reply = client.get("/search", q="red")
                assert (reply.status, "secret" in reply.error) == (status, False)
        assert client.get("/search", q="red").status == 200
    assert "ZeroDivisionError" in caplog.text


def test_concurrent_texts_share_the_tower(db, monkeypatch):
    texts = [f"{colour} {thing} of {number}" for number, thing in enumerate(("dress", "coat", "shirt", "skirt"))
             for colour in COLOURS]  # fmt: skip
    with serving(db) as client:
        alone = {text: client.get("/search", q=text, k=10).json["hits"] for text in texts}
    calls = []
    whole = Searcher.encode

    def counted(self, queries):
        calls.append(len(queries))
        time.sleep(0.03)  # a tower of jina's size
        return whole(self, queries)

    monkeypatch.setattr(Searcher, "encode", counted)
    with serving(db) as client:
        client.get("/search", q="warm")
        calls.clear()
        with ThreadPoolExecutor(len(texts)) as pool:
            replies = list(pool.map(lambda text: client.get("/search", q=text, k=10), texts))
        assert sum(calls) == len(texts)
        assert len(calls) < len(texts) / 2
        assert max(calls) <= service_module.TEXTS_AT_ONCE
        for text, reply in zip(texts, replies, strict=True):
            assert reply.ids == [hit["product_id"] for hit in alone[text]]
        calls.clear()
        assert client.get("/search", q=texts[0]).status == 200
        assert calls == []  # it is remembered
        with ThreadPoolExecutor(8) as pool:
            mixed = list(pool.map(lambda text: client.get("/search", q=text).status, ["a" * 30_000, *"bcdefg", " "]))
        assert mixed == [400, 200, 200, 200, 200, 200, 200, 400]  # a bad one fails alone


def test_a_release_comes_while_it_serves(tmp_path):
    db = catalog(tmp_path / "db")
    with serving(db, refresh_s=0.1) as client:
        assert client.get("/healthz").json["release"] == 1
        first = client.get("/search", q="red midi dress", mode="text", k=1)
        assert first.ids == ["p00000"]
        products = lance.dataset(f"{db}/products.lance")
        products.delete("product_id = 'p00000'")
        release(db, 2, model_id=Searcher.open(db).release.model_id)
        deadline = time.monotonic() + 10
        answered = set()
        while client.get("/healthz").json["release"] != 2:
            reply = client.get("/search", q="red midi dress", mode="text", k=1)
            answered.add((reply.json["release"], reply.ids[0] == "p00000"))
            assert time.monotonic() < deadline
        reply = client.get("/search", q="red midi dress", mode="text", k=1)
        assert (reply.json["release"], reply.ids[0] == "p00000") == (2, False)
        assert answered <= {(1, True), (2, False)}
        (tmp_path / "db" / "releases.lance").rename(tmp_path / "away")  # a store that is gone for a while
        time.sleep(0.3)
        assert client.get("/search", q="red", k=1).json["release"] == 2
        (tmp_path / "away").rename(tmp_path / "db" / "releases.lance")
        assert client.get("/schema").json["release"] == 2
        assert client.get("/thumbnail/p00001?release=1").headers["cache-control"] == "private, max-age=60"
        assert b"twotower_serve_release 2.0" in client.get("/metrics").body


def test_a_warm_server_has_its_text_tower(db):
    with serving(db) as client:
        assert not client.service.searcher.knows("warm")
        client.service.warm()
        assert client.service.searcher.knows("warm")


def test_answers_are_not_held_back():
    with listening("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # or asyncio would leave Nagle's algorithm on


def start(*arguments):
    command = [sys.executable, "-W", "error::DeprecationWarning", "-m", "jobs.serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    address = process.stdout.readline().strip()
    assert address, process.stderr.read()
    return process, Client(int(address.rstrip("/").rpartition(":")[2]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_all_is_answered(db, searcher, number):
    process, client = start("--db", db, "--no-warm")  # which asks a vector only, and so needs no model
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
    connection.request("GET", "/healthz")
    assert connection.getresponse().read()
    vector = searcher.encode(["red midi dress"])[0].tolist()
    body = json.dumps({"vector": vector, "mode": "text"}).encode()
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as half:
        head = (
            f"POST /search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        half.sendall(head.encode() + b"\r\n\r\n" + body[:5])
        time.sleep(0.3)
        process.send_signal(number)
        time.sleep(0.5)
        half.sendall(body[5:])
        answer = half.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"p00000" in answer
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err
    assert "stopped by a signal" in err


def test_what_it_refuses_to_start_with(db, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TWOTOWER_TOKEN", raising=False)
    (tmp_path / "short").write_text("secret\n")
    (tmp_path / "empty").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = [
            (["--db", db, "--port", port], f"cannot listen on 127.0.0.1:{port}: Address already in use"),
            (["--db", db, "--host", "0.0.0.0"], "requests have to bring a token"),
            (["--db", db, "--host", "192.0.2.1", "--token-file", str(tmp_path / "none")], "cannot be read"),
            (["--db", db, "--token-file", str(tmp_path / "short")], "16 or more"),
            (["--db", db, "--port", "0", "--release", "9"], "release 9"),
            (["--db", db, "--port", "0", "--timeout", "0"], "--timeout"),
            (["--db", db, "--port", "0", "--model", str(tmp_path)], "config.json"),
            (["--db", str(tmp_path / "empty"), "--port", "0"], "Nothing is released"),
            (["--db", "s3://no-such-bucket-here/x", "--port", "0"], "no-such-bucket-here"),
        ]
        for arguments, said in refused:
            assert main(arguments) == 2, arguments
            err = capsys.readouterr().err.strip()
            assert said in err
            assert len(err.splitlines()) == 1
    monkeypatch.setenv("TWOTOWER_TOKEN", "two words are no token")
    assert main(["--db", db, "--port", "0"]) == 2
    for port in ("-1", "70000", "x"):
        with pytest.raises(SystemExit, match="2"):
            main(["--db", db, "--port", port])


def test_a_missing_package_is_named(db, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pipeline.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["--db", db, "--port", "0"]) == 2
    assert "pip install 'twotower[serve]'" in capsys.readouterr().err
