"""fp16 and int8 for ONNX Runtime on the CPU, by its own converters.

fp16 is half the file and no speed. int8 is dynamic rather than static: it needs no calibration data,
and its ranges fit inputs that calibration never saw; benchmarks/precision.py times a static form
beside it. That graph stays in the default domain (DynamicQuantizeLinear, MatMulInteger,
DequantizeLinear).
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from mdpd_deploy.errors import missing_extra
from mdpd_deploy.export.precision.material import Material

# Convolutions stay: the only one is the patch embedding, small and the first to lose precision.
OPERATORS = ["MatMul", "Gemm", "Gather"]


def fp16_for_size(source: Path, target: Path, material: Material) -> str:
    """Write the float16 graph with float32 inputs and outputs; see `Form.convert`.

    The converter leaves the nodes that it adds at the end of the list, so they are put in order.
    """
    half = _float16().convert_float_to_float16(onnx.load(source), keep_io_types=True)
    _order(half.graph)
    onnx.save(half, target)
    return "ONNX Runtime's float16 converter"


def quantise_dynamic(source: Path, target: Path, material: Material) -> str:
    """Write the dynamically quantised graph; see `Form.convert`."""
    tools = quantization()
    proto = onnx.load(source)
    del proto.graph.value_info[:]  # the quantiser's shape inference fails on what torch wrote there
    tools.quantize_dynamic(
        proto,
        target,
        op_types_to_quantize=OPERATORS,
        per_channel=True,
        weight_type=tools.QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )
    return "ONNX Runtime dynamic quantisation, per channel"


def quantization() -> Any:
    """Return `onnxruntime.quantization`.

    Raises:
        UserError: If ONNX Runtime is not installed.
    """
    try:
        import onnxruntime.quantization as tools
    except ImportError as err:
        raise missing_extra("onnxruntime", "onnx", "converting a graph") from err
    return tools


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the converters log on the root logger, and their warnings."""
    before = logging.root.manager.disable
    silent = logging.NullHandler()  # without a handler, logging would install one for good
    logging.root.addHandler(silent)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        logging.root.removeHandler(silent)


def _float16() -> Any:
    try:
        import onnxruntime.transformers.float16 as tools
    except ImportError as err:
        raise missing_extra("onnxruntime", "onnx", "converting a graph") from err
    return tools


def _order(graph: onnx.GraphProto) -> None:
    """Sort the nodes so that each comes after those whose values it reads."""
    known = {"", *(t.name for t in graph.initializer), *(value.name for value in graph.input)}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        assert ready, "a graph without cycles always has a node that can run"
        ordered.append(ready[0])
        known.update(ready[0].output)
        waiting.remove(ready[0])
    del graph.node[:]
    graph.node.extend(ordered)
