"""The listening socket: which connections are taken, of all and of one client."""

import asyncio
import contextlib
import errno
import logging
import math
import os
import resource
import socket
import time
from collections.abc import Callable

from mdpd_deploy.errors import UserError
from mdpd_deploy.serve.web.callers import client_of
from mdpd_deploy.serve.web.connection import Connection

BACKLOG = 1024  # connections that the system holds until they are accepted
SPARE, SPARE_SHARE = 24, 8  # so many descriptors, or an eighth, for all but connections
FEWEST = 8
RETRY_S, WARN_S = 1.0, 60.0

logger = logging.getLogger(__name__)


class Listener:
    """Accepts connections, one in each turn of the event loop.

    One client (see `client_of`) gets at most half of the connections. Where there are too many, the
    one that has been idle the longest is ended for the new one; where all have requests in
    progress, the new one is refused.

    Args:
        place: A listening socket, not blocking.
        make: Makes a connection.
        most: Most connections at once.
        refusal: Counts a refused connection; returns the whole answer to it.
    """

    def __init__(
        self,
        place: socket.socket,
        make: Callable[[], Connection],
        most: int,
        refusal: Callable[[], bytes],
    ) -> None:
        self._place = place
        self._make = make
        self._most = most
        self._refusal = refusal
        self._taken: dict[Connection, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._warned = -WARN_S
        self._closed = False

    def open(self) -> None:
        """Begin to accept, in the running event loop."""
        if not self._closed:
            asyncio.get_running_loop().add_reader(self._place.fileno(), self._accept)

    def close(self) -> None:
        """Close the socket; the connections that were accepted stay."""
        self._closed = True
        asyncio.get_running_loop().remove_reader(self._place.fileno())
        self._place.close()

    def _accept(self) -> None:
        try:
            line, address = self._place.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return  # the client has left
        except OSError as err:
            self._wait(err)
            return
        line.setblocking(False)
        if self._make_room(client := client_of(address)):
            task = asyncio.get_running_loop().create_task(self._take(line, client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        with line, contextlib.suppress(OSError):
            line.send(self._refusal())
            line.recv(65536)  # what is left unread would take the answer back

    async def _take(self, line: socket.socket, client: str) -> None:
        connection = self._make()
        connection.on_end = lambda: self._forget(connection)
        self._taken[connection] = client
        try:
            # Without it an answer of two writes waits for the client's delayed acknowledgement,
            # 40 ms; asyncio sets it only for sockets that name their protocol.
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, line)
        except OSError:  # the client has left
            self._forget(connection)
            line.close()

    def _make_room(self, client: str) -> bool:
        """Return whether one more connection of a client may be taken, having ended an idle one."""
        own = [each for each, of in self._taken.items() if of == client]
        for those, most in ((own, self._most // 2), (list(self._taken), self._most)):
            if len(those) < most:
                continue
            idle = min(those, key=lambda each: each.idle_since)
            if idle.idle_since == math.inf:
                return False
            self._forget(idle)
            idle.end()
        return True

    def _forget(self, connection: Connection) -> None:
        self._taken.pop(connection, None)

    def _wait(self, err: OSError) -> None:
        """Without descriptors or memory the system would tell of the same connection for ever."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._place.fileno())
        loop.call_later(RETRY_S, self.open)
        if time.monotonic() - self._warned >= WARN_S:
            self._warned = time.monotonic()
            logger.warning("no connection can be accepted (%s): trying again.", err.strerror)


def most_connections(asked: int) -> int:
    """Return how many connections there may be at once.

    Args:
        asked: Most in any case.

    Raises:
        UserError: If the process may open too few files.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return asked
    left = allowed - len(os.listdir("/dev/fd")) - max(SPARE, allowed // SPARE_SHARE)
    if left < FEWEST:
        raise UserError(
            f"this process may open {allowed} files, which leaves too few for connections: raise "
            f"the limit to {allowed - left + FEWEST} or more (ulimit -n)."
        )
    return min(asked, left)


def bind(host: str, port: int) -> socket.socket:
    """Take an address before the bundles are loaded: a taken one is told at once.

    It listens from here on, since two sockets may be bound to one address until one does.
    Connections wait until they are accepted.

    Raises:
        UserError: If it cannot be used.
    """
    where = f"--host {host} --port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError, OverflowError) as err:
        raise UserError(f"{where} is no address of this machine ({err}).") from err
    place = socket.socket(family, kind, protocol)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.setblocking(False)
    try:
        place.bind(address)
        place.listen(BACKLOG)
    except OSError as err:
        place.close()
        if err.errno == errno.EADDRINUSE:
            raise UserError(
                f"--port {port} is in use: choose another one, or 0 for any that is free."
            ) from err
        raise UserError(f"{where} cannot be used ({err.strerror}).") from err
    return place
