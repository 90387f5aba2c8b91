"""The application: routes over a request core, errors in one form, headers, counting."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from mdpd_deploy.errors import missing_extra
from mdpd_deploy.serve.core.options import CoreOptions
from mdpd_deploy.serve.core.refusal import Refusal, draining, internal
from mdpd_deploy.serve.core.request_core import RequestCore
from mdpd_deploy.serve.web.body import Bodies
from mdpd_deploy.serve.web.callers import check_caller
from mdpd_deploy.serve.web.metrics import Metrics
from mdpd_deploy.serve.web.routes import find_route, page_routes, plain_routes, protocol_routes

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),  # without any, a page may name itself as `null`
    (b"cache-control", b"no-store"),
]


class App:
    """The ASGI application of one core, which starts and closes with it.

    Around every request: whose it is, the size of its headers, our own headers, time and status.

    Args:
        core: An opened core, not yet started, whose `on_batch` is `metrics.on_batch`.
        metrics: Where requests are counted.

    Attributes:
        core: As given.

    Raises:
        UserError: If Starlette is not installed.
    """

    def __init__(self, core: RequestCore, metrics: Metrics) -> None:
        try:
            from starlette.requests import Request
            from starlette.routing import Router
        except ImportError as err:
            raise missing_extra("starlette", "serve", "serving") from err
        self.core = core
        self._metrics = metrics
        for name in core.models:
            metrics.watch_queue(name, lambda name=name: core.queued()[name])  # type: ignore[misc]
        bodies = Bodies(core.options.limits, core.options.timeout_s)
        self._routes = [
            *protocol_routes(core, bodies, metrics),
            *plain_routes(core, bodies, metrics),
            *page_routes(core, metrics),
        ]
        self._request = Request
        self._other = Router(lifespan=self._live)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._other(scope, receive, send)
            return
        started = time.perf_counter()
        place = "other"
        try:
            _check(scope, self.core.options)
            route, words = find_route(self._routes, scope)
            place = route.path
            response = await route.answer(self._request(scope, receive), **words)
        except Refusal as refusal:
            response = _error(refusal, self._metrics)
        except asyncio.CancelledError:  # the time to drain is over
            response = _error(draining(), self._metrics)
        except Exception:
            logger.exception("%s %s failed", scope["method"], place)
            response = _error(internal(), self._metrics)
        response.raw_headers.extend(_HEADERS)
        try:
            with contextlib.suppress(asyncio.CancelledError):  # nobody reads it
                await response(scope, receive, send)
        finally:
            self._metrics.on_request(place, response.status_code, time.perf_counter() - started)

    @contextlib.asynccontextmanager
    async def _live(self, app: object) -> AsyncIterator[None]:
        await self.core.start()
        yield
        await self.core.close()


def _check(scope: Scope, options: CoreOptions) -> None:
    size = sum(len(name) + len(value) for name, value in scope["headers"])
    most = options.limits.header_bytes
    if size + len(scope["raw_path"]) + len(scope["query_string"]) > most:
        raise Refusal(431, "too_large", f"the headers have more than {most} bytes.")
    check_caller(scope["method"], scope["headers"], options.allow_hosts)


def _error(refusal: Refusal, metrics: Metrics) -> Response:
    from starlette.responses import JSONResponse

    metrics.on_error(refusal.kind)
    headers = {}
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(refusal.retry_after_s)
    if refusal.methods:
        headers["Allow"] = ", ".join(refusal.methods)
    if refusal.status in (408, 413) or refusal.kind == "framing":  # what follows is not read
        headers["Connection"] = "close"
    return JSONResponse({"error": str(refusal)}, refusal.status, headers=headers)


def raw_error(refusal: Refusal, metrics: Metrics) -> bytes:
    """Return the whole answer to what does not get as far as the application; it ends a connection."""
    answer = _error(refusal, metrics)
    lines = [f"HTTP/1.1 {refusal.status.value} {refusal.status.phrase}".encode()]
    headers = [*answer.raw_headers, *_HEADERS, (b"connection", b"close")]
    lines += [name + b": " + value for name, value in headers]
    return b"\r\n".join([*lines, b"", answer.body])
