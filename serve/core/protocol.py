"""Bodies of the Open Inference Protocol, version 2: bytes ↔ arrays, JSON and binary form.

In the binary form a body is JSON of `json_length` bytes, then the raw little-endian tensors that
say `binary_data_size`, in the order of the inputs. Names, datatypes, shapes and sizes are compared
with the graph's own before anything is allocated; binary tensors are views of the body.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.serve.core.json_body import (
    read_json_body,
    take,
    take_count,
    take_list,
    tensors_limit,
)
from mdpd_deploy.serve.core.refusal import invalid, shown, unsupported
from mdpd_deploy.serve.core.tensors import Arrays, TensorSpec, datatype_of

# Parameters that would change the answer if they were ignored, as other servers understand them.
_NOT_HERE = ("sequence_id", "sequence_start", "sequence_end", "priority")
_NOT_HERE_TENSOR = ("shared_memory_region", "classification")
_ELEMENTS: dict[str, set[type]] = {"b": {bool}, "i": {int}, "u": {int}, "f": {float, int}}


@dataclass(frozen=True)
class InferRequest:
    """A request of the protocol, checked.

    Attributes:
        id: To be echoed.
        arrays: Every input of the graph by name; some are read-only views of the body.
        outputs: Names of the outputs wanted, in order, each with whether it is wanted in binary.
        timeout_s: The client's own limit of time; None without one.
    """

    id: str | None
    arrays: Arrays
    outputs: dict[str, bool]
    timeout_s: float | None


@dataclass(frozen=True)
class Reply:
    """A body to send back.

    Attributes:
        json_length: Bytes of JSON at its start; None when it is JSON only.
    """

    body: bytes
    json_length: int | None


def decode_request(
    body: bytes,
    json_length: int | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    most_tensors: int,
) -> InferRequest:
    """Read a request.

    Args:
        body: The whole body.
        json_length: `Inference-Header-Content-Length`; None = all of the body is JSON.
        inputs: What the graph takes.
        outputs: What the graph gives.
        most_tensors: Most inputs, or outputs, that may be listed.

    Raises:
        Refusal: 413 for more JSON than these inputs can have; 400 that says what is wrong and where.
    """
    if json_length is not None and not 0 <= json_length <= len(body):
        raise invalid(
            f"Inference-Header-Content-Length is {shown(json_length)}, and the body has "
            f"{len(body)} bytes."
        )
    end = len(body) if json_length is None else json_length
    plain = read_json_body(body[:end], tensors_limit(inputs))
    tail = memoryview(body)[end:]
    parameters = take(plain, "parameters", dict) or {}
    _refuse(parameters, _NOT_HERE, "")
    timeout = take_count(parameters, "timeout", "parameters: ")  # in microseconds
    return InferRequest(
        id=take(plain, "id", str),
        arrays=_read_inputs(take_list(plain, "inputs", most_tensors), inputs, tail),
        outputs=_read_outputs(
            take_list(plain, "outputs", most_tensors),
            [spec.name for spec in outputs],
            binary=take(parameters, "binary_data_output", bool, "parameters: ") or False,
        ),
        timeout_s=timeout / 1e6 if timeout else None,
    )


def encode_reply(
    request: InferRequest, model: str, version: str, arrays: dict[str, NDArray[Any]]
) -> Reply:
    """Write the answer in the form that the request asked for.

    Args:
        request: What is answered.
        model: Its name, as the client knows it.
        version: The model's version.
        arrays: Every output of the graph by name, finite.
    """
    entries: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for name, binary in request.outputs.items():
        array = arrays[name]
        datatype, shape = datatype_of(array.dtype), list(array.shape)
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        if binary:
            tail.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = array.ravel().tolist()
        entries.append(entry)
    plain: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": entries}
    if request.id is not None:
        plain["id"] = request.id
    head = json.dumps(plain, allow_nan=False).encode()
    return Reply(b"".join([head, *tail]), len(head) if tail else None)


def _read_inputs(entries: list[Any], specs: Sequence[TensorSpec], tail: memoryview) -> Arrays:
    by_name = {spec.name: spec for spec in specs}
    arrays: Arrays = {}
    start = 0
    for name, entry in _named(entries, "inputs"):
        spec = by_name.get(name)
        if spec is None:
            raise invalid(f"unknown input {shown(name)}: the model takes {', '.join(by_name)}.")
        if name in arrays:
            raise invalid(f"input {name!r} is given twice.")
        where = f"input {name!r}: "
        parameters = _parameters(entry, where)
        shape = _read_shape(entry, spec, where)
        size = take_count(parameters, "binary_data_size", where)
        if size is None:
            arrays[name] = _from_json(entry, spec, shape, where)
        else:
            if entry.get("data") is not None:
                raise invalid(f"{where}give either 'data' or binary_data_size, not both.")
            arrays[name] = _from_binary(tail[start:], size, spec, shape, where)
            start += size
        spec.check_values(arrays[name])
    if missing := [name for name in by_name if name not in arrays]:
        raise invalid(f"input {missing[0]!r} is missing: the model takes {', '.join(by_name)}.")
    if start != len(tail):
        raise invalid(
            f"{len(tail) - start} bytes follow the last tensor: the sizes in binary_data_size must "
            "add up to the bytes after the JSON."
        )
    return arrays


def _named(entries: list[Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each tensor that a request lists, and what it says of it."""
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise invalid(f"{key}[{number}] must be an object.")
        yield take(entry, "name", str, f"{key}[{number}]: ") or "", entry


