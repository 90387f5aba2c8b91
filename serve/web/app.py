"""The application: routes over a request core, errors in one form, headers, counting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from mdpd_deploy.errors import missing_extra
from mdpd_deploy.serve.core.options import CoreOptions
from mdpd_deploy.serve.core.refusal import Refusal, draining, internal, not_found
from mdpd_deploy.serve.core.request_core import RequestCore
from mdpd_deploy.serve.web.body import Bodies
from mdpd_deploy.serve.web.callers import check_caller
from mdpd_deploy.serve.web.metrics import Metrics
from mdpd_deploy.serve.web.routes import add_pages, add_plain_routes, add_protocol_routes

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),  # without any, a page may name itself as `null`
    (b"cache-control", b"no-store"),
]


def build_app(core: RequestCore, metrics: Metrics) -> FastAPI:
    """Return the application; the core, its `state.core`, starts and closes with it.

    Args:
        core: An opened core, not yet started, whose `on_batch` is `metrics.on_batch`.
        metrics: Where requests are counted.

    Raises:
        UserError: If FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI
    except ImportError as err:
        raise missing_extra("fastapi", "serve", "serving") from err

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await core.start()
        yield
        await core.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.core = core
    for name in core.models:
        metrics.watch_queue(name, lambda name=name: core.queued()[name])  # type: ignore[misc]
    bodies = Bodies(core.options.limits, core.options.timeout_s)
    add_protocol_routes(app, core, bodies, metrics)
    add_plain_routes(app, core, bodies, metrics)
    add_pages(app, core, metrics)

    async def refused(_: Any, err: Exception) -> Any:
        assert isinstance(err, Refusal)
        return _error(err, metrics)

    async def no_route(_: Any, err: Exception) -> Any:
        return _error(not_found("there is nothing at this path."), metrics)

    async def no_method(_: Any, err: Exception) -> Any:
        answer = _error(Refusal(405, "no_method", "this path takes another method."), metrics)
        answer.headers.update(getattr(err, "headers", None) or {})  # Allow: which it takes
        return answer

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(404, no_route)
    app.add_exception_handler(405, no_method)
    app.add_middleware(_Frame, metrics=metrics, options=core.options)
    return app


def _error(refusal: Refusal, metrics: Metrics) -> Any:
    from fastapi.responses import JSONResponse

    metrics.on_error(refusal.kind)
    headers = {}
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(refusal.retry_after_s)
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


class _Frame:
    """Around every request: whose it is, the size of its headers, our own headers, time and status.

    What escapes the routes is answered here too: outside of the frame it would go uncounted and
    without our headers.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, options: CoreOptions) -> None:
        self._app = app
        self._metrics = metrics
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0

        async def framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        async def answer(refusal: Refusal) -> None:
            response = _error(refusal, self._metrics)
            if not status:
                await response(scope, receive, framed)

        try:
            self._check(scope)
            await self._app(scope, receive, framed)
        except Refusal as refusal:
            await answer(refusal)
        except asyncio.CancelledError:  # the time to drain is over
            await answer(draining())
        except Exception:
            await answer(internal())
            raise  # into the log
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.on_request(route, status or 500, time.perf_counter() - started)

    def _check(self, scope: Scope) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        most = self._options.limits.header_bytes
        if size + len(scope["raw_path"]) + len(scope["query_string"]) > most:
            raise Refusal(431, "too_large", f"the headers have more than {most} bytes.")
        check_caller(scope["method"], scope["headers"], self._options.allow_hosts)
