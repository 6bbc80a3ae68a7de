"""A server as the tests ask it: a small catalog in the demo model's vectors, and requests over a real socket."""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
from query_tables import facts, jpeg, make_db, release

from pipeline.model import load_model
from pipeline.query import Searcher
from pipeline.serve.app import application
from pipeline.serve.guard import LOOPBACK_NAMES, Limits
from pipeline.serve.listen import Server, listening
from pipeline.serve.metrics import Metrics
from pipeline.serve.service import Service
from pipeline.store.indices import build_indices

COLOURS = {
    "red": (190, 30, 40), "blue": (40, 60, 180), "green": (40, 130, 60), "yellow": (230, 200, 60),
    "black": (25, 25, 25), "white": (240, 240, 240), "pink": (240, 140, 180), "grey": (128, 128, 128),
}  # fmt: skip
GARMENTS = {"midi dress": "dresses", "denim jacket": "jackets", "pleated skirt": "skirts", "wide-leg pants": "pants",
            "striped shirt": "tops", "wool coat": "jackets"}  # fmt: skip


def catalog(folder: Path, *, titles: Mapping[int, str] | None = None, ids: Mapping[int, str] | None = None) -> str:
    """48 products: each colour of each garment; two of them without a picture.

    Args:
        folder: where the database is written.
        titles: of some products, in place of their own; searched as what they were.
        ids: likewise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(colour, garment) for garment in GARMENTS for colour in COLOURS]
    texts = [f"{colour} {garment}" for colour, garment in pairs]
    count = len(pairs)
    model_id, text, image = _embedded(tuple(texts))
    plain = facts(count)
    plain |= {
        "product_id": [(ids or {}).get(i, f"p{i:05d}") for i in range(count)],
        "title": [(titles or {}).get(i, text.capitalize()) for i, text in enumerate(texts)],
        "description": [(titles or {}).get(i, f"A {text} for every day.") for i, text in enumerate(texts)],
        "broad_category": [GARMENTS[garment] for _, garment in pairs],
        "fine_category": [garment for _, garment in pairs],
        "price": [10.0 + 2.5 * i for i in range(count)],
    }
    has_image = np.ones(count, bool)
    has_image[[5, 17]] = False
    db = make_db(folder, text=text, image=image, has_image=has_image, columns=plain)
    release(db, index=build_indices(db, min_rows=1000), model_id=model_id)
    return db


@cache
def _embedded(texts: tuple[str, ...]) -> tuple[str, Any, Any]:
    """The model's id and its vectors; pictures have another shape for each garment, so that no two are one."""
    model = load_model("demo")
    pictures = [jpeg(list(COLOURS.values())[i % 8], (60 + 20 * (i // 8), 120)) for i in range(len(texts))]
    return model.model_id, model.embed_texts(list(texts)), model.embed_images(pictures)


@dataclass
class Reply:
    """An answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, strictly read."""
        return json.loads(self.body, parse_constant=_no_constant)

    @property
    def error(self) -> str:
        """The sentence; it is one, and no traceback."""
        said = self.json
        assert list(said) == ["error"]
        sentence = said["error"]
        assert sentence
        assert "Traceback" not in sentence
        assert "\n" not in sentence
        return str(sentence)

    @property
    def ids(self) -> list[str]:
        """Of the hits."""
        assert self.status == 200, self.body
        return [hit["product_id"] for hit in self.json["hits"]]


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@dataclass
class Client:
    """Asks a server."""

    port: int
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.port}/"

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout: float = 20
    ) -> Reply:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {**self.headers, **(headers or {})})
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None, **parameters: Any) -> Reply:
        """GET with a query string."""
        given = {name: value for name, value in parameters.items() if value is not None}
        given = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in given.items()}
        return self.ask("GET", f"{path}?{urlencode(given, doseq=True)}" if given else path, headers=headers)

    def post(self, document: Any, **options: Any) -> Reply:
        """POST /search with JSON, or with a text that should be JSON."""
        body = document if isinstance(document, str | bytes) else json.dumps(document)
        return self.ask("POST", "/search", body, {"content-type": "application/json"}, **options)

    def similar(self, product_id: str, **parameters: Any) -> Reply:
        """GET /similar."""
        return self.get("/similar/" + quote(product_id, safe=""), **parameters)


@dataclass
class Served(Client):
    """A server in a thread of this process, whose parts can be reached."""

    service: Service | None = None


@contextmanager
def serving(
    db: str,
    *,
    limits: Limits | None = None,
    token: str = "",
    refresh_s: float = 0,
    threads: int = 4,
    waiting: int = 64,
    is_local: bool = True,
) -> Iterator[Served]:
    """Serve a database while the block runs."""
    service = Service(Searcher.open(db), Metrics(), threads=threads, waiting=waiting)
    app = application(
        service, limits=limits or Limits(), token=token, hosts=LOOPBACK_NAMES if is_local else (), refresh_s=refresh_s
    )
    listener = listening("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = Server(app, ends_within_s=5)
    thread = threading.Thread(target=server.run, args=(listener,))
    thread.start()
    try:
        yield Served(port, service=service)
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()
        assert service.close(within_s=30)


def environment() -> dict[str, str]:
    """Of a server process: without a token of whoever runs the tests."""
    return {name: value for name, value in os.environ.items() if name != "TWOTOWER_TOKEN"}
