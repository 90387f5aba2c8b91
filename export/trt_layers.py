"""The layers of a built engine: in which numbers it really computes.

The inspector's JSON changed with TensorRT 11: `Bindings` became `I/O Tensors`, and the one field
`Format/Datatype` became two. Both are read.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mdpd_deploy.errors import ExportError, VerificationError

_TYPES = {
    "float": "fp32", "fp32": "fp32", "half": "fp16", "fp16": "fp16", "bf16": "bf16",
    "bfloat16": "bf16", "fp8": "fp8", "fp4": "fp4", "int8": "int8", "int4": "int4",
    "int32": "int32", "int64": "int64", "uint8": "uint8", "bool": "bool",
}  # fmt: skip
_WORD = re.compile(r"[a-z]+\d*", re.IGNORECASE)
_FLOATS = frozenset({"fp32", "fp16", "bf16", "fp8", "fp4", "int8", "int4"})
# What a precision must show among its layers, and what may stand beside it.
_WANTED = {"fp32": {"fp32"}, "fp16": {"fp16"}, "bf16": {"bf16"}, "int8-trt": {"int8"}}
_BESIDE = {"fp16": {"fp32"}, "bf16": {"fp32"}, "int8-trt": {"fp32", "fp16", "bf16"}}


@dataclass(frozen=True)
class LayerReport:
    """What the inspector says.

    Attributes:
        layers: How many.
        by_type: Layers by the type of their first output; "unknown" where it is not told.
        tensors: Type of every input and output of the engine, where it is told.
        fp32_islands: Names of FP32 layers in an engine of another precision, at most 20.
    """

    layers: int
    by_type: dict[str, int]
    tensors: dict[str, str]
    fp32_islands: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def inspect_layers(trt: Any, engine: Any, precision: str) -> LayerReport:
    """Read the layers of an engine that was built with detailed verbosity.

    Raises:
        ExportError: If the inspector's answer is not the JSON that it promises.
    """
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        return read_report(json.loads(text), precision)
    except (ValueError, AttributeError, TypeError) as err:
        raise ExportError(
            f"TensorRT {trt.__version__} describes the engine's layers in a form that this version "
            f"of mdpd-deploy cannot read: {err}."
        ) from err


def read_report(plain: dict[str, Any], precision: str) -> LayerReport:
    """Read the inspector's JSON of TensorRT 10 or 11."""
    layers = plain.get("Layers", [])
    types = [(_name(layer), _layer_type(layer)) for layer in layers]
    islands = [name for name, kind in types if kind == "fp32"] if precision != "fp32" else []
    return LayerReport(
        layers=len(layers),
        by_type=dict(Counter(kind for _, kind in types).most_common()),
        tensors=dict(_tensors(plain)),
        fp32_islands=islands[:20],
    )


def check_precision(report: LayerReport, precision: str) -> None:
    """Raise `VerificationError` unless the engine computes in the precision that was asked for."""
    if precision not in _WANTED:
        return
    found = {kind for kind in report.by_type if kind in _FLOATS}
    strange = found - _WANTED[precision] - _BESIDE.get(precision, set())
    if strange:
        raise VerificationError(
            f"precision: {precision} was asked for, but the engine has {min(strange)} layers: "
            f"{report.by_type}."
        )
    if found and not found & _WANTED[precision]:
        raise VerificationError(
            f"precision: {precision} was asked for, but no layer of the engine computes in it: "
            f"{report.by_type}."
        )


def _name(layer: Any) -> str:
    return str(layer.get("Name", "")) if isinstance(layer, dict) else str(layer)


def _layer_type(layer: Any) -> str:
    outputs = layer.get("Outputs") if isinstance(layer, dict) else None
    return _tensor_type(outputs[0]) if outputs else "unknown"


def _tensor_type(tensor: dict[str, Any]) -> str:
    """Find the type in whatever field tells it, e.g. "Row major linear FP16 format"."""
    fields = {key.replace(" ", "").lower(): value for key, value in tensor.items()}
    for key in ("datatype", "format/datatype", "format"):
        for word in _WORD.findall(str(fields.get(key, ""))):
            if word.lower() in _TYPES:
                return _TYPES[word.lower()]
    return "unknown"


def _tensors(plain: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for tensor in plain.get("I/O Tensors", []):  # 11
        yield str(tensor["Name"]), _tensor_type(tensor)
    bound = set(plain.get("Bindings", []))  # 10: names; their types are told by the layers
    for layer in plain.get("Layers", []):
        ports = (
            [*layer.get("Inputs", []), *layer.get("Outputs", [])] if isinstance(layer, dict) else []
        )
        for tensor in ports:
            if tensor.get("Name") in bound:
                yield tensor["Name"], _tensor_type(tensor)
