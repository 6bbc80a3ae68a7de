"""Images over http(s): what may not be asked is refused before a socket is opened; what goes wrong ends in time."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import format_datetime
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_server import ImageServer, answer, busy, dripping, flood, in_turn, raw, serving

from pipeline.catalog.fetch import Fetcher
from pipeline.catalog.fetch_wire import system_connector
from pipeline.config import FetchConfig
from pipeline.errors import ImageRejected
from pipeline.hosts import address_fault
from pipeline.records import ImageLimits, Reason

LIMITS = ImageLimits(max_bytes=100_000)
BODY = bytes(range(256)) * 4
PUBLIC = "93.184.215.14"
NAMES = ("good.example", "evil.example", "mixed.example", "inner.example", "v6.example", "*.cdn.example")
LITERALS = ("127.0.0.1", "[::1]", "169.254.169.254", "10.0.0.1", "192.168.1.1", "172.16.0.1", "0.0.0.0", "[::]",
            "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1]",
            "[fd00::1]", "[2001:0:7f00:1::1]", "100.64.0.1", "224.0.0.1", "[::127.0.0.1]")  # fmt: skip
ZONE = {
    "good.example": [PUBLIC],
    "evil.example": ["127.0.0.1"],
    "mixed.example": [PUBLIC, "10.0.0.1"],
    "inner.example": ["::1"],
    "v6.example": ["2606:4700::1111", "::ffff:169.254.169.254"],
    "a.cdn.example": ["169.254.169.254"],
}


def no_connection(address: str, port: int, timeout_s: float) -> NoReturn:
    pytest.fail(f"asked to connect to {address}:{port}")


def refusal(fetch: Callable[[str], bytes], url: str) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        fetch(url)
    return caught.value


def guarded(resolver: Callable[[str, int], Sequence[str]] = lambda host, _: ZONE[host]) -> Fetcher:
    """A fetcher for which every name and literal is on the list, and which must not connect."""
    config = FetchConfig(http=True, allow_hosts=NAMES + LITERALS, backoff_s=0)
    return Fetcher("/nowhere", LIMITS, config, resolver=resolver, connector=no_connection)


@pytest.mark.parametrize(
    "url",
    [f"http://{literal}/a.jpg" for literal in LITERALS]
    + [f"https://{name}/a.jpg" for name in ZONE if name != "good.example"]
    + ["http://EVIL.example/", "http://evil.example:443/", "http://evil.example?x", "http://evil.example#x"],
)
def test_the_address_decides_though_the_host_is_allowed(url: str) -> None:
    rejected = refusal(guarded().fetch, url)
    assert rejected.reason == Reason.FETCH_REFUSED
    assert " is at " in rejected.detail


@pytest.mark.parametrize(
    "url",
    ["http://2130706433/", "http://0177.0.0.1/", "http://0x7f.1/", "http://0x7f000001/", "http://127.1/", "http://127.0.1/",
     "http://127.0.0.1./", "http://good.example./", "http://good.example@127.0.0.1/", "http://127.0.0.1@good.example/",
     "http://good.example:80@127.0.0.1/", "http://good.example\\@127.0.0.1/", "http://good.example%00.evil.example/",
     "http://127%2e0%2e0%2e1/", "http://%6cocalhost/", "http://１２７.0.0.1/", "http://127。0。0。1/", "http://ⓛocalhost/",
     "http://bücher.example/", "http://[::1%25lo]/", "http://[::1/", "http://::1/", "http://", "http:///a", "http://:80/",
     "http://good.example:99999/", "http://good.example:/", "http://good.example /", "http://good.example\t/",
     "http://good.example/\r\nHost: evil.example", "http://good.example/\n", "http://good.example/\x00", "http://a..b/"],
)  # fmt: skip
def test_a_host_that_is_not_written_plainly(url: str) -> None:
    assert refusal(guarded().fetch, url).reason == Reason.FETCH_REFUSED


@pytest.mark.parametrize(
    "url",
    ["http://a.example/", "http://good.example.evil.example/", "http://xgood.example/", "http://cdn.example/",
     "http://good.example:22/", "http://good.example:6379/", "http://localhost/", "http://metadata.google.internal/"],
)  # fmt: skip
def test_a_host_or_port_that_is_not_on_the_list_is_not_even_looked_up(url: str) -> None:
    def resolver(host: str, port: int) -> NoReturn:
        pytest.fail(f"asked for {host}")

    rejected = refusal(guarded(resolver).fetch, url)
    assert (rejected.reason, "is not in fetch.allow_hosts" in rejected.detail) == (Reason.FETCH_REFUSED, True)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "FILE://127.0.0.1/etc/passwd", "ftp://good.example/", "gopher://good.example/",
            "data:text/plain,x", "//good.example/", "http:good.example", "http:/good.example", "https:evil.example"]
)  # fmt: skip
def test_other_schemes_and_half_urls_are_refused(url: str) -> None:
    assert refusal(guarded().fetch, url).reason == Reason.FETCH_REFUSED


@pytest.fixture(scope="module")
def loopback() -> Fetcher:
    """Every name is at 127.0.0.1."""
    return guarded(lambda *_: ["127.0.0.1"])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([*"/@:.%#?[]\\", "http://", "https://", "127.0.0.1", "evil.example", "good", "::1",
                         "localhost", "0x7f", "2130706433", ":80", "%2e", "。", "a.jpg"]) | st.text(max_size=2),
        max_size=8,
    ).map("".join)
)  # fmt: skip
def test_no_url_leads_to_an_address_that_is_not_public(loopback: Fetcher, url: str) -> None:
    for reference in (url, f"http://{url}"):
        refusal(loopback.fetch, reference)


def test_an_answer_of_the_name_service_that_changes() -> None:
    answers = [[PUBLIC], ["127.0.0.1"], [PUBLIC]]
    asked: list[str] = []

    def connector(address: str, port: int, timeout_s: float) -> NoReturn:
        asked.append(address)
        raise ConnectionRefusedError("nobody there")

    config = FetchConfig(http=True, allow_hosts=("good.example",), backoff_s=0)
    fetcher = Fetcher("/nowhere", LIMITS, config, resolver=lambda *_: answers.pop(0), connector=connector)
    assert refusal(fetcher.fetch, "http://good.example/a.jpg").reason == Reason.FETCH_REFUSED
    assert asked == [PUBLIC], "only the very address that was looked at"
    assert len(answers) == 1, "the second attempt ended it"


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with serving() as server:
        server.routes["/ok"] = answer(BODY)
        yield server


def reader(server: ImageServer, **changed: object) -> Fetcher:
    """A fetcher that may ask the server, by its address and two names."""
    hosts = tuple(f"{host}:{server.port}" for host in ("127.0.0.1", "img.example", "other.example"))
    limits = {"timeout_s": 10.0, "backoff_s": 0.01} | changed
    config = FetchConfig(http=True, allow_hosts=(*hosts, "169.254.169.254", "evil.example"),
                         allow_private_hosts=("127.0.0.1", "img.example", "other.example"), **limits)  # fmt: skip

    def connector(address: str, port: int, timeout_s: float) -> socket.socket:
        assert (address, port) == ("127.0.0.1", server.port), "nothing leaves the machine"
        return system_connector(address, port, timeout_s)

    return Fetcher("/nowhere", LIMITS, config, resolver=lambda *_: ["127.0.0.1"], connector=connector)


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
        b"%x\r\n%s\r\n" % (len(part), part) for part in parts
    ) + end  # fmt: skip


def test_whole_answers(server: ImageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.routes |= {
        "/chunked": raw(chunked(BODY[:100], BODY[100:])),
        "/to-the-end": raw(b"HTTP/1.0 200 OK\r\n\r\n" + BODY),
        "/wrong-type": answer(BODY, "200 OK", "Content-Type: text/html", "Content-Encoding: identity"),
        "/empty": answer(b""),
        "/gr%C3%B6%C3%9Fe%201.jpg": answer(BODY),
    }
    fetch = reader(server).fetch
    for path in ("/ok", "/chunked", "/to-the-end", "/wrong-type", "/größe 1.jpg", "/ok#top", "/ok?size=2&x=%20"):
        assert fetch(server.url(path)) == BODY, path
    assert fetch(server.url("/ok", "IMG.example")) == BODY
    assert fetch(server.url("/empty")) == b""
    assert server.heads[0] == (
        f"GET /ok HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUser-Agent: twotower\r\nAccept: */*\r\n"
        "Accept-Encoding: identity\r\nConnection: close\r\n\r\n"
    )
    assert server.asked["/ok?size=2&x=%20"] == 1


@pytest.mark.parametrize(
    ("location", "reason", "said"),
    [
        ("http://169.254.169.254/latest/meta-data/", Reason.FETCH_REFUSED, "at 169.254.169.254, a link-local"),
        ("//169.254.169.254/", Reason.FETCH_REFUSED, "link-local"),
        ("http://evil.example/", Reason.FETCH_REFUSED, "is at 127.0.0.1, a private or loopback address"),
        ("http://localhost/", Reason.FETCH_REFUSED, "not in fetch.allow_hosts"),
        ("http://127.0.0.1:22/", Reason.FETCH_REFUSED, "not in fetch.allow_hosts"),
        ("http://2130706433/", Reason.FETCH_REFUSED, "no plain http(s) URL"),
        ("http://good@127.0.0.1/", Reason.FETCH_REFUSED, "no plain http(s) URL"),
        ("http://[::1", Reason.FETCH_REFUSED, "no plain http(s) URL"),
        ("file:///etc/passwd", Reason.FETCH_REFUSED, "no plain http(s) URL"),
        ("gopher://127.0.0.1/", Reason.FETCH_REFUSED, "no plain http(s) URL"),
        ("/loop", Reason.FETCH_FAILED, "redirects more than 3 times"),
        ("/gone", Reason.IMAGE_NOT_FOUND, "answered 410"),
    ],
)  # fmt: skip
def test_a_redirect_is_checked_as_the_first_url(server: ImageServer, location: str, reason: Reason, said: str) -> None:
    server.routes |= {
        "/start": answer(b"", "302 Found", f"Location: {location}"),
        "/loop": answer(b"", "307 Temporary Redirect", "Location: /loop"),
        "/gone": answer(b"", "410 Gone"),
    }
    rejected = refusal(reader(server).fetch, server.url("/start"))
    assert rejected.reason == reason
    assert said in rejected.detail
    assert server.asked.total() == {"/loop": 4, "/gone": 2}.get(location, 1), "and no second attempt"


def test_redirects_that_are_followed(server: ImageServer) -> None:
    server.routes |= {
        "/a": answer(b"", "301 Moved Permanently", "Location: b/c?x=1"),
        "/b/c": answer(b"", "308 Permanent Redirect", f"Location: http://img.example:{server.port}/größe"),
        "/gr%C3%B6%C3%9Fe": answer(b"", "303 See Other", f"Location: //other.example:{server.port}/ok"),
    }
    assert reader(server).fetch(server.url("/a")) == BODY
    assert list(server.asked) == ["/a", "/b/c?x=1", "/gr%C3%B6%C3%9Fe", "/ok"]
    assert f"Host: other.example:{server.port}\r\n" in server.heads[-1]


@pytest.mark.parametrize("status", [201, 400, 401, 403, 418, 204, 206, 304, 302])
def test_an_answer_that_another_attempt_would_not_change(server: ImageServer, status: int) -> None:
    server.routes["/x"] = answer(b"", f"{status} Whatever")
    rejected = refusal(reader(server).fetch, server.url("/x"))
    assert (rejected.reason, server.asked["/x"]) == (Reason.FETCH_FAILED, 1)
    assert f"the server answered {status}" in rejected.detail


def test_faults_that_pass(server: ImageServer) -> None:
    server.routes |= {
        "/503": in_turn(answer(b"", "503 Service Unavailable"), answer(BODY)),
        "/reset": in_turn(raw(b""), answer(BODY)),
        "/nonsense": in_turn(
            raw(b"SSH-2.0-OpenSSH\r\n"), raw(b"HTTP/1.1 200 OK\r\nX"), raw(b"HTTP/1.1 2"), answer(BODY)
        ),
        "/lengths": in_turn(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9, 9\r\n\r\nhalf"), answer(BODY)),
        "/cut": in_turn(answer(BODY[:500], length=len(BODY)), answer(BODY)),
        "/cut-chunk": in_turn(raw(chunked(BODY, end=b"")), raw(chunked(BODY[:9], end=b"ff\r\nhalf")), answer(BODY)),
    }
    fetch = reader(server, max_attempts=4).fetch
    for path, asked in (
        ("/503", 2),
        ("/reset", 2),
        ("/nonsense", 4),
        ("/lengths", 2),
        ("/cut", 2),
        ("/cut-chunk", 3),
    ):
        assert fetch(server.url(path)) == BODY
        assert server.asked[path] == asked


def test_a_slow_answer_is_given_up_and_asked_for_again(server: ImageServer) -> None:
    server.routes["/slow"] = in_turn(answer(BODY, pause_s=8), answer(BODY))
    assert reader(server, timeout_s=2.0).fetch(server.url("/slow")) == BODY
    assert server.asked["/slow"] == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [("cut", "was cut 524 bytes before its end"), ("chunk", "IncompleteRead"), ("drip", "time"), ("head", "time"),
     ("down", "answered 500"), ("silent", "time"), ("negative", "")],
)  # fmt: skip
def test_faults_that_stay_end_in_time(server: ImageServer, name: str, said: str) -> None:
    server.routes |= {
        "/cut": answer(BODY[:500], length=len(BODY)),
        "/chunk": raw(chunked(BODY, end=b"400\r\nhalf")),
        "/drip": dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x", 0.02),
        "/head": dripping(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.05),
        "/down": answer(BODY, "500 Oh"),
        "/silent": answer(BODY, pause_s=3),
        "/negative": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n" + BODY),
    }
    timeout_s = 1.0 if said == "time" else 10.0
    begun = time.monotonic()
    rejected = refusal(reader(server, timeout_s=timeout_s).fetch, server.url(f"/{name}"))
    assert time.monotonic() - begun < 9, "three attempts and two pauses"
    assert (rejected.reason, server.asked[f"/{name}"]) == (Reason.FETCH_FAILED, 3)
    assert said in rejected.detail
    assert "attempt 3" in rejected.detail


def test_nobody_there(server: ImageServer) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        config = FetchConfig(
            http=True, allow_hosts=(f"127.0.0.1:{port}",), allow_private_hosts=("127.0.0.1",), backoff_s=0
        )
        rejected = refusal(Fetcher("/nowhere", LIMITS, config).fetch, f"http://127.0.0.1:{port}/")
    assert rejected.reason == Reason.FETCH_FAILED
    assert "Connection refused" in rejected.detail


def test_a_name_service_that_does_not_answer() -> None:
    config = FetchConfig(http=True, allow_hosts=("good.example",), connect_timeout_s=0.2, max_attempts=2, backoff_s=0)

    def resolver(host: str, port: int) -> list[str]:
        time.sleep(2)
        return [PUBLIC]

    begun = time.monotonic()
    fetcher = Fetcher("/nowhere", LIMITS, config, resolver=resolver, connector=no_connection)
    assert refusal(fetcher.fetch, "http://good.example/").reason == Reason.FETCH_FAILED
    assert time.monotonic() - begun < 1.5


@pytest.mark.parametrize("kind", ["announced", "silent about it", "chunked", "chunk without end"])
def test_ten_gigabytes_are_cut_off_at_the_cap(server: ImageServer, kind: str) -> None:
    part = b"x" * 65536
    head, part = {
        "announced": (b"Content-Length: 10000000000\r\n\r\n", part),
        "silent about it": (b"\r\n", part),
        "chunked": (b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + part + b"\r\n"),
        "chunk without end": (b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", part),  # which http.client reads whole
    }[kind]
    server.routes["/huge"] = flood(server, b"HTTP/1.1 200 OK\r\n" + head, part)
    rejected = refusal(reader(server, timeout_s=5.0).fetch, server.url("/huge"))
    assert (rejected.reason, server.asked["/huge"]) == (Reason.IMAGE_TOO_LARGE_BYTES, 1)
    assert server.sent_bytes < 20_000_000, "the cap, and what lies in the sockets' buffers"


@pytest.mark.parametrize(
    "header", ["Content-Encoding: gzip", "Content-Encoding: br", "Transfer-Encoding: gzip, chunked"]
)
def test_a_compressed_answer_is_refused(server: ImageServer, header: str) -> None:
    server.routes["/bomb"] = answer(BODY, "200 OK", header)
    rejected = refusal(reader(server).fetch, server.url("/bomb"))
    assert (rejected.reason, server.asked["/bomb"]) == (Reason.FETCH_REFUSED, 1)


def test_retry_after_is_waited_for_within_the_time_limit(server: ImageServer) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    busy = "429 Too Many Requests"
    server.routes |= {
        "/soon": in_turn(answer(b"", busy, "Retry-After: 1"), answer(BODY)),
        "/later": answer(b"", busy, "Retry-After: 3600"),
        "/date": answer(b"", "503 Service Unavailable", f"Retry-After: {format_datetime(soon, usegmt=True)}"),
        "/nonsense": in_turn(answer(b"", busy, "Retry-After: soon, 99"), answer(BODY)),
    }
    fetch = reader(server, timeout_s=5.0).fetch
    begun = time.monotonic()
    assert fetch(server.url("/soon")) == BODY
    assert time.monotonic() - begun >= 1.0
    begun = time.monotonic()
    for path in ("/later", "/date"):
        assert refusal(fetch, server.url(path)).reason == Reason.FETCH_FAILED
        assert server.asked[path] == 1
    assert fetch(server.url("/nonsense")) == BODY
    assert time.monotonic() - begun < 9, "none of them is waited for"


def test_requests_to_one_host_are_bounded(server: ImageServer) -> None:
    server.routes["/busy"] = busy(server, BODY, 0.2)
    fetch = reader(server, per_host=3, timeout_s=10.0).fetch
    with ThreadPoolExecutor(12) as threads:
        assert set(threads.map(fetch, [server.url("/busy")] * 18)) == {BODY}
        assert server.peak == 3
        urls = [server.url("/busy", host) for host in ("127.0.0.1", "img.example", "other.example")] * 6
        assert set(threads.map(fetch, urls)) == {BODY}
    assert 3 < server.peak <= 9, "three for each of three hosts"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of img.example, and its key, in one file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "img.example")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("img.example"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(private + made.public_bytes(pem))
    return path


def test_tls_is_checked(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving(context) as server:
        server.routes |= {
            "/ok": answer(BODY),
            "/to-the-end": raw(b"HTTP/1.0 200 OK\r\n\r\n" + BODY),
            "/down": answer(b"", "302 Found", f"Location: http://img.example:{server.port}/ok"),
        }
        rejected = refusal(reader(server).fetch, server.url("/ok", "img.example"))
        assert rejected.reason == Reason.FETCH_REFUSED
        assert "certificate is not img.example's: self-signed certificate" in rejected.detail
        assert not server.asked

        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        fetch = reader(server).fetch
        assert fetch(server.url("/ok", "img.example")) == fetch(server.url("/ok")) == BODY
        asked = server.asked.total()
        assert refusal(fetch, server.url("/ok", "other.example")).reason == Reason.FETCH_REFUSED
        assert server.asked.total() == asked, "another name's certificate"
        rejected = refusal(fetch, server.url("/down", "img.example"))
        assert (rejected.reason, "from https to" in rejected.detail) == (Reason.FETCH_REFUSED, True)
        # The end of an answer without a length is the end of TLS; a bare end of the connection may be a cut.
        assert refusal(fetch, server.url("/to-the-end")).reason == Reason.FETCH_FAILED


def test_the_machines_own_resolver_is_vetted_too() -> None:
    config = FetchConfig(http=True, allow_hosts=("localhost",), backoff_s=0)
    rejected = refusal(Fetcher("/nowhere", LIMITS, config, connector=no_connection).fetch, "http://localhost/")
    assert rejected.reason == Reason.FETCH_REFUSED
    assert address_fault("127.0.0.1") in rejected.detail
