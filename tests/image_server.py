"""A server on loopback that answers as badly as a test wants it to."""

from __future__ import annotations

import socket
import socketserver
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Route = Callable[[socket.socket], None]


class ImageServer(socketserver.ThreadingTCPServer):
    """Routes are called with the connection; `asked` counts requests by path, `peak` those in `busy` at once."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.routes: dict[str, Route] = {}
        self.asked: Counter[str] = Counter()
        self.heads: list[str] = []
        self.sent_bytes = 0
        self.running = self.peak = 0
        self.lock = threading.Lock()
        self.tls = tls
        self.port = int(self.server_address[1])

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http{'s' * bool(self.tls)}://{host}:{self.port}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what many tests are about."""


class _Handler(socketserver.BaseRequestHandler):
    server: ImageServer

    def handle(self) -> None:
        connection = self.request
        if self.server.tls is not None:
            connection = self.server.tls.wrap_socket(connection, server_side=True)
        head = b""
        while b"\r\n\r\n" not in head:
            part = connection.recv(4096)
            if not part:
                return
            head += part
        path = head.split()[1].decode()
        with self.server.lock:
            self.server.asked[path] += 1
            self.server.heads.append(head.decode())
        try:
            with suppress(OSError):
                self.server.routes.get(path.partition("?")[0], answer(b"", "404 Not Found"))(connection)
        finally:
            connection.close()


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[ImageServer]:
    """A server that runs for the block."""
    with ImageServer(tls) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def answer(body: bytes, status: str = "200 OK", *headers: str, length: int | None = None, pause_s: float = 0) -> Route:
    """A whole answer, or one that ends before the length it announces."""

    def route(connection: socket.socket) -> None:
        time.sleep(pause_s)
        lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", "")
        connection.sendall("\r\n".join(lines).encode() + body)

    return route


def busy(server: ImageServer, body: bytes, pause_s: float) -> Route:
    """A whole answer after a pause; who is in the pause has not been answered yet, and is counted."""

    def route(connection: socket.socket) -> None:
        with server.lock:
            server.running += 1
            server.peak = max(server.peak, server.running)
        time.sleep(pause_s)
        with server.lock:
            server.running -= 1
        answer(body)(connection)

    return route


def raw(data: bytes) -> Route:
    """These bytes and no more."""
    return lambda connection: connection.sendall(data)


def in_turn(*routes: Route) -> Route:
    """Another answer at each request; the last one for all that follow."""
    left = list(routes)
    return lambda connection: (left.pop(0) if len(left) > 1 else left[0])(connection)


def dripping(head: bytes, part: bytes, pause_s: float) -> Route:
    """A part now and then, for ever."""

    def route(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(part)
            time.sleep(pause_s)

    return route


def flood(server: ImageServer, head: bytes, part: bytes) -> Route:
    """As much as the client takes, up to 10 GB; the server counts it."""

    def route(connection: socket.socket) -> None:
        connection.sendall(head)
        while server.sent_bytes < 10_000_000_000:
            connection.sendall(part)
            server.sent_bytes += len(part)

    return route
