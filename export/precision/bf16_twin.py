"""A bf16 graph that a CPU can run: float32 arithmetic, every bfloat16 value rounded as it is made.

ONNX Runtime has no bfloat16 kernels on the CPU, so a bf16 graph for TensorRT could not be held to
any gate without a GPU. Its twin has the same weights and rounds the same values; only the sums
inside a product keep float32, as tensor cores keep them.
"""

from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

from mdpd_deploy.export.precision.weight_report import value_types


def write_twin(source: Path, target: Path) -> Path:
    """Write the float32 twin of a bf16 graph and return `target`."""
    proto = onnx.load(source)
    graph, types = proto.graph, value_types(proto)
    del graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.BFLOAT16:
                values = numpy_helper.to_array(attribute.t).astype("float32")
                attribute.t.CopyFrom(numpy_helper.from_array(values))
        nodes.append(node)
        for index, name in enumerate(node.output):
            if types.get(name) == TensorProto.BFLOAT16:
                node.output[index] = f"{name}.exact"
                nodes += _rounding(f"{name}.exact", name)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    onnx.save(proto, target)
    return target


def _rounding(exact: str, name: str) -> list[onnx.NodeProto]:
    rounded = f"{name}.bf16"
    return [
        helper.make_node("Cast", [exact], [rounded], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT),
    ]
