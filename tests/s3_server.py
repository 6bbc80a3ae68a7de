"""A real S3 API on loopback, served by moto in a process of its own, and a proxy before it that fails on purpose."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from pipeline.paths import resolve

_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_INTERNAL = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>Please try again.</Message></Error>"
_HOP_BY_HOP = ("connection", "transfer-encoding", "keep-alive")


@dataclass(frozen=True)
class Faults:
    """Which requests meet with what; 0 is never. A request meets one fault at most, the first that is its turn.

    Attributes:
        throttle_every: 503 SlowDown in place of an answer; nothing is done.
        drop_every: the connection is reset before the request reaches the store; nothing is done.
        lose_every: the request is done, and its answer never comes: the connection is reset.
        error_every: the request is done, and the answer says 500.
        cut_every: the answer's body breaks off in the middle.
        delay_every: the answer comes `delay_s` late.
        on: a pattern; only requests in whose `METHOD path` it is found.
    """

    throttle_every: int = 0
    drop_every: int = 0
    lose_every: int = 0
    error_every: int = 0
    cut_every: int = 0
    delay_every: int = 0
    delay_s: float = 2.0
    on: str = ""


class S3Server:
    """The server and the proxy, through which everything goes.

    Attributes:
        faults: what the proxy does; may be changed at any time.
        met: how many requests met which fault, and `passed`.
        log: what went through the proxy, as `METHOD path fault`.
    """

    def __init__(self, port: int, proxy_port: int) -> None:
        self.faults = Faults()
        self.met: Counter[str] = Counter()
        self.log: list[str] = []
        self._port = port
        self._count = 0
        self._lock = threading.Lock()
        server = self

        class Handler(_Handler):
            s3 = server

        self._proxy = _Proxy(("127.0.0.1", proxy_port), Handler)
        threading.Thread(target=self._proxy.serve_forever, daemon=True, name="s3 proxy").start()

    def make_bucket(self, name: str) -> None:
        """A new bucket."""
        assert self.forward("PUT", f"/{name}", {}, b"")[0] == 200

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Every object under a prefix, as the store itself knows them."""
        path = f"/{bucket}?list-type=2&max-keys=10000&prefix={urllib.parse.quote(prefix)}"
        _, _, listing = self.forward("GET", path, {}, b"")
        return re.findall(r"<Key>(.*?)</Key>", listing.decode())

    @contextmanager
    def failing(self, faults: Faults) -> Iterator[Counter[str]]:
        """The proxy fails so within the block; gives the counts of what was met in it."""
        self.met.clear()
        self._count, self.faults = 0, faults
        try:
            yield self.met
        finally:
            self.faults = Faults()

    def fault_for(self, request: str) -> str:
        """Which fault the next request meets; empty for none."""
        faults = self.faults
        with self._lock:
            fault = ""
            if re.search(faults.on, request):
                self._count += 1
                for name in ("throttle", "drop", "lose", "error", "cut", "delay"):
                    every = getattr(faults, f"{name}_every")
                    if every and self._count % every == 0:
                        fault = name
                        break
            self.met[fault or "passed"] += 1
            self.log.append(f"{request} {fault}".strip())
        return fault

    def forward(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Any:
        """The store's own answer: status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def close(self) -> None:
        """End the proxy."""
        self._proxy.shutdown()
        self._proxy.server_close()


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what many tests are about."""


class _Handler(BaseHTTPRequestHandler):
    """One connection to the proxy."""

    s3: S3Server
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        with suppress(ConnectionError):
            super().handle_one_request()

    def _relay(self) -> None:
        body = self._body()
        fault = self.s3.fault_for(f"{self.command} {self.path}")
        if fault == "throttle":
            self._answer(503, [("Content-Type", "application/xml")], _SLOW_DOWN)
            return
        if fault == "drop":
            self._reset()
            return
        status, headers, content = self.s3.forward(self.command, self.path, self.headers, body)
        if fault == "lose":
            self._reset()
            return
        if fault == "error":
            self._answer(500, [("Content-Type", "application/xml")], _INTERNAL)
            return
        if fault == "delay":
            time.sleep(self.s3.faults.delay_s)
        self._answer(status, headers, content, is_cut=fault == "cut" and len(content) > 1)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _relay  # noqa: N815

    def _body(self) -> bytes:
        if "100-continue" in self.headers.get("Expect", ""):
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        del self.headers["Transfer-Encoding"]
        self.headers["Content-Length"] = str(sum(map(len, parts)))
        return b"".join(parts)

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, is_cut: bool = False) -> None:
        self.send_response_only(status)
        is_sized = False
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
                is_sized = is_sized or name.lower() == "content-length"
        if not is_sized:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if is_cut else content)
        if is_cut:
            self._reset()

    def _reset(self) -> None:
        """End the connection as a dying peer does, without a goodbye."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return


def upload(folder: Path, uri: str) -> None:
    """Put a local folder under a prefix."""
    filesystem, inside = resolve(uri)
    pafs.copy_files(str(folder), inside, destination_filesystem=filesystem)


@contextmanager
def s3_server(port: int) -> Iterator[S3Server]:
    """moto's server in a process of its own, with the proxy before it.

    Args:
        port: of the proxy, on loopback.
    """
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "moto's server did not start"
        server = S3Server(int(line), port)
        try:
            yield server
        finally:
            server.close()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _serve() -> None:
    """What the process of its own runs: prints the port, and serves until it is killed."""
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve()
