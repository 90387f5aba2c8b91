"""What is answered where: the Open Inference Protocol, plain requests, metrics and the page."""

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from mdpd_deploy.serve.core.json_body import (
    read_json_body,
    take,
    take_count,
    take_list,
    tensors_limit,
)
from mdpd_deploy.serve.core.model import ServedModel
from mdpd_deploy.serve.core.protocol import check_encoding
from mdpd_deploy.serve.core.refusal import Refusal, invalid, not_found, shown
from mdpd_deploy.serve.core.request_core import Answer, RequestCore
from mdpd_deploy.serve.web.body import Bodies, json_length, while_connected
from mdpd_deploy.serve.web.callers import BINARY, JSON, PICTURE, check_type
from mdpd_deploy.serve.web.metrics import Metrics

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

READ, WRITE = ("GET", "HEAD"), ("POST",)  # a HEAD gets the same without its body
TOP = 5  # classes in an answer, where the request does not say
_MODEL = "/v2/models/{model}"
_VERSION = "/v2/models/{model}/versions/{version}"


@dataclass(frozen=True)
class Route:
    """One path, and what answers there.

    Attributes:
        path: With a name in braces for each part that varies.
        answer: Called with the request, and by name with the parts that vary.
        methods: What it takes.
    """

    path: str
    answer: Callable[..., Awaitable["Response"]]
    methods: Sequence[str] = READ

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What a whole path must match."""
        return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", self.path))


def find_route(routes: Sequence[Route], scope: Mapping[str, Any]) -> tuple[Route, dict[str, str]]:
    """Return what answers a request, and the parts of its path by name.

    Raises:
        Refusal: 404 where there is none, 405 where it does not take the request's method.
    """
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    for route in routes:
        if not (found := route.pattern.fullmatch(path)):
            continue
        if scope["method"] not in route.methods:
            words = "this path takes another method."
            raise Refusal(405, "no_method", words, methods=route.methods)
        return route, found.groupdict()
    raise not_found("there is nothing at this path.")


def protocol_routes(core: RequestCore, bodies: Bodies, metrics: Metrics) -> list[Route]:
    """Return the Open Inference Protocol, version 2, with its binary extension."""
    from starlette.responses import JSONResponse, Response

    async def server(request: "Request") -> Response:
        return JSONResponse(core.describe())

    async def live(request: "Request") -> Response:
        return JSONResponse({"live": True})

    async def ready(request: "Request") -> Response:
        return JSONResponse({"ready": core.ready}, 200 if core.ready else 503)

    async def model_of(request: "Request", model: str, version: str | None = None) -> Response:
        return JSONResponse(core.describe_model(model, version))

    async def model_ready(request: "Request", model: str, version: str | None = None) -> Response:
        core.model(model, version)
        return JSONResponse({"name": model, "ready": core.ready}, 200 if core.ready else 503)

    async def infer(request: "Request", model: str, version: str | None = None) -> Response:
        served = core.model(model, version)
        check_encoding(request.headers.get("content-encoding"))
        check_type(request.headers.raw, (JSON, BINARY))
        length = json_length(request)
        most = tensors_limit(served.inputs).most_bytes if length is None else None
        async with bodies.read(request, most) as body:
            work = core.infer(model, body, json_length=length, version=version)
            answer = await while_connected(request, work)
        metrics.on_wait(model, answer.queue_ms)
        reply = answer.reply
        if reply.json_length is None:
            return Response(reply.body, media_type="application/json")
        headers = {"Inference-Header-Content-Length": str(reply.json_length)}
        return Response(reply.body, headers=headers, media_type="application/octet-stream")

    return [
        *(Route(f"{path}/infer", infer, WRITE) for path in (_MODEL, _VERSION)),
        *(Route(path, model_of) for path in (_MODEL, _VERSION)),
        *(Route(f"{path}/ready", model_ready) for path in (_MODEL, _VERSION)),
        Route("/v2", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
    ]


def plain_routes(core: RequestCore, bodies: Bodies, metrics: Metrics) -> list[Route]:
    """Return what takes raw texts and pictures, and says what may be asked."""
    from starlette.responses import JSONResponse

    async def models(request: "Request") -> "Response":
        return JSONResponse({"models": [core.describe_tasks(name) for name in core.models]})

    async def model_of(request: "Request", model: str) -> "Response":
        return JSONResponse(core.describe_tasks(model))

    async def predict(request: "Request", model: str) -> "Response":
        served = core.model(model)
        check_encoding(request.headers.get("content-encoding"))
        check_type(request.headers.raw, (JSON,))
        async with bodies.read(request, served.texts_limit.most_bytes) as body:
            work = core.parse(lambda: _read_plain(body, served), len(body))
            asked = await while_connected(request, work)
        task = asked.task or request.query_params.get("task")
        answer = await while_connected(request, core.predict(model, asked.raws, task=task))
        metrics.on_wait(model, answer.queue_ms)
        return JSONResponse(_plain(answer, asked.top))

    async def classify(request: "Request", model: str) -> "Response":
        core.model(model)
        check_encoding(request.headers.get("content-encoding"))
        check_type(request.headers.raw, (PICTURE, BINARY))
        query = request.query_params
        top = _top(query.get("top"))
        async with bodies.read(request) as body:
            work = core.classify(model, body, task=query.get("task"))
            answer = await while_connected(request, work)
        metrics.on_wait(model, answer.queue_ms)
        return JSONResponse(_plain(answer, top))

    return [
        Route("/v1/models/{model}/predict", predict, WRITE),
        Route("/v1/models/{model}/classify", classify, WRITE),
        Route("/v1/models", models),
        Route("/v1/models/{model}", model_of),
    ]


def page_routes(core: RequestCore, metrics: Metrics) -> list[Route]:
    """Return the page for people, the state it shows, and the metrics."""
    from starlette.responses import JSONResponse, Response

    text, policy = _read_page()

    async def page(request: "Request") -> Response:
        return Response(text, media_type="text/html", headers={"Content-Security-Policy": policy})

    async def queue(request: "Request") -> Response:
        limit = core.options.queue
        return JSONResponse({"ready": core.ready, "queue": limit, "in_progress": core.queued()})

    async def read_metrics(request: "Request") -> Response:
        content, media_type = metrics.text()
        return Response(content, headers={"Content-Type": media_type})

    return [Route("/", page), Route("/v1/queue", queue), Route("/metrics", read_metrics)]


class _Plain(NamedTuple):
    """A plain request."""

    raws: list[str | tuple[str, str]]
    task: str | None
    top: int


def _read_plain(body: bytes, model: ServedModel) -> _Plain:
    plain = read_json_body(body, model.texts_limit)
    raws = [_to_raw(item) for item in take_list(plain, "inputs", model.max_batch)]
    top = take_count(plain, "top")
    return _Plain(raws, take(plain, "task", str), TOP if top is None else top)


def _to_raw(item: Any) -> str | tuple[str, str]:
    """Return a text, or a pair of texts, from its JSON form."""
    if isinstance(item, str):
        return item
    if isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item):
        return item[0], item[1]
    raise invalid(f"an input is a text or a list of two texts: given {shown(item)}.")


def _top(value: str | None) -> int:
    if value is None:
        return TOP
    if not value.isascii() or not value.isdigit() or len(value) > 6:
        raise invalid(f"top must be a whole number, not negative: given {shown(value)}.")
    return int(value)


def _plain(answer: Answer, top: int) -> dict[str, Any]:
    return {
        "model": answer.model,
        "task": answer.task,
        "predictions": [prediction.to_json(top) for prediction in answer.predictions],
        "queue_ms": round(answer.queue_ms, 3),
        "compute_ms": round(answer.compute_ms, 3),
        "batch_rows": answer.batch_rows,
    }


def _read_page() -> tuple[str, str]:
    """Return the page, one file without a resource from elsewhere, and its Content-Security-Policy.

    The policy lets the page's own script and style run, by their hashes, and lets it talk to this
    server only.
    """
    text = files("mdpd_deploy.serve.web").joinpath("page.html").read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; connect-src 'self'; img-src blob: data:; "
        f"script-src {_hashes(text, 'script')}; style-src {_hashes(text, 'style')}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _hashes(text: str, element: str) -> str:
    bodies = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
    digests = (hashlib.sha256(body.encode()).digest() for body in bodies)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
