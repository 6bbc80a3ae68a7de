"""What Prometheus is told, and the outermost layer around all requests, which counts them and logs what went wrong."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipeline.shown import visible

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "twotower_serve_requests", "Requests", ["route", "status"], registry=self.registry
        )  # _total is added by the library
        self.seconds = Histogram(
            "twotower_serve_seconds", "From a request's head to its last byte", ["route"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.text_batch = Histogram(
            "twotower_serve_text_batch", "Texts in one batch through the tower", buckets=_SIZES, registry=self.registry
        )
        self.searches = Gauge("twotower_serve_searches", "Searches that run or wait", registry=self.registry)
        self.release = Gauge("twotower_serve_release", "Number of the release that is searched", registry=self.registry)

    def text(self) -> bytes:
        """All of them, as a scrape reads them."""
        return generate_latest(self.registry)


class Measured:
    """ASGI layer: counts and times requests by the route that took them, not by their address."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            # The one place where any error may end: the answer was sent, and the server goes on.
            log.exception("%s %s failed", scope["method"], visible(scope["path"]))
        finally:
            seconds = time.perf_counter() - begun
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status or "none")).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            log.debug("%s %s %s %.1f ms", scope["method"], visible(scope["path"]), status, 1000 * seconds)