def _parameters(entry: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = take(entry, "parameters", dict, where) or {}
    _refuse(parameters, _NOT_HERE_TENSOR, where)
    return parameters


def _read_shape(entry: dict[str, Any], spec: TensorSpec, where: str) -> list[int]:
    """Check datatype and shape of one input, and return the shape."""
    datatype = take(entry, "datatype", str, where)
    if datatype != spec.datatype:
        raise invalid(f"{where}datatype must be {spec.datatype}, not {shown(datatype)}.")
    shape = entry.get("shape")
    if not isinstance(shape, list):
        raise invalid(f"{where}'shape' must be a list of whole numbers.")
    if len(shape) <= len(spec.axes):  # a list of millions is told by its length
        for size in shape:
            if type(size) is not int:
                raise invalid(f"{where}'shape' holds {shown(size)}, which is no whole number.")
    spec.check_shape(shape)
    return shape


def _from_binary(
    tail: memoryview, size: int, spec: TensorSpec, shape: Sequence[int], where: str
) -> NDArray[Any]:
    """Return the first `size` bytes of the tail as one input."""
    expected = math.prod(shape) * spec.dtype.itemsize
    if size != expected:
        raise invalid(
            f"{where}binary_data_size is {shown(size)}, but {spec.datatype} {shape} "
            f"takes {expected} bytes."
        )
    if size > len(tail):
        raise invalid(f"{where}needs {size} bytes after the JSON, and {len(tail)} are there.")
    return np.frombuffer(tail[:size], dtype=spec.dtype).reshape(shape)


def _from_json(
    entry: dict[str, Any], spec: TensorSpec, shape: Sequence[int], where: str
) -> NDArray[Any]:
    if spec.datatype == "FP16":
        raise invalid(f"{where}FP16 cannot be sent as JSON: send it as binary data.")
    if not isinstance(data := entry.get("data"), list):
        raise invalid(f"{where}'data' must be a list, or binary_data_size must be given.")
    flat = _flatten(data, shape, where)
    strangers = {type(item) for item in flat} - _ELEMENTS[spec.dtype.kind]
    if strangers:
        found = min(kind.__name__ for kind in strangers)
        raise invalid(f"{where}'data' holds {found}, which is no {spec.datatype}.")
    try:
        with np.errstate(over="ignore"):  # too large a float becomes inf, which is refused
            return np.array(flat, dtype=spec.dtype).reshape(shape)
    except OverflowError:
        raise invalid(f"{where}'data' holds a number that {spec.datatype} cannot.") from None


def _flatten(data: list[Any], shape: Sequence[int], where: str) -> list[Any]:
    """Return `data` in row-major order; it may be flat, or nested as deep as `shape`."""
    wanted = math.prod(shape)
    if len(data) == wanted and not any(isinstance(item, list) for item in data):
        return data
    level = data
    for depth, size in enumerate(shape):
        if depth:
            if not all(isinstance(part, list) and len(part) == size for part in level):
                raise invalid(f"{where}'data' does not have the shape {list(shape)}.")
            level = list(chain.from_iterable(level))
        elif len(level) != size:
            raise invalid(
                f"{where}'data' has {len(data)} entries, and the shape {list(shape)} "
                f"takes {wanted}."
            )
    return level


def _read_outputs(entries: list[Any], names: Sequence[str], *, binary: bool) -> dict[str, bool]:
    if not entries:
        return dict.fromkeys(names, binary)
    wanted: dict[str, bool] = {}
    for name, entry in _named(entries, "outputs"):
        if name not in names:
            raise invalid(f"unknown output {shown(name)}: the model gives {', '.join(names)}.")
        if name in wanted:
            raise invalid(f"output {name!r} is asked for twice.")
        where = f"output {name!r}: "
        own = take(_parameters(entry, where), "binary_data", bool, where)
        wanted[name] = binary if own is None else own
    return wanted


def _refuse(parameters: dict[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        if parameters.get(name):
            raise invalid(f"{where}the parameter {name!r} is not supported by this server.")


def check_encoding(content_encoding: str | None) -> None:
    """Raise a 415 for a compressed body: a small one could unpack to a very large one."""
    if content_encoding not in (None, "", "identity"):
        raise unsupported(
            f"Content-Encoding {shown(content_encoding)} is not accepted: send it plain."
        )
