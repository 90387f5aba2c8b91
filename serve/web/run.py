"""One server process, from its start to the end of its drain."""

import errno
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from mdpd_deploy.errors import UserError, WorkFailed, missing_extra
from mdpd_deploy.serve.core import CoreOptions, RequestCore, RunnerFactory, open_runner
from mdpd_deploy.serve.web.app import build_app
from mdpd_deploy.serve.web.metrics import Metrics

STOP_S = 2.0  # for what the threads still do when nobody waits for an answer any more


def serve_bundles(
    bundles: Mapping[str, Path],
    options: CoreOptions,
    *,
    host: str,
    port: int,
    on_ready: Callable[[str], None] = lambda url: None,
    make_runner: RunnerFactory = open_runner,
) -> None:
    """Serve bundles until SIGTERM or an interrupt, then answer what was taken and return.

    It listens only when every bundle's files, device and golden vectors are proven. When a model
    fails for good it drains and raises, so that whoever watches the process starts it again. Work
    that still hangs `STOP_S` after the drain cannot be ended from here: the process ends then and
    there with exit code 1.

    Args:
        bundles: Folders by the names that requests use.
        options: Batching, deadlines and limits.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        on_ready: Told the URL when requests are answered.
        make_runner: Opens a bundle's graph.

    Raises:
        UserError: If a package is missing, the address cannot be used or a bundle is no sound one.
        WorkFailed: If a bundle does not run on the device, its golden vectors do not come out, or
            it answers no more.
        KeyboardInterrupt: After the drain that an interrupt began.
    """
    try:
        import uvicorn
    except ImportError as err:
        raise missing_extra("uvicorn", "serve", "serving") from err
    metrics = Metrics()
    place = bind(host, port)
    with place:
        core = RequestCore.open(
            bundles, options, make_runner=make_runner, on_batch=metrics.on_batch
        )
        config = uvicorn.Config(
            build_app(core, metrics),
            http="h11",  # the parser that limits the size of headers
            h11_max_incomplete_event_size=options.limits.header_bytes,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=options.drain_s,
        )
        try:
            _run(config, place, core, lambda: on_ready(_url(host, place.getsockname()[1])))
        finally:
            if not core.join(STOP_S):
                _end_now("a model is still busy after the drain: its work was abandoned.")


def _end_now(reason: str) -> NoReturn:
    """End the process without waiting for its threads."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _run(
    config: Any, place: socket.socket, core: RequestCore, announce: Callable[[], None]
) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Says when it listens, takes SIGTERM as an ordinary end, and ends with a failed model."""

        interrupted = False
        failed: str | None = None

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            announce()

        async def on_tick(self, counter: int) -> bool:
            self.failed = core.failed
            return await super().on_tick(counter) or self.failed is not None

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.interrupted |= sig == signal.SIGINT
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    server = Server(config)
    server.run(sockets=[place])
    if server.interrupted:
        raise KeyboardInterrupt
    if server.failed is not None:
        raise WorkFailed(f"{server.failed} Start the server again.")


def bind(host: str, port: int) -> socket.socket:
    """Take an address before the bundles are loaded: a taken one is told at once.

    Raises:
        UserError: If it cannot be used.
    """
    where = f"--host {host} --port {port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError, OverflowError) as err:
        raise UserError(f"{where} is no address of this machine ({err}).") from err
    place = socket.socket(family, kind)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind(address)
    except OSError as err:
        place.close()
        if err.errno == errno.EADDRINUSE:
            raise UserError(
                f"--port {port} is in use: choose another one, or 0 for any that is free."
            ) from err
        raise UserError(f"{where} cannot be used ({err.strerror}).") from err
    return place


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
