"""The server as a Ray Serve application: the same routes over the same request core, on a cluster.

Every replica is one process with its own copy of the models and its own batcher; Ray's proxies share
the requests out. A replica answers only after its bundles are proven, as `mdpd serve` does.

    mdpd serve BUNDLE --engine ray --replicas 1-8              # the application lives as long as this
    serve run mdpd_deploy.serve.ray_app:app bundles=NAME=FOLDER max_replicas=8        # Ray's own way

Bundles are folders that every machine of the cluster sees at the same path.
"""

import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, create_model

from mdpd_deploy.artifacts.bundle import load_bundle
from mdpd_deploy.artifacts.signing import check_signature
from mdpd_deploy.data.images import MAX_PIXELS
from mdpd_deploy.errors import UserError, WorkFailed, missing_extra
from mdpd_deploy.serve.core.options import CoreOptions, Limits, usual_device
from mdpd_deploy.serve.core.request_core import RequestCore
from mdpd_deploy.serve.web.callers import called_by
from mdpd_deploy.serve.web.listener import bind
from mdpd_deploy.serve.web.run import hanging_up

if TYPE_CHECKING:
    from mdpd_deploy.serve.web.app import App

NAME = "mdpd"  # of the application and its deployment


@dataclass(frozen=True)
class Scaling:
    """How many replicas there are.

    Attributes:
        min_replicas: Replicas that always run.
        max_replicas: With more than `min_replicas` Ray adds replicas under load and removes them.
        target_ongoing_requests: Requests in progress per replica that Ray aims at.
        upscale_delay_s: How long there must be more before Ray adds a replica.
        downscale_delay_s: How long there must be fewer before Ray removes one.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 16.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0


def build_ray_app(
    bundles: Mapping[str, Path], options: CoreOptions, scaling: Scaling | None = None
) -> Any:
    """Return a Ray Serve application.

    Args:
        bundles: Folders by the names that requests use, at the same path on every machine.
        options: As for one process; a replica reserves a processor per thread (default 1), or one
            GPU where `device` is cuda.
        scaling: See `Scaling`.

    Raises:
        UserError: If Ray is not installed, or a bundle is no sound one here.
        VerificationError: If a bundle is not signed with `options.key`.
    """
    serve = _import_serve()
    scaling = scaling or Scaling()
    if scaling.max_replicas < scaling.min_replicas or scaling.min_replicas < 1:
        raise UserError(
            f"--replicas {scaling.min_replicas}-{scaling.max_replicas}: give MIN-MAX with 1 or "
            "more, or one number."
        )
    if not bundles:
        raise UserError("name at least one bundle to serve.")
    places = {name: Path(path).resolve() for name, path in bundles.items()}
    key = options.key and options.key.resolve()
    for path in places.values():  # a wrong one is told here and not in the log of a replica
        if key is not None:
            check_signature(path, key)
        load_bundle(path)
    own = replace(options, threads=options.threads or 1, key=key)

    def build() -> "App":
        """Open the models in a replica; Ray starts and ends what this returns."""
        from mdpd_deploy.serve.web.app import App
        from mdpd_deploy.serve.web.metrics import Metrics

        metrics = Metrics()
        return App(RequestCore.open(places, own, on_batch=metrics.on_batch), metrics)

    resources = {"num_cpus": own.threads, "num_gpus": int(own.device == "cuda")}
    asked: dict[str, Any] = {"num_replicas": scaling.min_replicas}
    if scaling.max_replicas > scaling.min_replicas:
        asked = {"autoscaling_config": asdict(scaling)}
    deployment = serve.deployment(
        serve.ingress(build)(_Replica),
        name=NAME,
        ray_actor_options=resources,
        max_ongoing_requests=own.queue,  # the core refuses what is more, in its own words
        max_queued_requests=own.queue,
        graceful_shutdown_timeout_s=own.drain_s,
        **asked,
    )
    return deployment.bind()


class _Replica:
    """What Ray asks of a replica beside its routes."""

    app: "App"

    def check_health(self) -> None:
        """Raise when a model answers no more: Ray starts another replica in this one's place."""
        failed = self.app.core.failed
        if failed is not None:
            raise WorkFailed(failed)


_FIELDS: dict[str, Any] = {
    each.name: (each.type, each.default) for each in (*fields(CoreOptions), *fields(Scaling))
}
del _FIELDS["limits"]
_OPTIONS: Any = create_model("_OPTIONS", __config__=ConfigDict(extra="forbid"), **_FIELDS)


