"""Work for a client that has left is given up."""

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from mdpd_deploy.serve.core import Refusal

if TYPE_CHECKING:
    from fastapi import Request

T = TypeVar("T")


async def while_connected(request: "Request", work: Coroutine[Any, Any, T]) -> T:
    """Return what the work returns; cancel it when the client closes the connection.

    Args:
        request: Whose body has been read.
        work: What the client waits for.

    Raises:
        Refusal: 400, which nobody reads, when the client has left.
    """
    answer = asyncio.create_task(work)
    leaving = asyncio.create_task(_has_left(request))
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Refusal(400, "gone", "the connection was closed before the answer.")
        return answer.result()
    finally:
        for task in (answer, leaving):
            task.cancel()
        await asyncio.gather(answer, leaving, return_exceptions=True)


async def _has_left(request: "Request") -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
