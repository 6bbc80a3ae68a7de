"""Listening: a socket that is ours before anything is loaded, uvicorn on it, and an end in order."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

log = logging.getLogger(__name__)

_BACKLOG = 512
_KEEPS_ALIVE_S = 30
_HEAD_WITHIN_S = 20.0


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; connections wait in it until the server is ready.

    It says that it is TCP, unlike those of `socket.create_server`: only then asyncio switches Nagle's algorithm off,
    with which every answer but a connection's first would take 40 ms longer.

    Raises:
        ConfigError: the address is not to be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _refused(host, port, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _refused(host, port, error) from error
    return listener


def _refused(host: str, port: int, error: OSError) -> ConfigError:
    said = error.strerror or str(error)
    return ConfigError(f"cannot listen on {host}:{port}: {said}; choose another --host or --port")


def address_of(listener: socket.socket, host: str) -> str:
    """Where the page is."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}/"


class Server:
    """uvicorn, as it is used here.

    Args:
        app: what answers.
        ends_within_s: how long requests that are being answered may take once it is told to end.
    """

    def __init__(self, app: ASGIApp, *, ends_within_s: float) -> None:
        log_ = logging.getLogger("uvicorn.error")
        log_.parent, log_.propagate = logging.getLogger("pipeline"), True
        log_.setLevel(logging.WARNING)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEPS_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(ends_within_s)),
            )
        )

    def run(self, listener: socket.socket) -> None:
        """Serve until SIGTERM or SIGINT, or `stop`; what is being answered is answered."""
        try:
            self._server.run(sockets=[listener])
        except KeyboardInterrupt:
            log.info("stopped by a signal")

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._server.should_exit = True


class _Protocol(H11Protocol):
    """A connection that says nothing is closed: uvicorn itself would keep it for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(_HEAD_WITHIN_S, self._close_unless_asked)

    def _close_unless_asked(self) -> None:
        if not self.headers:
            self.transport.close()
