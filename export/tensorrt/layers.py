"""The layers of a built engine: in which numbers it really computes.

The inspector's JSON changed with TensorRT 11: `Bindings` became `I/O Tensors`, and the one field
`Format/Datatype` became two. Both are read.

Work is what multiplies matrices: such a layer computes in the narrowest numbers that it reads (with
8-bit inputs it may well write float32). All other layers count by what they write.
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
_NUMBERS = ("int4", "fp4", "int8", "fp8", "bf16", "fp16", "fp32")  # from narrow to wide
_PRODUCT = re.compile(r"gemm|matmul|matrixmul|fullyconnected|einsum|mha|conv(?!er)", re.IGNORECASE)
_MOVES = re.compile(r"reformat|copy|noop|constant|shuffle|cast", re.IGNORECASE)
# Of the layers with matrix products. Not all: for int8 attention's own products stay FP32, two of
# the six to eight in a block, AutoCast leaves some out, and fusion makes one layer of several.
LEAST_SHARE = 0.5
# What a precision must show among its layers, and what may stand beside it.
_WANTED = {"fp32": {"fp32"}, "fp16": {"fp16"}, "bf16": {"bf16"}, "int8-trt": {"int8"}}
_BESIDE = {"fp16": {"fp32"}, "bf16": {"fp32"}, "int8-trt": {"fp32", "fp16", "bf16"}}


@dataclass(frozen=True)
class LayerReport:
    """Layers of an engine by the numbers that they compute in.

    Attributes:
        layers: How many.
        by_type: Layers by the narrowest type of number among their outputs; "unknown" where none
            is told.
        products: Of these, the layers that multiply matrices, by the type that they compute in.
        tensors: Type of every input and output of the engine, where it is told.
        fp32_islands: Names of FP32 layers in an engine of another precision, at most 20.
    """

    layers: int
    by_type: dict[str, int]
    products: dict[str, int]
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
    types = [(_name(layer), _written(layer)) for layer in layers]
    products = [_read(layer) for layer in layers if _multiplies(layer)]
    islands = [name for name, kind in types if kind == "fp32"] if precision != "fp32" else []
    return LayerReport(
        layers=len(layers),
        by_type=dict(Counter(kind for _, kind in types).most_common()),
        products=dict(Counter(products).most_common()),
        tensors=dict(_tensors(plain)),
        fp32_islands=islands[:20],
    )


def check_precision(report: LayerReport, precision: str) -> None:
    """Raise `VerificationError` unless the engine shows the precision that was asked for.

    Of the layers that multiply matrices at least `LEAST_SHARE` must be known to compute in it; where
    no layer is told to be one, of all layers whose numbers are told.
    """
    if precision not in _WANTED:
        return
    told = {kind: count for kind, count in report.by_type.items() if kind in _NUMBERS}
    found = {*told, *report.products} & set(_NUMBERS)
    if not found:
        raise VerificationError(
            f"precision: TensorRT does not tell in which numbers any of the engine's {report.layers} "
            f"layers computes, so nothing shows that it is {precision}."
        )
    strange = found - _WANTED[precision] - _BESIDE.get(precision, set())
    if strange:
        raise VerificationError(
            f"precision: {precision} was asked for, but the engine has {min(strange)} layers: "
            f"{report.by_type}."
        )
    counted = report.products or told
    right, total = sum(counted.get(kind, 0) for kind in _WANTED[precision]), sum(counted.values())
    if right < LEAST_SHARE * total:
        what = "layers with matrix products" if report.products else "layers"
        raise VerificationError(
            f"precision: {precision} was asked for, but only {right} of {total} {what} compute in "
            f"it: {counted}."
        )


def _name(layer: Any) -> str:
    return str(layer.get("Name", "")) if isinstance(layer, dict) else str(layer)


def _multiplies(layer: Any) -> bool:
    """Whether a layer computes matrix products, by its kind or, in a fusion, by its name."""
    kind = str(layer.get("LayerType", "")) if isinstance(layer, dict) else ""
    if _PRODUCT.search(kind):
        return True
    return not _MOVES.search(kind) and bool(_PRODUCT.search(_name(layer)))


def _read(layer: Any) -> str:
    """Return the narrowest type of number that a layer reads; what it writes if that is not told."""
    found = _narrowest(_ports(layer, "Inputs"))
    return _written(layer) if found == "unknown" else found


def _written(layer: Any) -> str:
    """Return the narrowest type of number among a layer's outputs, or what else they are."""
    return _narrowest(_ports(layer, "Outputs"))


def _narrowest(tensors: list[Any]) -> str:
    kinds = [_tensor_type(tensor) for tensor in tensors]
    order = {kind: place for place, kind in enumerate(_NUMBERS)}
    told = [kind for kind in kinds if kind != "unknown"]
    return min(told, key=lambda kind: order.get(kind, len(order)), default="unknown")


def _ports(layer: Any, side: str) -> list[Any]:
    return list(layer.get(side) or ()) if isinstance(layer, dict) else []


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
        for tensor in (*_ports(layer, "Inputs"), *_ports(layer, "Outputs")):
            if tensor.get("Name") in bound:
                yield tensor["Name"], _tensor_type(tensor)
