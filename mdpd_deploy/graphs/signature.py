"""What two ONNX graphs must share to be the same graph with other weights.

The exporter merges equal initialisers (on an untuned model most norms are ones and zeros), so
weights are looked at where they are used, not by name: that un-shares them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import external_data_helper, numpy_helper

from mdpd_deploy.files import Read

TypeAndShape = tuple[int, tuple[str, ...]]


@dataclass(frozen=True)
class Weight:
    """One use of an initialiser.

    Floating-point values may differ between two graphs of one structure; whole numbers (axes,
    shapes, slices) are structure.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    digest: str

    @property
    def structure(self) -> tuple[Any, ...]:
        """What must be equal."""
        floating = self.dtype in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
        return ("weight", self.dtype, self.shape, "" if floating else self.digest)


@dataclass(frozen=True)
class Node:
    """One operator: inputs are weights, or `("value", where it was made)`."""

    name: str
    operator: str
    attributes: tuple[tuple[str, str], ...]
    inputs: tuple[Weight | tuple[str, str], ...]
    outputs: tuple[TypeAndShape | None, ...]

    @property
    def structure(self) -> tuple[Any, ...]:
        """What must be equal."""
        inputs = tuple(i.structure if isinstance(i, Weight) else i for i in self.inputs)
        return (self.operator, self.attributes, inputs, self.outputs)


@dataclass(frozen=True)
class Signature:
    """A graph with the names of its nodes and values taken away."""

    inputs: tuple[tuple[str, TypeAndShape], ...]
    outputs: tuple[tuple[str, TypeAndShape, tuple[str, str]], ...]
    nodes: tuple[Node, ...]
    opset: int
    beyond: tuple[str, ...] = ()  # what an export of ours has nothing of; see `_beyond`

    @property
    def weights(self) -> list[Weight]:
        """Every use of an initialiser, in order."""
        return [item for node in self.nodes for item in node.inputs if isinstance(item, Weight)]

    @property
    def structure_sha256(self) -> str:
        """Hex SHA-256 of all that `same_structure` compares: equal for equal structures."""
        nodes = [node.structure for node in self.nodes]
        beyond = [self.beyond] if self.beyond else []
        return _sha256_of([self.opset, self.inputs, self.outputs, nodes, *beyond])

    @property
    def values_sha256(self) -> str:
        """Hex SHA-256 of the values of all weights: equal where those of every use are."""
        return values_sha256(weight.digest for weight in self.weights)

    @property
    def digests(self) -> dict[str, str]:
        """Both, as the fade certificate keeps them of the graph that is deployed."""
        return {"structure_sha256": self.structure_sha256, "values_sha256": self.values_sha256}


def graph_signature(path: Path, read: Read | None = None) -> Signature:
    """Read a graph and return its signature.

    Args:
        path: The `.onnx` file; weights outside it are read beside it.
        read: How the files are read; None = from the disk, one weight at a time.
    """
    proto = onnx.load_model_from_string((read or Path.read_bytes)(path))
    graph = proto.graph
    weight_of = _weight_reader(graph, path.parent, read)
    types = {v.name: type_and_shape(v) for v in (*graph.value_info, *graph.input, *graph.output)}
    made = {value.name: ("value", f"input {value.name}") for value in graph.input}
    made[""] = ("value", "absent")
    nodes = []
    for index, node in enumerate(graph.node):
        inputs = tuple(made[name] if name in made else weight_of(name) for name in node.input)
        attributes = tuple(sorted((a.name, _attribute_text(a)) for a in node.attribute))
        outputs = tuple(types.get(name) for name in node.output)
        operator = f"{node.domain}:{node.op_type}"
        nodes.append(Node(node.name, operator, attributes, inputs, outputs))
        made.update({name: ("value", f"{index}.{i}") for i, name in enumerate(node.output) if name})
    return Signature(
        inputs=tuple((value.name, types[value.name]) for value in graph.input),
        outputs=tuple((value.name, types[value.name], made[value.name]) for value in graph.output),
        nodes=tuple(nodes),
        opset=proto.opset_import[0].version,
        beyond=tuple(_beyond(proto)),
    )


