"""Reading a request's body within limits of size, of all sizes together, and of time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from mdpd_deploy.serve.core import Limits, Refusal
from mdpd_deploy.serve.core.refusal import invalid, overloaded, shown, too_large

if TYPE_CHECKING:
    from fastapi import Request


class Bodies:
    """Reads bodies, and counts what is held of them.

    Args:
        limits: Most bytes of one body and of all.
        timeout_s: Time in which a body must have come.
    """

    def __init__(self, limits: Limits, timeout_s: float) -> None:
        self.held = 0
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
        declared = request.headers.get("content-length", "0")
        if int(declared) > most:  # the HTTP parser has seen that it is a number
            raise _too_large(most)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    self.held += len(chunk)
                    if size > most:
                        raise _too_large(most)
                    if self.held > self._limits.bodies_bytes:
                        raise overloaded("too many bodies are being read: try again later.")
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
            self.held -= size


def _too_large(most: int) -> Refusal:
    return too_large(f"the body has more than {most} bytes.")


def json_length(request: "Request") -> int | None:
    """Return the header `Inference-Header-Content-Length`; None without one."""
    value = request.headers.get("inference-header-content-length")
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 12:
        raise invalid(f"Inference-Header-Content-Length is no length: {shown(value)}.")
    return int(value)
