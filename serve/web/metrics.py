"""What the server tells Prometheus: requests, errors, waiting, computing, batches, queues."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from mdpd_deploy.errors import missing_extra
from mdpd_deploy.serve.core.batcher import Batch

T = TypeVar("T")

_SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
    *(0.5, 1, 2.5, 5, 10, 30),
)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, in a registry of their own.

    Label values come from served models, routes and kinds of refusal, never from a request, so
    that no client can make them grow.

    Raises:
        UserError: If prometheus-client is not installed.
    """

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError as err:
            raise missing_extra("prometheus-client", "serve", "serving") from err
        self._registry = CollectorRegistry()

        def made(kind: Callable[..., T], name: str, words: str, *labels: str, **more: Any) -> T:
            return kind(f"mdpd_{name}", words, labels, registry=self._registry, **more)

        seconds = partial(made, Histogram, buckets=_SECONDS)
        self._requests = made(Counter, "requests", "Requests answered.", "route", "status")
        self._errors = made(Counter, "errors", "Requests refused or failed, by kind.", "kind")
        self._latency = seconds("request_seconds", "From headers to answer.", "route")
        self._queue = seconds("queue_seconds", "A request's wait for the device.", "model")
        self._compute = seconds("compute_seconds", "A batch's run on the device.", "model")
        self._rows = made(Histogram, "batch_rows", "Rows of a batch.", "model", buckets=_ROWS)
        self._depth = made(Gauge, "queue_rows", "Rows in progress or waiting.", "model")

    def watch_queue(self, model: str, depth: Callable[[], int]) -> None:
        """Report `depth()` as a model's queue whenever the metrics are read."""
        self._depth.labels(model).set_function(depth)

    def on_batch(self, batch: Batch) -> None:
        """Count a batch that was run."""
        self._compute.labels(batch.model).observe(batch.compute_ms / 1e3)
        self._rows.labels(batch.model).observe(batch.rows)

    def on_wait(self, model: str, queue_ms: float) -> None:
        """Count a request's time in the queue."""
        self._queue.labels(model).observe(queue_ms / 1e3)

    def on_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered, whatever the answer."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def on_error(self, kind: str) -> None:
        """Count a refusal."""
        self._errors.labels(kind).inc()

    def text(self) -> tuple[bytes, str]:
        """Return everything in Prometheus' text form, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
