"""References to bytes: nothing outside the root is ever read, and nothing makes a fetch hang or crash."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from pathlib import Path
from typing import NoReturn

import fsspec
import fsspec.implementations.memory
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from image_server import answer, dripping, raw, serving
from small_catalog import Item, jpeg, table, write_products

from pipeline.catalog.fetch import Fetcher
from pipeline.config import FetchConfig, load_config
from pipeline.errors import ImageRejected, ReleaseRefused
from pipeline.records import ImageLimits, Reason
from pipeline.run.backfill import backfill

LIMITS = ImageLimits(max_bytes=100)
SECRET = b"SECRET"


def refusal(fetch: Callable[[str], bytes], reference: str) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        fetch(reference)
    return caught.value


def no_connection(address: str, port: int, timeout_s: float) -> NoReturn:
    pytest.fail(f"asked to connect to {address}:{port}")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, with secrets beside it and ways out of it."""
    folder = tmp_path_factory.mktemp("shop")
    root = folder / "catalog"
    (root / "img" / "deep").mkdir(parents=True)
    (folder / "catalog-private").mkdir()
    for secret in (folder / "secret", folder / "catalog-private" / "secret", folder / "secret.jpg"):
        secret.write_bytes(SECRET)
    for image in ("a.jpg", "img/a.jpg", "img/deep/a.jpg", "img/größe 1.jpg", "img/100%2e.jpg"):
        (root / image).write_bytes(b"inside")
    (root / "inner").symlink_to("img")
    (root / "img" / "inner.jpg").symlink_to(root / "a.jpg")
    (root / "link").symlink_to(folder / "secret")
    (root / "up").symlink_to("..")
    (root / "img" / "top").symlink_to("/")
    (root / "chain").symlink_to("up")
    (root / "loop").symlink_to("loop")
    (root / "big.jpg").write_bytes(b"x" * 101)
    os.mkfifo(root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener, chdir(root):  # a socket's path has to be short
        listener.bind("socket.jpg")
    return root


TRAVERSALS = (
    "../secret", "img/../../secret", "img/deep/../../../secret", "./../secret", "..", "../catalog-private/secret",
    "{folder}/secret", "/etc/passwd", "//etc/passwd", "~/secret", "~root/secret", "file:///etc/passwd",
    "file://{folder}/secret", "link", "up/secret", "up/secret.jpg", "chain/secret", "up/catalog-private/secret",
    "img/top/etc/passwd", "img/top{folder}/secret", "..\\secret", "img\\..\\..\\secret", "C:\\secret",
    "a.jpg\0../secret",
    "inner/../../secret", "up/up/up/etc/passwd", "/proc/self/root/etc/passwd", "img/top/proc/self/environ",
)  # fmt: skip


@pytest.mark.parametrize("reference", TRAVERSALS)
def test_a_way_out_of_the_root_is_refused(root: Path, reference: str) -> None:
    rejected = refusal(Fetcher(str(root), LIMITS).fetch, reference.format(folder=root.parent))
    assert rejected.reason == Reason.FETCH_REFUSED


@pytest.mark.parametrize("reference", ["%2e%2e/secret", "..%2fsecret", "．．/secret", "..;/secret", "..\u2215secret"])
def test_escapes_and_look_alikes_are_ordinary_names(root: Path, reference: str) -> None:
    assert refusal(Fetcher(str(root), LIMITS).fetch, reference).reason == Reason.IMAGE_NOT_FOUND


@pytest.mark.parametrize(
    "reference", ["ftp://shop.example/a.jpg", "gopher://x/", "data:image/png;base64,AA==", "javascript:x", "s3://b/a.jpg",
                  "FILE:///etc/passwd", "file:secret", "http+unix://x/", "jar:http://x", "x://", "fsspec+file:///etc/passwd"]
)  # fmt: skip
def test_other_schemes_are_refused(root: Path, reference: str) -> None:
    assert refusal(Fetcher(str(root), LIMITS).fetch, reference).reason == Reason.FETCH_REFUSED


def test_files_and_links_inside_are_read(root: Path) -> None:
    fetch = Fetcher(str(root), LIMITS).fetch
    inside = (
        "a.jpg",
        "img/a.jpg",
        "./img//deep/a.jpg",
        "inner/a.jpg",
        "img/inner.jpg",
        "img/größe 1.jpg",
        "img/100%2e.jpg",
    )
    assert [fetch(reference) for reference in inside] == [b"inside"] * len(inside)


@pytest.mark.parametrize(
    ("reference", "reason", "said"),
    [
        ("none.jpg", Reason.IMAGE_NOT_FOUND, "there is no file 'none.jpg' under the images' root"),
        ("img", Reason.IMAGE_NOT_FOUND, ""),
        (".", Reason.IMAGE_NOT_FOUND, ""),
        ("a.jpg/b.jpg", Reason.IMAGE_NOT_FOUND, ""),
        ("x" * 300, Reason.IMAGE_NOT_FOUND, "xxx..."),
        (" ", Reason.IMAGE_EMPTY, "blank"),
        ("big.jpg", Reason.IMAGE_TOO_LARGE_BYTES, "has 101 bytes; images.max_bytes is 100"),
        ("pipe.jpg", Reason.FETCH_REFUSED, "no file"),
        ("socket.jpg", Reason.FETCH_REFUSED, "cannot be read"),
        ("loop", Reason.FETCH_REFUSED, "cannot be read"),
        ("http://shop.example/a.jpg", Reason.FETCH_REFUSED, "set fetch.http=true and name its host"),
        ("HTTPS://shop.example/a.jpg", Reason.FETCH_REFUSED, "set fetch.http=true"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_has_a_reason(root: Path, reference: str, reason: Reason, said: str) -> None:
    rejected = refusal(Fetcher(str(root), LIMITS).fetch, reference)
    assert rejected.reason == reason
    assert said in rejected.detail


def test_a_file_without_an_honest_size_is_cut_at_the_cap() -> None:
    rejected = refusal(Fetcher("/proc/self", ImageLimits(max_bytes=10)).fetch, "status")  # its size is said to be 0
    assert rejected.reason == Reason.IMAGE_TOO_LARGE_BYTES
    assert "more than 10 bytes" in rejected.detail


def test_a_link_put_there_in_the_meantime_is_not_followed(tmp_path: Path) -> None:
    for folder, content in (("root/real", b"inside"), ("outside", SECRET)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jpg").write_bytes(content)
    place, real, link = (tmp_path / "root" / name for name in ("img", "real", "link"))
    link.symlink_to(tmp_path / "outside")
    is_over = threading.Event()

    def swap() -> None:
        while not is_over.is_set():
            for found in (real, link):
                found.rename(place)
                place.rename(found)

    swapper = threading.Thread(target=swap)
    swapper.start()
    fetch = Fetcher(str(tmp_path / "root"), LIMITS).fetch
    seen = set()
    end = time.monotonic() + 2
    try:
        while time.monotonic() < end:
            try:
                seen.add(fetch("img/a.jpg"))
            except ImageRejected as rejected:
                seen.add(rejected.reason)
    finally:
        is_over.set()
        swapper.join()
    assert SECRET not in seen
    assert seen >= {b"inside", Reason.FETCH_REFUSED}


NASTY = st.sampled_from(
    [*"/\\.~:%@#?&;\0\n \t*[]", "..", "../", "/..", "./", "//", "img", "up", "link", "top", "inner", "chain", "loop",
     "secret", "secret.jpg", "catalog-private", "a.jpg", "etc/passwd", "%2e%2e", "%2f", "%00", "．．", "file://", "http://",
     "https://", "shop.example", "127.0.0.1", "[::1]", "localhost", "s3://", "fsspec+memory://", "C:", "proc/self/root"]
)  # fmt: skip


@pytest.fixture(scope="module")
def fetchers(root: Path) -> list[Fetcher]:
    """With http off, and on with every name at 127.0.0.1."""
    config = FetchConfig(http=True, allow_hosts=("shop.example", "localhost", "127.0.0.1", "[::1]"), backoff_s=0)
    return [
        Fetcher(str(root), LIMITS, found, resolver=lambda *_: ["127.0.0.1"], connector=no_connection)
        for found in (FetchConfig(), config)
    ]


@settings(max_examples=500, deadline=None)
@given(st.lists(NASTY | st.text(max_size=3), max_size=9).map("".join))
@example("up/secret")
@example("http://localhost/../../secret")
def test_no_reference_reads_anything_outside(fetchers: list[Fetcher], reference: str) -> None:
    for fetcher in fetchers:
        with suppress(ImageRejected):
            assert fetcher.fetch(reference) == b"inside"


class Flaky(fsspec.implementations.memory.MemoryFileSystem):  # type: ignore[name-defined, misc]
    """An object store of fsspec's that fails as often as it is told."""

    protocol = "flaky"
    failures: list[Exception] = []  # noqa: RUF012
    opened = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://", 1))

    def _open(self, path: str, mode: str = "rb", **kwargs: object) -> object:
        Flaky.opened += 1
        if Flaky.failures:
            raise Flaky.failures.pop(0)
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def store() -> Iterator[str]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    files = fsspec.filesystem("memory")
    files.store.clear()
    for path, content in (("/shop/img/a.jpg", b"inside"), ("/shop/big.jpg", b"x" * 101), ("/secret", SECRET)):
        files.pipe(path, content)
    Flaky.failures, Flaky.opened = [], 0
    yield "fsspec+flaky://shop"
    files.store.clear()


QUICK = FetchConfig(backoff_s=0.01)


def test_an_object_store_is_read_under_its_prefix_only(store: str) -> None:
    fetch = Fetcher(store, LIMITS, QUICK).fetch
    assert fetch("img/a.jpg") == fetch(f"{store}/img/a.jpg") == b"inside"
    for reference in ("../secret", "fsspec+flaky:///secret", f"{store}/../secret", f"{store}//secret", "/secret",
                      f"{store}-private/secret", "fsspec+memory://shop/a.jpg", f"{store}/file:///secret"):  # fmt: skip
        assert refusal(fetch, reference).reason == Reason.FETCH_REFUSED, reference
    assert refusal(fetch, "img/none.jpg").reason == Reason.IMAGE_NOT_FOUND
    assert refusal(fetch, "img").reason == Reason.IMAGE_NOT_FOUND
    assert refusal(fetch, "big.jpg").reason == Reason.IMAGE_TOO_LARGE_BYTES


def test_an_object_store_is_asked_again_after_a_fault(store: str) -> None:
    fetch = Fetcher(store, LIMITS, QUICK).fetch
    Flaky.failures = [OSError("slow down"), RuntimeError("a store's own error")]
    assert fetch("img/a.jpg") == b"inside"
    assert Flaky.opened == 3
    Flaky.failures = [OSError("slow down")] * 4
    rejected = refusal(fetch, "img/a.jpg")
    assert (rejected.reason, Flaky.opened) == (Reason.FETCH_FAILED, 6)
    assert rejected.detail == "'img/a.jpg' cannot be read, attempt 3: slow down"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_catalog_of_references(tmp_path: Path, tiny_model: str) -> None:
    schema = pa.schema([("product_id", pa.string()), ("title", pa.string()), ("images", pa.list_(pa.string()))])
    images = tmp_path / "catalog" / "img"
    images.mkdir(parents=True)
    (images / "good.jpg").write_bytes(jpeg(1))
    (images / "big.jpg").write_bytes(jpeg(2) + b"\0" * 50_000)
    (images / "words.jpg").write_bytes(b"no image at all, whatever its name says")
    (tmp_path / "secret.jpg").write_bytes(jpeg(3))
    (images / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    with serving() as server:
        photo = jpeg(4)
        length = f"HTTP/1.1 200 OK\r\nContent-Length: {len(photo)}\r\n\r\n".encode()
        server.routes |= {
            "/good.html": answer(photo, "200 OK", "Content-Type: text/html"),
            "/moved": answer(b"", "302 Found", "Location: /good.html"),
            "/page.jpg": answer(b"<html>not here</html>", "200 OK", "Content-Type: image/jpeg"),
            "/cut.jpg": raw(length + photo[: len(photo) // 2]),
            "/drip.jpg": dripping(length, b"x", 0.05),
            "/down.jpg": answer(b"", "503 Service Unavailable"),
            "/huge.jpg": answer(b"", "200 OK", length=10_000_000_000),
            "/trap.jpg": answer(b"", "302 Found", "Location: http://169.254.169.254/latest/meta-data/"),
        }
        bad = {
            "../secret.jpg": "fetch_refused",
            "img/out.jpg": "fetch_refused",
            "file:///etc/passwd": "fetch_refused",
            "http://elsewhere.example/a.jpg": "fetch_refused",
            server.url("/trap.jpg"): "fetch_refused",
            "img/none.jpg": "image_not_found",
            server.url("/none.jpg"): "image_not_found",
            "img/big.jpg": "image_too_large_bytes",
            server.url("/huge.jpg"): "image_too_large_bytes",
            server.url("/cut.jpg"): "fetch_failed",
            server.url("/drip.jpg"): "fetch_failed",
            server.url("/down.jpg"): "fetch_failed",
            server.url("/page.jpg"): "image_not_an_image",
            "img/words.jpg": "image_not_an_image",
            "": "image_empty",
        }
        good = ["img/good.jpg", server.url("/good.html"), server.url("/moved")]
        items = [Item("good", "good", images=good), Item("bad", "bad", images=[*bad, None])]
        catalog = write_products(tmp_path / "catalog", [items], schema)

        def run(*sets: str) -> dict[str, object]:
            wanted = [
                "pool.gpus_per_actor=0",
                "images.max_bytes=40000",
                "fetch.timeout_s=3",
                "fetch.backoff_s=0.01",
                *sets,
            ]
            given = {"catalog_uri": str(catalog), "db": str(tmp_path / "db"), "model_name": tiny_model}
            return backfill(load_config(None, wanted, **given))

        with pytest.raises(ReleaseRefused):  # http is off, so the good URLs are refused too
            run("max_reject_share=0.77")
        assert not server.asked
        hosts = f"fetch.allow_hosts=['127.0.0.1:{server.port}','169.254.169.254']"
        run("max_reject_share=0.77", "fetch.http=true", hosts, "fetch.allow_private_hosts=['127.0.0.1']")
        assert server.asked["/cut.jpg"] == server.asked["/drip.jpg"] == server.asked["/down.jpg"] == 3
    found = table(tmp_path / "db", "rejects").to_pylist()
    names = dict(zip(bad, (f"image/{i}" for i in range(len(bad))), strict=True))
    expected = {names[reference]: reason for reference, reason in bad.items()} | {f"image/{len(bad)}": "image_null"}
    assert {row["input"]: row["reason"] for row in found} == expected
    embedded = table(tmp_path / "db", "images").to_pylist()
    assert [row["image_id"] for row in embedded] == ["good/0", "good/1", "good/2"]
    assert embedded[1]["sha256"] == embedded[2]["sha256"] != embedded[0]["sha256"]
