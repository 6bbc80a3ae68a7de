"""Images over http(s): allowed hosts at public addresses only, within limits of bytes, time, redirects and requests.

The addresses that a name resolves to are looked at before a socket is opened, and the socket is opened to one of these
very addresses: no second lookup can give another. Proxies of the environment are not used, because a proxy would do
the lookup. Names and types that a server gives are ignored: what the bytes are, the decoder finds out.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from pipeline.catalog.fetch_url import Target, parse_url, redirected, refused, shortened
from pipeline.catalog.fetch_wire import Connector, Resolver, Wire, left_s, read_capped, too_large
from pipeline.config import FetchConfig
from pipeline.errors import ImageRejected
from pipeline.hosts import HostRule, address_fault, is_address
from pipeline.records import Reason

_REDIRECTS = (301, 302, 303, 307, 308)
_HEADER_BYTES = 1 << 20
_MAX_ADDRESSES = 4


class Unavailable(OSError):
    """An attempt failed in a way in which the next one may not."""

    def __init__(self, sentence: str, retry_after_s: float = 0.0) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class HttpReader:
    """Reads images over http(s). Safe for threads; every call opens a connection of its own.

    Args:
        config: hosts and limits.
        max_bytes: of an image.
        resolver: where a name is; of its addresses every one has to be allowed.
        connector: opens the sockets.
    """

    def __init__(self, config: FetchConfig, max_bytes: int, resolver: Resolver, connector: Connector) -> None:
        self._config = config
        self._max_bytes = max_bytes
        self._resolver = resolver
        self._connector = connector
        self._rules = [HostRule.parse(text) for text in config.allow_hosts]
        self._private = {HostRule.parse(text).name for text in config.allow_private_hosts}
        self._tls = ssl.create_default_context()
        self._lookups = ThreadPoolExecutor(config.threads, thread_name_prefix="lookup")
        self._asked: Counter[str] = Counter()
        self._has_place = threading.Condition()

    def read(self, url: str) -> bytes:
        """The bytes at a URL, in one attempt; waiting for a place at a busy host does not count as its time.

        Raises:
            ImageRejected: `fetch_refused`, `image_not_found`, `image_too_large_bytes`, or `fetch_failed` where another
                attempt would not help.
            Unavailable: another attempt may.
        """
        target = parse_url(url)
        left_s = self._config.timeout_s
        for _ in range(self._config.max_redirects + 1):
            self._check(target)
            with self._place(target.host):
                begun = time.monotonic()
                body, location = self._ask(target, begun + left_s)
                left_s -= time.monotonic() - begun
            if body is not None:
                return body
            target = redirected(target, location)
        raise ImageRejected(
            Reason.FETCH_FAILED,
            f"{shortened(url.partition('?')[0])} redirects more than {self._config.max_redirects} times",
        )

    def _check(self, target: Target) -> None:
        if not any(rule.covers(target.host, target.port) for rule in self._rules):
            raise refused(f"{target.told}: {target.host} at port {target.port} is not in fetch.allow_hosts")

    @contextmanager
    def _place(self, host: str) -> Iterator[None]:
        """One of the host's bounded places."""
        with self._has_place:
            self._has_place.wait_for(lambda: self._asked[host] < self._config.per_host)
            self._asked[host] += 1
        try:
            yield
        finally:
            with self._has_place:
                self._asked[host] -= 1
                if not self._asked[host]:
                    del self._asked[host]
                self._has_place.notify_all()

    def _ask(self, target: Target, deadline: float) -> tuple[bytes | None, str]:
        """The body, or None and where a redirect leads."""
        try:
            with closing(self._connected(target, deadline)) as connection:
                wire = Wire(connection, deadline, 2 * self._max_bytes + _HEADER_BYTES)
                wire.send(
                    f"GET {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: twotower\r\nAccept: */*\r\n"
                    "Accept-Encoding: identity\r\nConnection: close\r\n\r\n"
                )
                with http.client.HTTPResponse(wire, method="GET") as response:  # type: ignore[arg-type]
                    response.begin()
                    return self._judged(target, response, deadline)
        except ssl.SSLCertVerificationError as error:
            raise refused(f"{target.told}: the certificate is not {target.host}'s: {error.verify_message}") from error
        except Unavailable:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unavailable(f"{type(error).__name__} {error}".strip()) from error

    def _connected(self, target: Target, deadline: float) -> socket.socket:
        """A socket to an address that was looked at, with TLS where the URL says so."""
        failure = OSError(f"{target.host} has no address")
        for address in self._addresses(target, deadline)[:_MAX_ADDRESSES]:
            try:
                limit_s = min(self._config.connect_timeout_s, left_s(deadline))
                connection = self._connector(address, target.port, limit_s)
            except OSError as error:
                failure = error
                continue
            if not target.is_tls:
                return connection
            with connection:  # closes it if the handshake fails; else it has become the TLS socket's
                connection.settimeout(left_s(deadline))
                return self._tls.wrap_socket(connection, server_hostname=target.host, suppress_ragged_eofs=False)
        raise failure

    def _addresses(self, target: Target, deadline: float) -> Sequence[str]:
        """The addresses of the host, none of which is refused."""
        found: Sequence[str] = [target.host]
        if not is_address(target.host):
            limit_s = min(self._config.connect_timeout_s, left_s(deadline))
            found = self._lookups.submit(self._resolver, target.host, target.port).result(limit_s)
        for address in found:
            fault = address_fault(address, may_be_private=target.host in self._private)
            if fault is not None:
                raise refused(f"{target.told}: {target.host} is at {address}, {fault}")
        return found

    def _judged(self, target: Target, response: http.client.HTTPResponse, deadline: float) -> tuple[bytes | None, str]:
        status = response.status
        if status in _REDIRECTS and (location := response.headers.get("Location")):
            return None, location
        if status in (404, 410):
            raise ImageRejected(Reason.IMAGE_NOT_FOUND, f"{target.told}: the server answered {status}")
        if status == 429 or status >= 500:
            raise Unavailable(f"the server answered {status}", _retry_after_s(response.headers.get("Retry-After", "")))
        if status != 200:
            raise ImageRejected(Reason.FETCH_FAILED, f"{target.told}: the server answered {status}")
        for name, known in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked")):
            if (coding := response.headers.get(name, known).strip().lower()) != known:
                raise refused(f"{target.told} comes with {name} {coding!r}, which was not asked for")
        if response.length is not None and response.length > self._max_bytes:
            raise too_large(target.told, f"{response.length:,}", self._max_bytes)
        body = read_capped(response.read, self._max_bytes, deadline, target.told)
        if response.length:
            raise Unavailable(f"the answer was cut {response.length:,} bytes before its end")
        is_framed = response.chunked or response.length is not None
        if not is_framed and (not body or "Content-Length" in response.headers):
            raise Unavailable("the answer's head was cut or damaged")  # which http.client takes for a whole one
        return body, ""


def _retry_after_s(text: str) -> float:
    """Seconds that a Retry-After header asks for: a number or a date; 0 for anything else."""
    if re.fullmatch(r"[0-9]{1,9}", text.strip(), re.ASCII):
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0
