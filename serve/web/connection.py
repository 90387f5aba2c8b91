"""One connection: how long it may take to ask, and to read its answer."""

import asyncio
import math
from collections.abc import Callable
from typing import Any


class Connection(asyncio.Protocol):
    """What a listener needs to know of a connection.

    Attributes:
        idle_since: The loop's time of its begin, or of its last answer; infinite while a request is
            answered.
        on_end: Called when it has ended.
    """

    idle_since = math.inf
    on_end: Callable[[], None]

    def end(self) -> None:
        """Close the connection, at once where its client does not read."""
        raise NotImplementedError


class _Gathering:
    """A transport whose writes of one turn of the loop go out as one: a head with its body."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self.flush)
        self._held.append(data)

    def flush(self) -> None:
        held, self._held = b"".join(self._held), []
        if held and not self._transport.is_closing():
            self._transport.write(held)

    def close(self) -> None:
        self.flush()
        self._transport.close()


def connection_class(ask_s: float, read_s: float, no_http: Callable[[], bytes]) -> type[Connection]:
    """Return uvicorn's HTTP connection with limits of time.

    uvicorn itself waits for ever for the first request, for the rest of one whose head has begun,
    for the rest of a body that nobody reads any more, and for a client that does not read.

    Args:
        ask_s: Seconds from the connection's begin, or from an answer, to the end of the next
            request's head; whatever else arrives meanwhile.
        read_s: Seconds in which a client must have made room for more of its answer.
        no_http: Counts bytes that are no HTTP; returns the whole answer to them.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class HttpConnection(Connection, H11Protocol):
        _asking: asyncio.TimerHandle | None = None
        _reading: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(_Gathering(transport, self.loop))  # type: ignore[arg-type]
            self._await_request()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look()

        def on_response_complete(self) -> None:
            self.transport.flush()  # type: ignore[attr-defined]
            self._await_request()
            super().on_response_complete()  # may begin the next request, if it is here already
            self._look()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reading = self.loop.call_later(read_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            _cancel(self._reading)

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._asking)
            _cancel(self._reading)
            super().connection_lost(exc)
            self.on_end()

        def end(self) -> None:
            if self.transport.get_write_buffer_size():
                self.transport.abort()
            else:
                self.transport.close()

        def send_400_response(self, msg: str) -> None:
            # In the middle of an answer there is no place for another one.
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self._answering():
                self.transport.write(no_http())
            self.transport.close()

        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _await_request(self) -> None:
            _cancel(self._asking)
            self.idle_since = self.loop.time()
            self._asking = self.loop.call_later(ask_s, self.end)

        def _look(self) -> None:
            """Stop the clock when a request has come."""
            if self._answering():
                self.idle_since = math.inf
                _cancel(self._asking)

    return HttpConnection


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
