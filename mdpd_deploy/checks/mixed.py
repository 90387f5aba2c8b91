"""Gate `mixed`, and `identity` and `parameters` of a graph that answers several tasks.

The mixed graph is the bare backbone's with each task's numbers and nothing more, and in one batch of
all tasks each row gets what its task alone gives.
"""

from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np
import onnx
from onnx import numpy_helper

from mdpd_deploy.artifacts.golden import Golden
from mdpd_deploy.artifacts.manifest import BASE_FILE, DELTA_FILE, MODEL_FILE, TASKS
from mdpd_deploy.artifacts.tasks import BundleTask
from mdpd_deploy.checks.subject import TOO_OLD, Seen, Subject, sound_graph
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.graphs.deltas import Delta, load_delta
from mdpd_deploy.graphs.mixed import TABLE, Form, mixed_graph
from mdpd_deploy.graphs.signature import graph_signature
from mdpd_deploy.runtimes.base import Forward, only
from mdpd_deploy.runtimes.mixed import mixed_batch


def prove(
    tasks: Sequence[BundleTask],
    goldens: Sequence[Golden],
    spreads: Sequence[float],
    runner: Forward,
    tolerance: float,
) -> list[Seen]:
    """Put every task's golden inputs into one shuffled batch; each row must get its own answer.

    Args:
        tasks: All of them.
        goldens: Their golden inputs.
        spreads: Standard deviation of each one's outputs.
        runner: The mixed graph.
        tolerance: Largest difference, in that unit.

    Returns:
        What was seen of each task.
    """
    pairs = list(zip(tasks, goldens, strict=True))
    requests = [(task, raw) for task, golden in pairs for raw in golden.raws]
    expected = [row for golden in goldens for row in only(golden.outputs)]
    order = np.random.default_rng(0).permutation(len(requests))
    found = only(runner(mixed_batch([requests[place] for place in order])))
    worst = {task.index: 0.0 for task in tasks}
    for place, outputs in zip(order, found, strict=True):
        task = requests[place][0]
        gap = np.abs(outputs[: task.width] - expected[place]).max() / spreads[task.index]
        worst[task.index] = max(worst[task.index], float(gap) if np.isfinite(gap) else np.inf)
    for task in tasks:
        if worst[task.index] > tolerance:
            raise VerificationError(
                f"mixed: in one batch with other tasks {task.name!r} is off by "
                f"{worst[task.index]:.1e} of its outputs' spread, allowed {tolerance:.0e}."
            )
    said = f"one shuffled batch of {len(tasks)} tasks: off by"
    gaps = [worst[task.index] for task in tasks]
    return [Seen("passed", f"{said} {gap:.1e} at most", {"output_diff": gap}) for gap in gaps]


def recheck_identity_of_tasks(subject: Subject) -> Seen:
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


def recheck_parameters_of_tasks(subject: Subject) -> Seen:
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
