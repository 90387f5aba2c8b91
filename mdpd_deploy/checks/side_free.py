"""Gates `side_free` and `parameters`: no side network in the graph, by name, use or count of numbers."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx

from mdpd_deploy.checks.mixed import recheck_parameters_of_tasks
from mdpd_deploy.checks.subject import DEPLOYS_MORE, TOO_OLD, Seen, Subject
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.graphs.signature import tensors_in

_SIDE = "side"  # what names of a side network's tensors start with
_NUMBERS = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8", "FLOAT8E4M3FN")
)


def prove(graph: Path, numbers: int, inside: Sequence[str]) -> Seen:
    """Look for a side network in the module, by name in the graph, and by count in the graph.

    Args:
        graph: The traced graph, FP32.
        numbers: How many numbers backbone and head hold.
        inside: Side networks in the module, by name.
    """
    proto = onnx.load(graph, load_external_data=False)
    strays = [*inside, *side_names(proto)]
    if strays:
        raise VerificationError(f"side_free: {strays[0]} belongs to the side network.")
    found = _floats(proto)
    if found > numbers + len(proto.graph.node):
        raise VerificationError(
            f"side_free: the graph holds {found} numbers, backbone and head only {numbers}."
        )
    details = {"graph_numbers": found, "model_numbers": numbers}
    return Seen("passed", "no side-network tensor in the graph", details)


def recheck(subject: Subject) -> Seen:
    """No weight is named as a side network's, hidden in a corner, or read by nothing."""
    if not subject.faded:
        return DEPLOYS_MORE
    graph = subject.graph.graph
    names = [tensor.name for tensor in graph.initializer]
    for stray in side_names(subject.graph):
        raise VerificationError(f"{stray!r} belongs to a side network")
    read = {name for node in graph.node for name in node.input}
    unread = sorted(set(names) - read - {value.name for value in graph.output})
    if unread:
        raise VerificationError(f"nothing reads the weight {unread[0]!r}")
    if subject.graph.functions or subject.graph.training_info or graph.sparse_initializer:
        raise VerificationError("the graph holds functions, training or sparse weights")
    return Seen("passed", f"none of {len(names)} weights belongs to a side network")


def recheck_parameters(subject: Subject) -> Seen:
    """Count the numbers that the graph holds, wherever in it they are."""
    if not subject.faded:
        return DEPLOYS_MORE
    if subject.bundle.mixed:
        return recheck_parameters_of_tasks(subject)
    record = subject.certificate.side_free
    if record is None:
        return TOO_OLD
    expected = record.model_numbers
    if subject.precision != "fp32":  # scales and zero points are added, but no matrix
        matrices = [t for t in tensors_in(subject.graph) if t.data_type in _NUMBERS]
        found = sum(math.prod(tensor.dims) for tensor in matrices if len(tensor.dims) > 1)
        if found > expected:
            raise VerificationError(f"matrices hold {found:,} numbers, the model {expected:,}")
        return Seen("passed", f"{found:,} numbers in matrices; backbone and head have {expected:,}")
    found = _floats(subject.graph)
    if found != record.graph_numbers or found > expected + len(subject.graph.graph.node):
        raise VerificationError(
            f"the graph holds {found:,} numbers, not the {record.graph_numbers:,} of the export "
            f"(backbone and head: {expected:,})"
        )
    return Seen("passed", f"{found:,} numbers; backbone and head have {expected:,}")


def side_names(proto: onnx.ModelProto) -> Iterator[str]:
    """Yield the names of weights that say that they are a side network's."""
    return (t.name for t in proto.graph.initializer if t.name.startswith(_SIDE))


def _floats(proto: onnx.ModelProto) -> int:
    """Count float32 numbers; the exporter adds a scalar constant here and there, one a node at most."""
    floats = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    return sum(math.prod(tensor.dims) for tensor in floats)
