"""`config.pbtxt` of Triton models, complete enough for `--disable-auto-complete-config`.

A configuration is a plain dictionary in the words of Triton's `ModelConfig` message; `to_pbtxt`
writes it as protobuf text. With `max_batch_size` above 0 Triton's `dims` leave the batch axis out; an
input that is nothing but the batch axis is given as one number per row and reshaped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mdpd_deploy.artifacts.manifest import Port

Backend = Literal["onnxruntime", "tensorrt"]
Device = Literal["cpu", "cuda"]
Shapes = Mapping[str, tuple[int, ...]]  # by input, batch axis first
BACKENDS: tuple[Backend, ...] = ("onnxruntime", "tensorrt")
LABELS_FILE = "labels.txt"

_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}


class Word(str):
    """A bare word of the protobuf text format: an enumerator."""


@dataclass(frozen=True)
class TritonOptions:
    """What a user can ask of a repository.

    Attributes:
        backend: Which of Triton's backends runs the graph; None: tensorrt for a bundle with an
            engine, else onnxruntime.
        device: Where the graph runs, cpu or cuda; None: cuda for an engine, else cpu.
        instances: Copies of the graph that run at the same time (per GPU).
        max_delay_ms: How long a request may wait for others to share its batch.
        max_queue: Requests that may wait; further ones are refused.
        timeout_ms: A request that waited this long is refused.
        preprocess: Whether raw pictures or texts are accepted too, through an ensemble.
    """

    backend: Backend | None = None
    device: Device | None = None
    instances: int = 1
    max_delay_ms: float = 1.0
    max_queue: int = 256
    timeout_ms: float = 1000.0
    preprocess: bool = True


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a graph, and the shapes that it is run with.

    Attributes:
        inputs: Every input; the first axis is the batch.
        outputs: Every output.
        profiles: Shapes of all inputs by "min", "opt" and "max".
    """

    inputs: Sequence[Port]
    outputs: Sequence[Port]
    profiles: Mapping[str, Shapes]

    @property
    def max_batch(self) -> int:
        """Most rows of one run."""
        return _batch_of(self.profiles["max"])

    def rows(self) -> dict[str, tuple[int, Shapes]]:
        """Return the distinct profiles: rows of a batch, and the shape of one row of each input."""
        found: dict[str, tuple[int, Shapes]] = {}
        for bound, shapes in self.profiles.items():
            rows = {name: shape[1:] or (1,) for name, shape in shapes.items()}
            if (_batch_of(shapes), rows) not in found.values():
                found[bound] = (_batch_of(shapes), rows)
        return found


def graph_config(
    name: str, signature: Signature, backend: Backend, options: TritonOptions, *, labelled: bool
) -> dict[str, Any]:
    """Return the configuration of the model itself.

    Args:
        name: The model's name, that of its folder.
        signature: The graph's inputs and outputs.
        backend: Triton's backend.
        options: See `TritonOptions`.
        labelled: Whether the output's columns are the classes in `LABELS_FILE`.
    """
    outputs = [_port(port) for port in signature.outputs]
    if labelled:
        outputs[0]["label_filename"] = LABELS_FILE
    on_gpu = backend == "tensorrt" or options.device == "cuda"
    return {
        "name": name,
        "backend": backend,
        "max_batch_size": signature.max_batch,
        "version_policy": {"latest": {"num_versions": 1}},
        "input": [_port(port) for port in signature.inputs],
        "output": outputs,
        "instance_group": [
            {"count": options.instances, "kind": Word("KIND_GPU" if on_gpu else "KIND_CPU")}
        ],
        "dynamic_batching": _batching(options, options.max_delay_ms),
        "model_warmup": _warmups(signature),
    }


