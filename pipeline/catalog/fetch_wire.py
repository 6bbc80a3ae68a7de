"""Sockets and streams under limits: addresses found, connections opened, bytes read up to a number and a deadline."""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Callable, Sequence

from pipeline.errors import ImageRejected
from pipeline.records import Reason

Resolver = Callable[[str, int], Sequence[str]]
"""Host name and port to IP addresses."""
Connector = Callable[[str, int, float], socket.socket]
"""IP address, port and seconds to a connected socket."""

_READ_BYTES = 1 << 18
_BUFFER_BYTES = 1 << 16


class Wire(io.RawIOBase):
    """A socket that ends at a deadline, however slowly bytes drip, and at a number of bytes, whatever frames them."""

    def __init__(self, connection: socket.socket, deadline: float, max_bytes: int) -> None:
        self._connection = connection
        self._deadline = deadline
        self._left_bytes = max_bytes

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `http.client` asks a socket for."""
        return io.BufferedReader(self, _BUFFER_BYTES)

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Bytes as they come."""
        self._connection.settimeout(left_s(self._deadline))
        got = self._connection.recv_into(buffer)
        self._left_bytes -= got
        if self._left_bytes < 0:
            raise ImageRejected(Reason.IMAGE_TOO_LARGE_BYTES, "the answer and what frames it have no end")
        return got

    def send(self, text: str) -> None:
        """Send a request's head."""
        self._connection.settimeout(left_s(self._deadline))
        self._connection.sendall(text.encode("ascii"))


def system_resolver(host: str, port: int) -> list[str]:
    """The addresses of a host, as this machine finds them."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def system_connector(address: str, port: int, timeout_s: float) -> socket.socket:
    """A socket connected to an address; names are not looked up."""
    connection = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect((address, port))
    except OSError:
        connection.close()
        raise
    return connection


def read_capped(
    read: Callable[[int], bytes], max_bytes: int, deadline: float, told: str, read_bytes: int = _READ_BYTES
) -> bytes:
    """All that `read` gives, until it gives nothing.

    Raises:
        ImageRejected: `image_too_large_bytes` as soon as there is more than `max_bytes`.
        TimeoutError: the deadline, in seconds of `time.monotonic`, has passed.
    """
    parts: list[bytes] = []
    total = 0
    while part := read(read_bytes):
        parts.append(part)
        total += len(part)
        if total > max_bytes:
            raise too_large(told, f"more than {max_bytes:,}", max_bytes)
        left_s(deadline)
    return b"".join(parts)


def too_large(told: str, size: str, max_bytes: int) -> ImageRejected:
    """The rejection of an image over the limit."""
    return ImageRejected(Reason.IMAGE_TOO_LARGE_BYTES, f"{told} has {size} bytes; images.max_bytes is {max_bytes:,}")


def left_s(deadline: float) -> float:
    """Seconds until a deadline of `time.monotonic`.

    Raises:
        TimeoutError: it has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time for the answer is over")
    return left
