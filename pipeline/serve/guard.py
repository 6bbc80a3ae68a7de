"""The layers that stand before every request: who may ask, how much may be sent, how long it may take."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
OPEN_ROUTES = ("/", "/healthz")
"""Without a token, like `/page/`: the page, which asks for it, and the probe, which tells nothing of the catalog."""

_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
_LATER = {"retry-after": "1", "connection": "close"}
_LINGERS_S = 2.0  # a client that sends too much is read for so long, or it would never see why it was refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may cost.

    Attributes:
        body_bytes: the most that may be sent, chunked or not.
        held_bytes: the most that all requests that are being answered may have sent together.
        seconds: from the request's head to the begin of its answer.
    """

    body_bytes: int = 16 * 2**20
    held_bytes: int = 256 * 2**20
    seconds: float = 10.0


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def refusal(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer that says why there is none."""
    return JSONResponse({"error": sentence}, status, headers)


class Guard:
    """ASGI layer: the Host that was asked for, the token, and the headers of every answer.

    Args:
        app: what is guarded.
        token: has to be given as `Authorization: Bearer`; empty: none is asked for.
        hosts: names and addresses that `Host` may say; empty: any. On loopback it keeps out pages of other sites whose
            name was made to point here.
    """

    def __init__(self, app: ASGIApp, *, token: str = "", hosts: Collection[str] = ()) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = self._refused(scope)
        await (refused or self._app)(scope, receive, with_headers)

    def _refused(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        host = _host_of(headers.get("host", ""))
        if self._hosts and host not in self._hosts:
            return refusal(400, f"This server is not {host[:100]!r}; ask for it as localhost, or see --allow-host.")
        path = scope["path"]
        if not self._token or path in OPEN_ROUTES or path.startswith("/page/"):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token):
            return None
        said = "The token is not right." if given else "This server asks for a token: Authorization: Bearer TOKEN."
        return refusal(401, said, {"www-authenticate": "Bearer", "connection": "close"})


class Bounded:
    """ASGI layer: counts the bytes that come in, and the seconds."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; refuse it when it becomes too large or takes too long."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = int(headers.get("content-length", "0"))  # the parser lets nothing but digits through
        is_received = not declared and "transfer-encoding" not in headers
        has_begun, size = False, 0

        async def counted() -> Message:
            nonlocal size, is_received
            message = await receive()
            size += (more := len(message.get("body", b"")))
            self._held += more
            is_received = is_received or not message.get("more_body", False)
            if size > self._limits.body_bytes:
                await self._drain(receive, is_received)
                raise HTTPException(413, self._too_large(), {"connection": "close"})
            if self._held > self._limits.held_bytes:
                raise HTTPException(503, "Too much is being sent at once; come again.", _LATER)
            return message

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        if declared > self._limits.body_bytes:
            await self._drain(receive, "expect" in headers)  # who asks first has sent nothing yet
            await refusal(413, self._too_large(), {"connection": "close"})(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._limits.seconds):
                await self._app(scope, counted, noted)
        except TimeoutError:
            if has_begun:
                raise  # the rest of the answer cannot be told otherwise any more
            await self._late(is_received)(scope, receive, send)
        finally:
            self._held -= size

    def _too_large(self) -> str:
        return f"The request is larger than {self._limits.body_bytes} bytes, which are the most (--max-body-bytes)."

    def _late(self, is_received: bool) -> JSONResponse:
        limit = f"{self._limits.seconds:g} s"
        if is_received:
            return refusal(504, f"The search took longer than {limit} and was given up (--timeout).")
        return refusal(408, f"The request was not sent whole within {limit} (--timeout).", {"connection": "close"})

    async def _drain(self, receive: Receive, is_received: bool) -> None:
        """Read what is still sent, for a while, and drop it."""
        try:
            async with asyncio.timeout(_LINGERS_S):
                while not is_received:
                    message = await receive()
                    is_received = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:
            return


def _host_of(header: str) -> str:
    """The Host header without its port."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