class AppArguments(_OPTIONS):  # type: ignore[misc]
    """What `serve run` or a Serve config file may say: all of `CoreOptions` and `Scaling`, and this.

    Attributes:
        bundles: Folders by name, or `NAME=FOLDER,NAME=FOLDER`.
        device: cpu or cuda; None = cuda for trt, else cpu.
        max_pixels: Width times height of a picture.
        allow_hosts: As in `CoreOptions`, or `NAME,NAME`.
    """

    bundles: dict[str, Path] | str
    device: str | None = None
    max_pixels: int = Field(Limits.pixels, ge=1, le=MAX_PIXELS)
    allow_hosts: tuple[str, ...] | str = CoreOptions.allow_hosts


def app(args: AppArguments) -> Any:
    """Return the application, for `serve run mdpd_deploy.serve.ray_app:app` and config files."""
    places = args.bundles
    if isinstance(places, str):
        pairs = (word.partition("=") for word in places.split(","))
        places = {name: Path(folder) for name, _, folder in pairs}
    plain = args.model_dump(exclude={"bundles"})
    if isinstance(args.allow_hosts, str):
        plain["allow_hosts"] = tuple(filter(None, args.allow_hosts.split(",")))
    plain["limits"] = Limits(pixels=plain.pop("max_pixels"))
    plain["device"] = args.device or usual_device(args.runtime)
    scaling = Scaling(**{name: plain.pop(name) for name in Scaling.__dataclass_fields__})
    return build_ray_app(places, CoreOptions(**plain), scaling)


def serve_on_ray(
    bundles: Mapping[str, Path],
    options: CoreOptions,
    scaling: Scaling,
    *,
    host: str,
    port: int,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Run the application on a Ray cluster until SIGTERM, SIGHUP or an interrupt.

    Joins the cluster that RAY_ADDRESS names; without one, a cluster of this machine alone is started,
    without dashboard and usage statistics.

    Args:
        bundles: Folders by the names that requests use.
        options: See `build_ray_app`.
        scaling: See `Scaling`.
        host: Address that Ray's proxies listen on.
        port: Their port; 0 takes one that is free on this machine, not on a cluster that is joined.
        on_ready: Told the URL when requests are answered.

    Raises:
        UserError: If Ray, a bundle or a cluster is missing, the address cannot be used, or the
            cluster's proxies listen on another one or serve an application of ours already.
        WorkFailed: If no replica gets ready, or a bundle is not signed with `options.key`.
        KeyboardInterrupt: After an interrupt.
    """
    serve = _import_serve()
    port = _choose_port(host, port)
    application = build_ray_app(bundles, called_by(options, host), scaling)
    _join()
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    begun = False
    try:
        serve.start(http_options={"host": host, "port": port})
        _check_address(host, port)
        _check_name(serve)
        begun = True
        try:
            serve.run(application, name=NAME)
        except RuntimeError as err:
            reason = str(err).strip().splitlines()[-1]
            raise WorkFailed(f"no replica got ready: {reason}") from err
        on_ready(f"http://{host}:{port}")
        with hanging_up(lambda number, frame: stop.set()):
            while not stop.wait(1):  # a wait without end would also hold an interrupt back
                pass
    finally:
        _leave(serve, begun=begun)
        signal.signal(signal.SIGTERM, before)


def _choose_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0, having tried it where the proxies will be here."""
    if not os.environ.get("RAY_ADDRESS"):
        with bind(host, port) as place:
            return int(place.getsockname()[1])
    if port == 0:
        raise UserError(
            "--port 0: which port is free on the machines of a cluster is not known here; name one."
        )
    return port


def _check_address(host: str, port: int) -> None:
    """Refuse an address that Ray Serve ignores, because it ran on the cluster before."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    found = client.http_config
    if (found.host, found.port) != (host, port):
        raise UserError(
            f"--host {host} --port {port}: Ray Serve runs on this cluster already and listens on "
            f"--host {found.host} --port {found.port}: give these, or end it with `serve shutdown`."
        )


def _check_name(serve: Any) -> None:
    """Refuse to take the place of an application that another process serves."""
    if NAME in serve.status().applications:
        raise UserError(
            f"an application {NAME!r} runs on this cluster already: end its `mdpd serve`, or all "
            "applications with `serve shutdown`; one command can serve several bundles."
        )


def _join() -> None:
    import ray

    if ray.is_initialized():
        return
    alone: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    try:
        ray.init(log_to_driver=False, **alone)
    except ConnectionError as err:
        raise UserError(f"--engine ray: no cluster could be reached ({err}).") from err


def _leave(serve: Any, *, begun: bool) -> None:
    """End the application if it was begun; a cluster of this process ends with it."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        if begun:
            serve.delete(NAME)
    else:
        serve.shutdown()
    ray.shutdown()


def _import_serve() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        from ray import serve
    except ImportError as err:
        raise missing_extra("ray", "ray", "--engine ray") from err
    return serve
