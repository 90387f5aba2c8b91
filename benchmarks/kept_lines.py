"""Clients that people use, each on one kept connection, for `serve_load.py`.

`http.client` sends what `load_target` made; `tritonclient` makes its own requests of the same tensors.
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
        body = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{request.path} was answered with {answer.status}: {body[:200]!r}")
        problem = request.problem(body, answer.headers)
        if problem:
            raise SystemExit(f"{request.path}: {problem}")

    return ask, line.close


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


CLIENTS = {"http.client": open_http_client, "tritonclient": open_tritonclient}
