"""Is the graph of several tasks the bare backbone's, with each task's numbers and nothing more?"""

from collections.abc import Iterator
from typing import get_args

import onnx
from onnx import numpy_helper

from mdpd_deploy.artifacts.manifest import BASE_FILE, DELTA_FILE, MODEL_FILE, TASKS
from mdpd_deploy.checks.subject import TOO_OLD, Seen, Subject, sound_graph
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.graphs.deltas import Delta, load_delta
from mdpd_deploy.graphs.mixed import TABLE, Form, mixed_graph
from mdpd_deploy.graphs.signature import graph_signature


def check_mixed_identity(subject: Subject) -> Seen:
    """The base graph is the bare backbone's, and it and the deltas make the mixed graph again."""
    with sound_graph(BASE_FILE):
        base = graph_signature(subject.path / BASE_FILE, subject.bundle.read)
    for certificate in subject.certificates.values():
        record = certificate.identity
        if record is None or record.structure_sha256 is None:
            return TOO_OLD
        if record.structure_sha256 != base.structure_sha256:
            raise VerificationError(f"{BASE_FILE} is not, node for node, the bare backbone's graph")
        if record.bare_values_sha256 != base.values_sha256:
            raise VerificationError(f"a weight of {BASE_FILE} is not the bare backbone's")
    with sound_graph(MODEL_FILE):
        same = any(_same(subject.graph, made) for made in _made_again(subject))
    if not same:
        raise VerificationError("the graph is not what the base graph and the deltas make")
    count = len(subject.bundle.tasks)
    return Seen(
        "passed",
        f"{len(base.nodes)} nodes of the base graph and their weights equal the bare backbone's; "
        f"the mixed graph is that and {count} deltas",
    )


def check_mixed_parameters(subject: Subject) -> Seen:
    """Count the numbers of the base graph and of each task."""
    for name, certificate in subject.certificates.items():
        record = certificate.side_free
        if record is None:
            return TOO_OLD
        if record.graph_numbers > record.model_numbers + subject.bundle.graph()["nodes"]:
            raise VerificationError(f"the graph of {name} holds more than backbone and head")
    sizes = [sum(array.size for array in delta.tensors.values()) for delta in _deltas(subject)]
    tables = [t.dims for t in subject.graph.graph.initializer if t.name == TABLE]
    if len(tables) != 1 or len(tables[0]) != 3:
        raise VerificationError("the graph has no table of the tasks, or several")
    rows, _, row = tables[0]
    if rows != len(sizes) or max(sizes) > row:
        raise VerificationError("the table of the tasks holds other rows than their deltas")
    return Seen("passed", f"{min(sizes):,} to {max(sizes):,} numbers a task beside the backbone's")


def _made_again(subject: Subject) -> Iterator[onnx.ModelProto]:
    """Yield the mixed graph in every form that an export may choose."""
    base = onnx.load_model_from_string(subject.bundle.read(subject.path / BASE_FILE))
    known = {t.name: tuple(t.dims) for t in base.graph.initializer}
    shapes = {v.name: known[v.name] for v in base.graph.input if v.name in known}
    fitted = [delta.fit(shapes) for delta in _deltas(subject)]
    return (mixed_graph(base, fitted, form=form) for form in get_args(Form))


def _deltas(subject: Subject) -> list[Delta]:
    base = subject.bundle.manifest["files"][BASE_FILE]["sha256"]
    files = [subject.path / TASKS / task.name / DELTA_FILE for task in subject.bundle.tasks]
    return [load_delta(file, base, subject.bundle.read) for file in files]


def _same(found: onnx.ModelProto, made: onnx.ModelProto) -> bool:
    """Whether two graphs are equal but for their notes and the order of their weights."""
    same_nodes = [n.SerializeToString(deterministic=True) for n in found.graph.node] == [
        n.SerializeToString(deterministic=True) for n in made.graph.node
    ]
    return same_nodes and _weights(found) == _weights(made)


def _weights(proto: onnx.ModelProto) -> dict[str, object]:
    """Return what each weight is: its bytes, or where in the bundle they are."""
    found: dict[str, object] = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            places = sorted((entry.key, entry.value) for entry in tensor.external_data)
            found[tensor.name] = (tuple(tensor.dims), tensor.data_type, tuple(places))
        else:
            found[tensor.name] = (tensor.data_type, numpy_helper.to_array(tensor).tobytes())
    return found
