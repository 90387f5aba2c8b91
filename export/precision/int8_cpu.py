"""int8 for ONNX Runtime on the CPU: weights int8 per channel, activations quantised as they come.

Dynamic rather than static: it needs no calibration data, and its ranges fit inputs that calibration
never saw; benchmarks/precision.py times a static form beside it. The graph stays in the default
domain (DynamicQuantizeLinear, MatMulInteger, DequantizeLinear).
"""

from pathlib import Path

import onnx

from mdpd_deploy.export.precision.material import Material
from mdpd_deploy.export.precision.runtime_tools import quantization

# Convolutions stay: the only one is the patch embedding, small and the first to lose precision.
OPERATORS = ["MatMul", "Gemm", "Gather"]


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
