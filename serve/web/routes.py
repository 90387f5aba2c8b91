"""What is answered where: the Open Inference Protocol, plain requests, metrics and the page."""

import base64
import hashlib
import re
from collections.abc import Callable
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
from mdpd_deploy.serve.core.refusal import invalid, shown
from mdpd_deploy.serve.core.request_core import Answer, RequestCore
from mdpd_deploy.serve.web.body import Bodies, json_length, while_connected
from mdpd_deploy.serve.web.callers import BINARY, JSON, PICTURE, check_type
from mdpd_deploy.serve.web.metrics import Metrics

if TYPE_CHECKING:
    from fastapi import FastAPI

TOP = 5  # classes in an answer, where the request does not say
_MODEL = "/v2/models/{model}"
_VERSION = "/v2/models/{model}/versions/{version}"


def add_protocol_routes(
    app: "FastAPI", core: RequestCore, bodies: Bodies, metrics: Metrics
) -> None:
    """Add the Open Inference Protocol, version 2, with its binary extension."""
    from fastapi import Request, Response
    from fastapi.responses import JSONResponse

    async def server() -> Response:
        return JSONResponse(core.describe())

    async def live() -> Response:
        return JSONResponse({"live": True})

    async def ready() -> Response:
        return JSONResponse({"ready": core.ready}, 200 if core.ready else 503)

    async def model_of(model: str, version: str | None = None) -> Response:
        return JSONResponse(core.describe_model(model, version))

    async def model_ready(model: str, version: str | None = None) -> Response:
        core.model(model, version)
        return JSONResponse({"name": model, "ready": core.ready}, 200 if core.ready else 503)

    async def infer(request: Request, model: str, version: str | None = None) -> Response:
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

    _get(app, "/v2", server)
    _get(app, "/v2/health/live", live)
    _get(app, "/v2/health/ready", ready)
    for path in (_MODEL, _VERSION):
        _get(app, path, model_of)
        _get(app, f"{path}/ready", model_ready)
        app.add_api_route(f"{path}/infer", infer, methods=["POST"])


def add_plain_routes(app: "FastAPI", core: RequestCore, bodies: Bodies, metrics: Metrics) -> None:
    """Add what takes raw texts and pictures, and says what may be asked."""
    from fastapi import Request, Response
    from fastapi.responses import JSONResponse

    async def models() -> Response:
        return JSONResponse({"models": [core.describe_tasks(name) for name in core.models]})

    async def model_of(model: str) -> Response:
        return JSONResponse(core.describe_tasks(model))

    async def predict(request: Request, model: str) -> Response:
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

    async def classify(request: Request, model: str) -> Response:
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

    _get(app, "/v1/models", models)
    _get(app, "/v1/models/{model}", model_of)
    app.add_api_route("/v1/models/{model}/predict", predict, methods=["POST"])
    app.add_api_route("/v1/models/{model}/classify", classify, methods=["POST"])


def add_pages(app: "FastAPI", core: RequestCore, metrics: Metrics) -> None:
    """Add the page for people, the state it shows, and the metrics."""
    from fastapi.responses import JSONResponse, Response

    text, policy = _read_page()

    async def page() -> Response:
        return Response(text, media_type="text/html", headers={"Content-Security-Policy": policy})

    async def queue() -> Response:
        limit = core.options.queue
        return JSONResponse({"ready": core.ready, "queue": limit, "in_progress": core.queued()})

    async def read_metrics() -> Response:
        content, media_type = metrics.text()
        return Response(content, headers={"Content-Type": media_type})

    _get(app, "/", page)
    _get(app, "/v1/queue", queue)
    _get(app, "/metrics", read_metrics)


def _get(app: "FastAPI", path: str, answer: Callable[..., Any]) -> None:
    """Add what is read; a HEAD gets the same without its body."""
    app.add_api_route(path, answer, methods=["GET", "HEAD"])


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
