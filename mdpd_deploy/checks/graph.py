"""Is the graph the export's: that of the bare backbone and a head, and nothing more?"""

import math

import numpy as np
import onnx

from mdpd_deploy.artifacts.manifest import BARE_FILE
from mdpd_deploy.checks.mixed import check_mixed_identity, check_mixed_parameters
from mdpd_deploy.checks.subject import NOT_FADED, TOO_OLD, Seen, Subject
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.graphs.signature import tensors_in, value_digest, values_sha256

_SIDE = "side"  # what names of a side network's tensors start with
_NUMBERS = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8", "FLOAT8E4M3FN")
)


def check_graph(subject: Subject) -> Seen:
    """Operators and weights have the digests that the export took of the graph it wrote."""
    for record in subject.certificates.values():
        if record.graph is None:
            return Seen("recorded", "exported before digests of the deployed graph were kept")
        if subject.signature.structure_sha256 != record.graph.structure_sha256:
            raise VerificationError("the graph is not, node for node, the one that was exported")
        if subject.signature.values_sha256 != record.graph.values_sha256:
            raise VerificationError("a weight of the graph is not the one that was exported")
    count = len(subject.signature.weights)
    return Seen("passed", f"{len(subject.signature.nodes)} nodes and {count} weights as exported")


def check_side_free(subject: Subject) -> Seen:
    """No weight is named as a side network's, hidden in a corner, or read by nothing."""
    if not subject.faded:
        return NOT_FADED
    graph = subject.graph.graph
    names = [tensor.name for tensor in graph.initializer]
    strays = [name for name in names if name.startswith(_SIDE)]
    if strays:
        raise VerificationError(f"{strays[0]!r} belongs to a side network")
    read = {name for node in graph.node for name in node.input}
    unread = sorted(set(names) - read - {value.name for value in graph.output})
    if unread:
        raise VerificationError(f"nothing reads the weight {unread[0]!r}")
    if subject.graph.functions or subject.graph.training_info or graph.sparse_initializer:
        raise VerificationError("the graph holds functions, training or sparse weights")
    return Seen("passed", f"none of {len(names)} weights belongs to a side network")


def check_identity(subject: Subject) -> Seen:
    """The digests that the export took of the bare backbone's own graph fit this one."""
    if not subject.faded:
        return NOT_FADED
    if subject.bundle.mixed:
        return check_mixed_identity(subject)
    record = subject.certificate.identity
    if record is None or record.structure_sha256 is None:
        return TOO_OLD
    if subject.precision != "fp32":
        return Seen("recorded", f"proved on the FP32 graph before it became {subject.precision}")
    if subject.signature.structure_sha256 != record.structure_sha256:
        raise VerificationError("the graph is not, node for node, the bare backbone's")
    same = f"{len(subject.signature.nodes)} nodes equal the bare backbone's"
    if record.bare_values_sha256 is None:
        method = subject.bundle.manifest["method"]
        return Seen(
            "passed", f"{same}; {method!r} changed more than norms, so values were not held"
        )
    norms = _bare_digests(subject)
    digests = (norms.get(weight.name, weight.digest) for weight in subject.signature.weights)
    if values_sha256(digests) != record.bare_values_sha256:
        raise VerificationError("a weight beside the tuned norms is not that of backbone and head")
    return Seen("passed", f"{same}, and so does every weight but {len(norms)} tuned norms")


def check_parameters(subject: Subject) -> Seen:
    """Count the numbers that the graph holds, wherever in it they are."""
    if not subject.faded:
        return NOT_FADED
    if subject.bundle.mixed:
        return check_mixed_parameters(subject)
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
    floats = [t for t in subject.graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    found = sum(math.prod(tensor.dims) for tensor in floats)
    nodes = len(subject.graph.graph.node)  # the exporter adds a scalar constant here and there
    if found != record.graph_numbers or found > expected + nodes:
        raise VerificationError(
            f"the graph holds {found:,} numbers, not the {record.graph_numbers:,} of the export "
            f"(backbone and head: {expected:,})"
        )
    return Seen("passed", f"{found:,} numbers; backbone and head have {expected:,}")


def _bare_digests(subject: Subject) -> dict[str, str]:
    """Return what the bare norms of the bundle give in place of the tuned ones, by name."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    shapes = {weight.name: weight.shape for weight in subject.signature.weights}
    try:
        bare = load(subject.bundle.read(subject.path / BARE_FILE))
    except (OSError, SafetensorError, KeyError, ValueError) as err:
        raise VerificationError(f"{BARE_FILE} cannot be read ({err})") from err
    for name, array in bare.items():
        if array.dtype != np.float32 or shapes.get(name) != array.shape:
            raise VerificationError(f"{name!r} of {BARE_FILE} is no weight of the graph")
    return {name: value_digest(array) for name, array in bare.items()}
