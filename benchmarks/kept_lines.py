"""Clients that people use, each on one kept connection, for `serve_load.py`.

`http.client` and `httpx` send what `load_target` made; `tritonclient` makes its own requests of the
same tensors.
"""

import http.client
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import numpy as np
from load_target import DATATYPES
from open_loop import Request

Ask = Callable[[], object]
Close = Callable[[], object]


def open_http_client(
    url: str, request: Request, arrays: Mapping[str, np.ndarray]
) -> tuple[Ask, Close]:
    """Return what asks once by Python's own client, and what closes the connection."""
    place = urlsplit(url)
    line = http.client.HTTPConnection(place.hostname or "", place.port)

    def ask() -> None:
        line.request("POST", request.path, request.body, request.headers)
        answer = line.getresponse()
        _check(request, answer.status, answer.read(), answer.headers)

    return ask, line.close


def open_httpx(url: str, request: Request, arrays: Mapping[str, np.ndarray]) -> tuple[Ask, Close]:
    """Return what asks once by httpx, and what closes the connection."""
    import httpx

    client = httpx.Client(base_url=url, timeout=60)

    def ask() -> None:
        answer = client.post(request.path, content=request.body, headers=request.headers)
        _check(request, answer.status_code, answer.content, answer.headers)

    return ask, client.close


def _check(request: Request, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    problem = f"status {status}" if status != 200 else request.problem(body, headers)
    if problem:
        raise SystemExit(f"{request.path}: {problem}: {body[:200]!r}")


def open_tritonclient(
    url: str, request: Request, arrays: Mapping[str, np.ndarray]
) -> tuple[Ask, Close]:
    """Return what asks once by the standard client of the protocol; tensors go in binary form."""
    import tritonclient.http as triton

    name = request.path.split("/")[3]
    client = triton.InferenceServerClient(urlsplit(url).netloc)
    inputs = []
    for key, array in arrays.items():
        entry = triton.InferInput(key, array.shape, DATATYPES[str(array.dtype)])
        inputs.append(entry.set_data_from_numpy(array))
    return lambda: client.infer(name, inputs), client.close


CLIENTS = {
    "http.client": open_http_client,
    "httpx": open_httpx,
    "tritonclient": open_tritonclient,
}