def preprocess_config(
    name: str,
    raw: dict[str, Any],
    outputs: Sequence[Port],
    signature: Signature,
    options: TritonOptions,
) -> dict[str, Any]:
    """Return the configuration of the Python model that turns raw inputs into the graph's."""
    ragged = any(isinstance(axis, str) for port in outputs for axis in port.shape[1:])
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": signature.max_batch,
        "version_policy": {"latest": {"num_versions": 1}},
        "input": [raw],
        "output": [_port(port) for port in outputs],
        "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],
        # Texts that wait together are padded to one length, and so can share the graph's batch.
        "dynamic_batching": _batching(options, options.max_delay_ms if ragged else 0.0),
    }


def ensemble_config(name: str, graph: dict[str, Any], preprocess: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of preprocessing followed by the graph, as one model."""
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": graph["max_batch_size"],
        "version_policy": {"latest": {"num_versions": 1}},
        "input": preprocess["input"],
        "output": graph["output"],
        "ensemble_scheduling": {"step": [_step(preprocess), _step(graph)]},
    }


def raw_input(fields: Sequence[str]) -> dict[str, Any]:
    """Return the raw input of one row: an encoded picture, a text, or a pair of texts."""
    return {
        "name": fields[0],
        "data_type": Word("TYPE_STRING"),
        "dims": [len(fields)],
    }


def warmup_file(port: Port, dims: Sequence[int]) -> str:
    """Return the name, below `warmup/`, of one row of an input."""
    return f"{port.name}-{'x'.join(map(str, dims))}"


def to_pbtxt(message: Mapping[str, Any]) -> str:
    """Write a message as protobuf text.

    Args:
        message: Numbers, strings, `Word`s, messages, and lists of them. A mapping field is a list
            of messages with `key` and `value`.
    """
    return "".join(f"{line}\n" for line in _lines(message))


def _port(port: Port) -> dict[str, Any]:
    dims = [-1 if isinstance(axis, str) else axis for axis in port.shape[1:]]
    plain = {"name": port.name, "data_type": Word(_TYPES[port.dtype]), "dims": dims or [1]}
    return plain if dims else {**plain, "reshape": {"shape": []}}


def _batching(options: TritonOptions, delay_ms: float) -> dict[str, Any]:
    return {
        "max_queue_delay_microseconds": round(1000 * delay_ms),
        "default_queue_policy": {
            "timeout_action": Word("REJECT"),
            "default_timeout_microseconds": round(1000 * options.timeout_ms),
            "allow_timeout_override": True,
            "max_queue_size": options.max_queue,
        },
    }


def _warmups(signature: Signature) -> list[dict[str, Any]]:
    """One request per profile; Triton repeats the one row of each file to fill the batch."""
    return [
        {
            "name": bound,
            "batch_size": batch,
            "inputs": [
                {
                    "key": port.name,
                    "value": {
                        "data_type": Word(_TYPES[port.dtype]),
                        "dims": list(rows[port.name]),
                        "input_data_file": warmup_file(port, rows[port.name]),
                    },
                }
                for port in signature.inputs
            ],
        }
        for bound, (batch, rows) in signature.rows().items()
    ]


def _batch_of(shapes: Shapes) -> int:
    return next(iter(shapes.values()))[0]


def _step(config: Mapping[str, Any]) -> dict[str, Any]:
    """A step whose tensors carry the same names inside the ensemble."""
    return {
        "model_name": config["name"],
        "model_version": -1,
        "input_map": [{"key": p["name"], "value": p["name"]} for p in config["input"]],
        "output_map": [{"key": p["name"], "value": p["name"]} for p in config["output"]],
    }


def _lines(message: Mapping[str, Any], indent: str = "") -> list[str]:
    lines: list[str] = []
    for name, value in message.items():
        if isinstance(value, list) and not any(isinstance(item, Mapping) for item in value):
            lines.append(f"{indent}{name}: [{', '.join(map(_scalar, value))}]")
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                lines += [f"{indent}{name} {{", *_lines(item, indent + "  "), f"{indent}}}"]
            else:
                lines.append(f"{indent}{name}: {_scalar(item)}")
    return lines


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Word | int):
        return str(value)
    return json.dumps(value, ensure_ascii=False)
