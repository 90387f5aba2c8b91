"""What every converted graph must still be: sound, standard, the same interface, our own weights."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from mdpd_deploy.errors import ExportError
from mdpd_deploy.graphs.signature import type_and_shape

# Rounding to the type, relative to the number, and the numbers too small for the type.
_ROUNDING = {"float16": (2.0**-10, 1e-7), "bfloat16": (2.0**-7, 1e-30), "float32": (0.0, 0.0)}
_HALF_LARGEST = 65504.0  # beyond it converters clip: a mask's -3.4e38 becomes this


def check_converted(source: Path, converted: Path, precision: str) -> None:
    """Check a converted file against the FP32 graph it claims to come from.

    Raises:
        ExportError: If it is damaged, needs more than the ONNX standard, takes or gives something
            else, or holds a floating-point weight that is not a rounded one of the source.
    """
    try:
        proto = onnx.load(converted, load_external_data=False)
        if any(tensor.data_location == tensor.EXTERNAL for tensor in proto.graph.initializer):
            raise ExportError(f"--precision {precision}: the converted file keeps weights outside.")
        onnx.checker.check_model(str(converted), full_check=True)
    except ExportError:
        raise
    except Exception as err:  # protobuf's and the checker's errors have no common base
        reason = str(err).strip().splitlines() or [type(err).__name__]
        raise ExportError(
            f"--precision {precision}: the converted file is not a sound ONNX graph ({reason[0]})."
        ) from err
    before = onnx.load(source)
    domains = {entry.domain for entry in proto.opset_import} | {n.domain for n in proto.graph.node}
    if domains - {"", "ai.onnx"} or proto.functions:
        raise ExportError(
            f"--precision {precision}: the converted graph needs operators outside the ONNX "
            f"standard: {', '.join(sorted(domains - {''})) or 'functions'}."
        )
    for what, found, expected in (
        ("inputs", proto.graph.input, before.graph.input),
        ("outputs", proto.graph.output, before.graph.output),
    ):
        found, expected = (
            [(value.name, *type_and_shape(value)) for value in values]
            for values in (found, expected)
        )
        if found != expected:
            raise ExportError(
                f"--precision {precision}: the converted graph has other {what} than the exported "
                f"one: {found}, expected {expected}."
            )
    _check_weights(before, proto, precision)


def _check_weights(before: onnx.ModelProto, after: onnx.ModelProto, precision: str) -> None:
    """Every floating-point vector or matrix must be a weight of ours, rounded."""
    own: dict[tuple[int, ...], list[NDArray[Any]]] = {}
    for tensor in before.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            own.setdefault(array.shape, []).append(array)
    scales = {name for n in after.graph.node if "quantize" in n.op_type.lower() for name in n.input}
    integer = any(n.op_type in ("MatMulInteger", "ConvInteger") for n in after.graph.node)
    for tensor in after.graph.initializer:
        array = numpy_helper.to_array(tensor)
        kind = str(array.dtype)
        if kind not in _ROUNDING or array.size == 1 or tensor.name in scales:
            continue
        if integer and tensor.name.endswith("_scale"):  # of the weight, applied by a Mul
            continue
        found = array.astype(np.float32)
        if not any(_rounded(found, one, kind) for one in own.get(array.shape, ())):
            raise ExportError(
                f"--precision {precision}: weight {tensor.name!r} of the converted graph is none "
                "of the exported model's."
            )


def _rounded(found: NDArray[np.float32], own: NDArray[np.float32], kind: str) -> bool:
    relative, tiny = _ROUNDING[kind]
    own = own.clip(-_HALF_LARGEST, _HALF_LARGEST) if kind == "float16" else own
    return bool((np.abs(found - own) <= relative * np.abs(own) + tiny).all())
