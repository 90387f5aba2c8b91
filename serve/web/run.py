"""One server process, from its start to the end of its drain."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from mdpd_deploy.errors import WorkFailed, missing_extra
from mdpd_deploy.serve.core.model import RunnerFactory, open_runner
from mdpd_deploy.serve.core.options import CoreOptions
from mdpd_deploy.serve.core.refusal import Refusal, overloaded
from mdpd_deploy.serve.core.request_core import RequestCore
from mdpd_deploy.serve.web.app import App, raw_error
from mdpd_deploy.serve.web.callers import called_by
from mdpd_deploy.serve.web.connection import connection_class
from mdpd_deploy.serve.web.listener import Listener, bind, most_connections
from mdpd_deploy.serve.web.metrics import Metrics

_NO_HTTP = Refusal(400, "no_http", "this is no HTTP request that can be read.")
_CROWDED = overloaded("there are too many connections: try again later.")
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
    """Serve bundles until SIGTERM, SIGHUP or an interrupt, then answer what was taken and return.

    It accepts connections only when every bundle's files, device and golden vectors are proven.
    When a model fails for good it drains and raises, so that whoever watches the process starts it
    again. Work that still hangs `STOP_S` after the drain cannot be ended from here: the process
    ends then and there with exit code 1.

    Args:
        bundles: Folders by the names that requests use.
        options: Batching, deadlines and limits.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        on_ready: Told the URL when requests are answered.
        make_runner: Opens a bundle's graph.

    Raises:
        UserError: If a package is missing, the address cannot be used, a bundle is no sound one, or
            the process may open too few files.
        WorkFailed: If a bundle does not run on the device, its golden vectors do not come out, or
            it answers no more.
        KeyboardInterrupt: After the drain that an interrupt began.
    """
    try:
        import uvicorn
        import uvloop  # noqa: F401 - uvicorn runs on it
    except ImportError as err:
        raise missing_extra(err.name or "uvicorn", "serve", "serving") from err
    metrics = Metrics()
    place = bind(host, port)
    with place:
        core = RequestCore.open(
            bundles, called_by(options, host), make_runner=make_runner, on_batch=metrics.on_batch
        )
        most = most_connections(options.limits.connections)  # beside the files that are open now
        ask_s = min(options.limits.ask_s, options.timeout_s)
        config = uvicorn.Config(
            App(core, metrics),
            # h11 limits the size of headers, and reads one request of a connection at a time:
            # httptools makes a request of each that came in one packet, ten thousand maybe.
            http=connection_class(ask_s, options.timeout_s, lambda: raw_error(_NO_HTTP, metrics)),
            h11_max_incomplete_event_size=options.limits.header_bytes,
            loop="uvloop",  # takes less processor time
            ws="none",
            log_config=None,
            log_level="error",  # below it is a line for every request that is no HTTP
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=options.drain_s,
        )

        def listen(make: Callable[[], Any]) -> Listener:
            return Listener(place, make, most, lambda: raw_error(_CROWDED, metrics))

        try:
            _run(config, listen, core, lambda: on_ready(_url(host, place.getsockname()[1])))
        finally:
            if not core.join(STOP_S):
                _end_now("a model is still busy after the drain: its work was abandoned.")


def _end_now(reason: str) -> NoReturn:
    """End the process without waiting for its threads."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _run(
    config: Any,
    listen: Callable[[Callable[[], Any]], Listener],
    core: RequestCore,
    announce: Callable[[], None],
) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Says when it listens, takes SIGTERM as an ordinary end, and ends with a failed model."""

        interrupted = False
        failed: str | None = None

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup([])  # uvicorn accepts nothing by itself
            connection, state = config.http_protocol_class, self.lifespan.state
            self.listener = listen(lambda: connection(config, self.server_state, state))
            self.listener.open()
            announce()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            self.listener.close()
            await super().shutdown(sockets)

        async def on_tick(self, counter: int) -> bool:
            self.failed = core.failed
            return await super().on_tick(counter) or self.failed is not None

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.interrupted |= sig == signal.SIGINT
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    server = Server(config)
    with hanging_up(server.handle_exit):
        server.run()
    if server.interrupted:
        raise KeyboardInterrupt
    if server.failed is not None:
        raise WorkFailed(f"{server.failed} Start the server again.")


@contextlib.contextmanager
def hanging_up(handle: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handle SIGHUP, a closed terminal, in the block; not where `nohup` has it ignored."""
    before = signal.getsignal(signal.SIGHUP)
    in_main = threading.current_thread() is threading.main_thread()  # where signals can be handled
    if before is signal.SIG_IGN or not in_main:
        yield
        return
    signal.signal(signal.SIGHUP, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before or signal.SIG_DFL)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
