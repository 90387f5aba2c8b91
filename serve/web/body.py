"""A request's body, read within limits of size, of all sizes together, and of time; a client that leaves."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from mdpd_deploy.serve.core.options import Limits
from mdpd_deploy.serve.core.refusal import Refusal, invalid, overloaded, shown, too_large
from mdpd_deploy.serve.web.callers import client_of

if TYPE_CHECKING:
    from starlette.requests import Request

T = TypeVar("T")


class Bodies:
    """Reads bodies, and counts what is held of them, of one client (see `client_of`) and of all.

    Args:
        limits: Most bytes of one body and of all; one client may hold half of all.
        timeout_s: Time in which a body must have come.
    """

    def __init__(self, limits: Limits, timeout_s: float) -> None:
        self.held = 0
        self._held_by: Counter[str] = Counter()
        self._limits = limits
        self._timeout_s = timeout_s

    @contextlib.asynccontextmanager
    async def read(self, request: "Request", most: int | None = None) -> AsyncIterator[bytes]:
        """Hold the whole body, declared or chunked, in the block.

        Args:
            request: Whose body.
            most: Most bytes, where that is less than for every body.

        Raises:
            Refusal: 413 as soon as it is known to be too large, 503 when too much is held already,
                408 when it does not come in time, 400 (which nobody reads) when the client closed
                the connection before all of it had come.
        """
        from starlette.requests import ClientDisconnect

        most = min(most or self._limits.body_bytes, self._limits.body_bytes)
        declared = _length(request, "Content-Length")
        if declared is not None and declared > most:
            raise _too_large(most)
        client = client_of(request.client)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    self._hold(client, len(chunk))
                    if size > most:
                        raise _too_large(most)
                    self._check_room(client)
                    chunks.append(chunk)
            body = b"".join(chunks)
            chunks.clear()
            yield body
        except ClientDisconnect:
            raise Refusal(400, "gone", "the connection was closed within the body.") from None
        except TimeoutError:
            message = f"the body did not arrive within {self._timeout_s:g} s."
            raise Refusal(408, "slow", message) from None
        finally:
            self._hold(client, -size)

    def _hold(self, client: str, size: int) -> None:
        self.held += size
        self._held_by[client] += size
        if not self._held_by[client]:
            del self._held_by[client]

    def _check_room(self, client: str) -> None:
        if self.held > self._limits.bodies_bytes:
            raise overloaded("too many bodies are being read: try again later.")
        if self._held_by[client] > self._limits.bodies_bytes // 2:
            raise overloaded("too many bodies of your address are being read: try again later.")


def _too_large(most: int) -> Refusal:
    return too_large(f"the body has more than {most} bytes.")


def json_length(request: "Request") -> int | None:
    """Return the header `Inference-Header-Content-Length`; None without one."""
    return _length(request, "Inference-Header-Content-Length")


def _length(request: "Request", header: str) -> int | None:
    value = request.headers.get(header)
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 20:
        raise invalid(f"{header} is no length: {shown(value)}.")
    return int(value)


async def while_connected(request: "Request", work: Coroutine[Any, Any, T]) -> T:
    """Return what the work returns; cancel it when the client closes the connection.

    Args:
        request: Whose body has been read.
        work: What the client waits for.

    Raises:
        Refusal: 400, which nobody reads, when the client has left.
    """
    this = asyncio.current_task()
    assert this is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left = True
        this.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if left and not this.uncancel():
            raise Refusal(400, "gone", "the connection was closed before the answer.") from None
        raise
    finally:
        watcher.cancel()
