"""Gates `graph` and `identity`: the graph is the export's, and node for node the bare backbone's."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mdpd_deploy.artifacts.manifest import BARE_FILE
from mdpd_deploy.checks.mixed import recheck_identity_of_tasks
from mdpd_deploy.checks.subject import DEPLOYS_MORE, TOO_OLD, Seen, Subject
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.graphs.signature import (
    changed_weights,
    graph_signature,
    same_structure,
    value_digest,
    values_sha256,
)


def prove(
    graph: Path, bare: Path, kept: Mapping[str, str] | None, allowed: Sequence[str] | None
) -> Seen:
    """Compare the deployed graph with the bare backbone's, both as traced.

    Args:
        graph: What is deployed.
        bare: The same head on the untouched backbone; norms that are constant there are varied.
        kept: Digests of the bundle's bare norms, by name; None = the bundle cannot give them.
        allowed: Names of the weights that may differ; None = matrices do, which the exporter renames.
    """
    differences = same_structure(graph, bare)
    if differences:
        raise VerificationError(f"identity: the graph is not the backbone's: {differences[0]}.")
    values = changed_weights(graph, bare)
    strays = [] if allowed is None else sorted(set(values) - set(allowed))
    if strays:
        raise VerificationError(
            f"identity: {strays[0]} differs from the backbone's untuned weight."
        )
    own, untouched = graph_signature(graph), graph_signature(bare)
    count = len(own.nodes)
    details = {
        "nodes": count,
        "changed_weights": values,
        "structure_sha256": untouched.structure_sha256,
        "bare_values_sha256": None
        if kept is None
        else values_sha256(  # norms that were varied for the trace count by what is kept
            kept.get(mine.name, weight.digest)
            for mine, weight in zip(own.weights, untouched.weights, strict=True)
        ),
    }
    note = f"{count} nodes equal the bare backbone's; {len(values)} weights differ in value"
    return Seen("passed", note, details)


def recheck_graph(subject: Subject) -> Seen:
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


def recheck(subject: Subject) -> Seen:
    """The digests that the export took of the bare backbone's own graph fit this one."""
    if not subject.faded:
        return DEPLOYS_MORE
    if subject.bundle.mixed:
        return recheck_identity_of_tasks(subject)
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
