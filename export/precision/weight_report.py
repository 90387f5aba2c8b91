"""The weight report: what a graph really holds and computes, counted in the file.

A conversion that quietly left the graph in FP32 is a failure, not a slower success.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mdpd_deploy.errors import ExportError
from mdpd_deploy.runtimes.onnx import COMPUTE_OPS

LEAST_SHARE = 0.9  # of the numbers in weights of matrix products
INTEGER = frozenset({"MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"})
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"}) | INTEGER
_MOVES = frozenset({"Transpose", "Reshape"})
_PASSES_ON = frozenset({"Cast", "DequantizeLinear", "QuantizeLinear"}) | _MOVES


@dataclass(frozen=True)
class WeightReport:
    """Weights and compute nodes of a graph, counted by type.

    Attributes:
        asked: Type that was asked for, by ONNX's name.
        weight_bytes: Bytes of all weights by type.
        compute_nodes: Nodes that do the arithmetic (`COMPUTE_OPS` and their integer forms) by the
            type they compute in.
        fp32_islands: Those that compute in float32 although something else was asked.
        weights_share: Of the numbers in weights of matrix products, the share that is stored and
            computed in the type asked for.
    """

    asked: str
    weight_bytes: dict[str, int]
    compute_nodes: dict[str, int]
    fp32_islands: list[str]
    weights_share: float

    @property
    def met(self) -> bool:
        """Whether the graph is what was asked for."""
        return self.weights_share >= LEAST_SHARE

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        return {**asdict(self), "met": self.met}

    def islands_by_operator(self) -> str:
        """Write the islands in short, e.g. `16 MatMul, 8 Softmax`."""
        counts = Counter(name.partition(" ")[0] for name in self.fp32_islands)
        return ", ".join(f"{count} {operator}" for operator, count in counts.most_common())


def weight_report(path: Path, asked: str) -> WeightReport:
    """Count a graph's weights and compute nodes by type.

    Args:
        path: The `.onnx` file; weights beside it are counted without being read.
        asked: Type that weights of matrix products must have: float32, float16, bfloat16 or int8.
    """
    proto = onnx.load(path, load_external_data=False)
    graph = _Graph(proto)
    weight_bytes: Counter[str] = Counter()
    for tensor in proto.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        weight_bytes[_name(tensor.data_type)] += int(np.prod(tensor.dims)) * dtype.itemsize
    nodes: Counter[str] = Counter()
    islands, numbers, met = [], 0, 0
    for node in proto.graph.node:
        if node.op_type not in COMPUTE_OPS | INTEGER:
            continue
        computed = graph.computes_in(node)
        nodes[computed] += 1
        if computed == "float32" != asked:
            islands.append(f"{node.op_type} {node.name}")
        weight = graph.weight_of(node)
        if weight is not None:
            size = int(np.prod(weight.dims))
            numbers += size
            stored = _name(weight.data_type)
            met += size if computed == asked and stored in (asked, f"u{asked}") else 0
    share = met / numbers if numbers else 0.0
    return WeightReport(asked, dict(weight_bytes), dict(nodes), islands, share)


def require_met(report: WeightReport, precision: str) -> None:
    """Raise `ExportError` unless the graph is what was asked for."""
    if not report.met:
        raise ExportError(
            f"--precision {precision}: only {report.weights_share:.0%} of the weights in matrix "
            f"products became {report.asked}, {LEAST_SHARE:.0%} is asked "
            f"(in FP32: {report.islands_by_operator() or 'nothing'})."
        )


class _Graph:
    """Finds types and weights in a graph."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.weights = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.maker = {name: node for node in proto.graph.node for name in node.output}
        self.types = value_types(proto)

    def computes_in(self, node: onnx.NodeProto) -> str:
        if node.op_type in INTEGER or self._quantised(node):
            return "int8"
        return _name(self.types.get(node.output[0], onnx.TensorProto.UNDEFINED))

    def weight_of(self, node: onnx.NodeProto) -> onnx.TensorProto | None:
        """The weight that a matrix product reads, through what only stores or moves it."""
        return self._weight_behind(node.input[1]) if node.op_type in PRODUCTS else None

    def _quantised(self, node: onnx.NodeProto) -> bool:
        return len(node.input) > 1 and all(map(self._dequantised, node.input[:2]))

    def _dequantised(self, name: str) -> bool:
        """Whether a value is made of integers, and at most moved since."""
        maker = self.maker.get(name)
        if maker is not None and maker.op_type in _MOVES:
            return self._dequantised(maker.input[0])
        return maker is not None and maker.op_type == "DequantizeLinear"

    def _weight_behind(self, name: str) -> onnx.TensorProto | None:
        while name not in self.weights:
            maker = self.maker.get(name)
            if maker is None or maker.op_type not in _PASSES_ON:
                return None
            name = maker.input[0]
        return self.weights[name]


def value_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every value of a graph, weights included."""
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.graph.value_info[:]  # a converter may have left the types of before
    graph = onnx.shape_inference.infer_shapes(bare).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return {
        **{value.name: value.type.tensor_type.elem_type for value in values},
        **{tensor.name: tensor.data_type for tensor in graph.initializer},
    }


def _name(data_type: int) -> str:
    if data_type == onnx.TensorProto.UNDEFINED:
        return "unknown"
    return str(onnx.helper.tensor_dtype_to_np_dtype(data_type))
