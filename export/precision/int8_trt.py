"""int8 for TensorRT: explicit symmetric Q/DQ around every product with a weight.

Weights are int8 per output channel, activations int8 per tensor with ranges from the task's own
training inputs, all zero points 0. Products of two activations (attention) stay FP32, and so do
biases: TensorRT dequantises no int32.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from mdpd_deploy.errors import ExportError
from mdpd_deploy.export.precision.material import Calibration, Material
from mdpd_deploy.export.precision.onnxruntime_cpu import quantization
from mdpd_deploy.runtimes.base import Arrays

OPERATORS = ["MatMul", "Gemm", "Conv"]
FOREIGN = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinear")


def quantise_symmetric(source: Path, target: Path, material: Material) -> str:
    """Write the Q/DQ graph and check its form; see `Form.convert`."""
    calibration = material.calibration()
    quantise_static(source, target, calibration, symmetric=True)
    check_symmetric(onnx.load(target))
    return f"symmetric Q/DQ, ranges from {calibration.source}"


def quantise_static(
    source: Path, target: Path, calibration: Calibration, *, symmetric: bool
) -> None:
    """Write a statically quantised graph in Q/DQ form.

    Args:
        source: The FP32 graph.
        target: The file to write.
        calibration: Inputs to read the ranges of activations from.
        symmetric: int8 activations around 0, as TensorRT wants; else uint8, as a CPU likes it.
    """
    tools = quantization()
    proto = onnx.load(source)
    del proto.graph.value_info[:]  # the quantiser's shape inference fails on what torch wrote there
    weights = {tensor.name for tensor in proto.graph.initializer}
    products = [n for n in proto.graph.node if n.op_type == "MatMul"]
    batches: Iterator[Arrays] = iter(calibration.batches)

    reads = {"get_next": lambda self: next(batches, None)}
    reader = type("Reader", (tools.CalibrationDataReader,), reads)()
    tools.quantize_static(
        proto,
        target,
        reader,
        quant_format=tools.QuantFormat.QDQ,
        op_types_to_quantize=OPERATORS,
        per_channel=True,
        activation_type=tools.QuantType.QInt8 if symmetric else tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt8,
        nodes_to_exclude=[n.name for n in products if n.input[1] not in weights],
        extra_options={
            "ActivationSymmetric": symmetric,
            "WeightSymmetric": True,
            "QuantizeBias": not symmetric,
            "OpTypesToExcludeOutputQuantization": OPERATORS,
        },
    )


def check_symmetric(proto: onnx.ModelProto) -> None:
    """Refuse a graph that TensorRT's explicit quantisation would.

    Raises:
        ExportError: If it holds an integer operator, a zero point that is not int8 0, a scale that
            is not positive, a matrix quantised as a whole, or nothing quantised at all.
    """
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    pairs = [n for n in proto.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in proto.graph.node:
        if node.op_type.startswith(FOREIGN):
            raise ExportError(f"int8-trt: {node.name} is a {node.op_type}, which TensorRT refuses.")
    if not pairs:
        raise ExportError("int8-trt: nothing in the graph is quantised.")
    for node in pairs:
        scale, zero = (values.get(name) for name in [*node.input, "", ""][1:3])
        if scale is None or zero is None or zero.dtype != np.int8 or zero.any():
            raise ExportError(f"int8-trt: {node.name} is not symmetric int8 (zero point 0).")
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ExportError(f"int8-trt: {node.name} has a scale that is not a positive number.")
        weight = values.get(node.input[0])
        if weight is not None and scale.size == 1 < min(weight.shape, default=1):
            raise ExportError(f"int8-trt: {node.name} quantises its weight not per channel.")