def _beyond(proto: onnx.ModelProto) -> Iterator[str]:
    """Yield all that decides what operators mean beside the version of ONNX's own.

    Another set of operators, a second version of the same, functions that stand for operators, and
    what else a graph may carry to be run.
    """
    first, *others = proto.opset_import
    if first.domain or others:
        yield from (f"opset {entry.domain}:{entry.version}" for entry in proto.opset_import)
    graph = proto.graph
    for message in (*proto.functions, *proto.training_info, *graph.sparse_initializer):
        raw: bytes = message.SerializeToString(deterministic=True)
        yield hashlib.sha256(raw).hexdigest()


def same_structure(a: Path, b: Path) -> list[str]:
    """Return how the structure of two graphs differs, in words; empty when it is the same.

    Compared are inputs, outputs, operators with their attributes, how they are connected, and
    shape and type of every value; never the values of floating-point weights.
    """
    first, second = graph_signature(a), graph_signature(b)
    differences = [
        f"{what}: {left} and {right}"
        for what, left, right in (
            ("opset", first.opset, second.opset),
            ("operators beyond ONNX's own", first.beyond, second.beyond),
            ("inputs", first.inputs, second.inputs),
            ("number of nodes", len(first.nodes), len(second.nodes)),
            ("outputs", first.outputs, second.outputs),
        )
        if left != right
    ]
    for index, (left, right) in enumerate(zip(first.nodes, second.nodes, strict=False)):
        if left.structure != right.structure:
            differences.append(f"node {index}: {left.structure} and {right.structure}")
            break  # what follows a first difference is only its echo
    return differences


def changed_weights(a: Path, b: Path) -> list[str]:
    """Return the initialisers of `a` whose values differ in `b`, for graphs of one structure."""
    pairs = zip(graph_signature(a).weights, graph_signature(b).weights, strict=True)
    return list(dict.fromkeys(left.name for left, right in pairs if left.digest != right.digest))


def tensors_in(message: Any) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model, wherever it is: weights, attributes, subgraphs, functions."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for description, value in message.ListFields():
        if description.message_type is None:
            continue
        for item in [value] if hasattr(value, "ListFields") else value:
            yield from tensors_in(item)


def values_sha256(digests: Iterable[str]) -> str:
    """Return the hex SHA-256 of the values of all weights, from `Weight.digest` in order of use."""
    return _sha256_of(list(digests))


def value_digest(array: NDArray[Any]) -> str:
    """Return what `Weight.digest` is for a weight of these values."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _sha256_of(plain: Any) -> str:
    """Hash nested tuples and lists of strings, whole numbers and None."""
    return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).hexdigest()


def _weight_reader(
    graph: onnx.GraphProto, folder: Path, read: Read | None
) -> Callable[[str], Weight]:
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    seen: dict[str, Weight] = {}
    files: dict[str, bytes] = {}

    def weight_of(name: str) -> Weight:
        if name not in seen:
            tensor = tensors[name]
            if external_data_helper.uses_external_data(tensor):
                loaded = onnx.TensorProto()  # a copy, so that one tensor at a time is in memory
                loaded.CopyFrom(tensor)
                if read is None:
                    external_data_helper.load_external_data_for_tensor(loaded, str(folder))
                else:
                    loaded.raw_data = _part(tensor, folder, read, files)
                    loaded.data_location = onnx.TensorProto.DEFAULT
            else:
                loaded = tensor
            digest = value_digest(numpy_helper.to_array(loaded))
            seen[name] = Weight(name, tensor.data_type, tuple(tensor.dims), digest)
        return seen[name]

    return weight_of


def _part(tensor: onnx.TensorProto, folder: Path, read: Read, files: dict[str, bytes]) -> bytes:
    """Return a weight's bytes from the file beside the graph, which is read once."""
    where = external_data_helper.ExternalDataInfo(tensor)
    if where.location not in files:
        files[where.location] = read(folder / where.location)
    whole, start = files[where.location], where.offset or 0
    return whole[start : start + where.length if where.length else len(whole)]


def type_and_shape(value: onnx.ValueInfoProto) -> TypeAndShape:
    """Return the element type of a value and its dims, by name where they are dynamic."""
    tensor = value.type.tensor_type
    return tensor.elem_type, tuple(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)


def _attribute_text(attribute: onnx.AttributeProto) -> str:
    copy = onnx.AttributeProto()
    copy.CopyFrom(attribute)
    copy.doc_string = ""
    raw: bytes = copy.SerializeToString(deterministic=True)
    return raw.hex()
