"""Checks a bundle again from what it holds, without the run, the backbone or torch (D27).

Each check is one function in `CHECKS`, in the order in which they are done: it returns what it
saw, or raises when it fails. A bundle of a kind with more to it registers one more.

files       every file is the one that the manifest lists
schema      the manifest can be read, and the graph's own notes agree with it
side_free   no tensor of a side network, no weight that nothing reads
identity    node for node the bare backbone's graph; with the bare norms put back, its weights too
parameters  as many numbers as backbone and head have
parity      the record of the comparison with PyTorch is sound
golden      raw inputs give the stored outputs
metric      the task metric is the recorded one, where the data is at hand
signature   who made it
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx

from mdpd_deploy.bundle import Bundle, run_batches
from mdpd_deploy.certificate import Certificate, read_certificate
from mdpd_deploy.data.examples import Split, split_sha256
from mdpd_deploy.errors import MdpdError, VerificationError
from mdpd_deploy.golden import load_golden, replay
from mdpd_deploy.graph_signature import (
    Signature,
    graph_signature,
    tensors_in,
    value_digest,
    values_sha256,
)
from mdpd_deploy.manifest import BARE_FILE, GOLDEN_FILE, MODEL_FILE
from mdpd_deploy.registry import Registry
from mdpd_deploy.runner import OnnxRunner
from mdpd_deploy.signing import signature_path
from mdpd_deploy.tasks.metrics import compute

Verdict = Literal["passed", "recorded", "not applicable", "not recorded", "not run", "failed"]
SOUND = ("passed", "recorded", "not applicable")
BATCH = 32  # examples per run of the graph; the metric does not depend on it
_SIDE = "side"  # what names of a side network's tensors start with
_NUMBERS = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8", "FLOAT8E4M3FN")
)


class Seen(NamedTuple):
    """What a check found, in one sentence."""

    verdict: Verdict
    note: str


@dataclass(frozen=True)
class Check:
    """One row of the report.

    Attributes:
        name: As in the table above.
        verdict: `passed`; `recorded`: true at export and not checked again; `not applicable`;
            `not recorded`: the bundle is too old to be checked; `not run`; `failed`.
        note: What was seen.
    """

    name: str
    verdict: Verdict
    note: str


@dataclass(frozen=True, eq=False)
class Subject:
    """What is checked, and with what.

    Attributes:
        bundle: As `load_bundle` gave it, so its files and schema are sound.
        device: "cpu" or "cuda".
        validation: The examples that the export measured, if they are at hand.
        signer: The public key that the signature was checked with, if it was.
        failed: Names of the checks that failed so far.
    """

    bundle: Bundle
    device: str = "cpu"
    validation: Split | None = None
    signer: str | None = None
    failed: set[str] = field(default_factory=set)

    @property
    def path(self) -> Path:
        """The bundle's folder."""
        return self.bundle.path

    @property
    def faded(self) -> bool:
        """Whether nothing is deployed beside backbone and head."""
        return bool(self.bundle.manifest["faded"])

    @property
    def precision(self) -> str:
        """What the graph's weights were converted to."""
        return str(self.bundle.manifest["precision"])

    @cached_property
    def certificate(self) -> Certificate:
        """The numbers of the export's gates."""
        return read_certificate(self.path)

    @cached_property
    def graph(self) -> onnx.ModelProto:
        """The graph without weights that lie outside its file."""
        return onnx.load(self.path / MODEL_FILE, load_external_data=False)

    @cached_property
    def signature(self) -> Signature:
        """The graph's structure and the digests of its weights."""
        try:
            return graph_signature(self.path / MODEL_FILE)
        except Exception as err:  # what protobuf, onnx and numpy stumble on in a broken graph
            raise VerificationError(f"{MODEL_FILE} is no sound graph ({err!r:.200})") from err

    @cached_property
    def runner(self) -> OnnxRunner:
        """The graph on the device."""
        return self.bundle.runner(self.device)


CHECKS: Registry[Callable[[Subject], Seen]] = Registry("check")

NOT_FADED = Seen("not applicable", "this method deploys more than the backbone and a head")
TOO_OLD = Seen("not recorded", "exported before this was recorded: export the run again")


def verify(subject: Subject) -> list[Check]:
    """Do every check; none of them ends the others."""
    return [_do(name, check, subject) for name, check in CHECKS.items()]


def require_sound(checks: list[Check]) -> None:
    """Raise `VerificationError` when a check did not pass."""
    unsound = [check for check in checks if check.verdict not in SOUND]
    if unsound:
        raise VerificationError("; ".join(f"{check.name}: {check.note}" for check in unsound))


def _do(name: str, check: Callable[[Subject], Seen], subject: Subject) -> Check:
    try:
        seen = check(subject)
    except MdpdError as err:
        seen = Seen("failed", str(err))
    if seen.verdict == "failed":
        subject.failed.add(name)
    return Check(name, seen.verdict, seen.note)


@CHECKS.register("files")
def check_files(subject: Subject) -> Seen:
    """`load_bundle` refuses a bundle where this does not hold; so this only says what it saw."""
    listed = {**subject.bundle.manifest["files"], **subject.bundle.manifest["caches"]}
    size = sum(entry["bytes"] for entry in listed.values())
    return Seen("passed", f"{len(listed)} files, {size / 1e6:.1f} MB: every SHA-256 as listed")


@CHECKS.register("schema")
def check_schema(subject: Subject) -> Seen:
    """As `check_files`."""
    schema = subject.bundle.manifest["schema"]
    return Seen("passed", f"bundle schema {schema}; the notes inside {MODEL_FILE} agree")


@CHECKS.register("side_free")
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


@CHECKS.register("identity")
def check_identity(subject: Subject) -> Seen:
    """The digests that the export took of the bare backbone's own graph fit this one."""
    if not subject.faded:
        return NOT_FADED
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


@CHECKS.register("parameters")
def check_parameters(subject: Subject) -> Seen:
    """Count the numbers that the graph holds, wherever in it they are."""
    if not subject.faded:
        return NOT_FADED
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


@CHECKS.register("parity")
def check_parity(subject: Subject) -> Seen:
    """The recorded comparison with PyTorch passed and does not contradict itself."""
    record = subject.certificate.parity
    if record is None:
        return TOO_OLD
    worst = max(case.max_abs_diff for case in record.cases) / record.spread
    finite = all(case.finite for case in record.cases)
    within = record.tolerance is None or record.scaled_diff <= record.tolerance
    consistent = math.isclose(worst, record.scaled_diff, rel_tol=1e-6, abs_tol=1e-12)
    verdict = subject.bundle.manifest["verification"].get("parity", {}).get("verdict")
    if not (finite and within and consistent and record.passed and verdict == "passed"):
        raise VerificationError(f"the record of the comparison with PyTorch says {verdict!r}")
    allowed = "reported only" if record.tolerance is None else f"allowed {record.tolerance:.0e}"
    note = f"against PyTorch {record.scaled_diff:.1e} of the outputs' spread, {allowed}"
    return Seen("recorded", f"{note}, {len(record.cases)} batches")


@CHECKS.register("golden")
def check_golden(subject: Subject) -> Seen:
    """Put the golden inputs through preprocessing and graph, on the device that was asked for."""
    if refused := _refused(subject):
        return refused
    record = subject.certificate.parity
    if record is None:
        return TOO_OLD
    golden = load_golden(subject.path / GOLDEN_FILE)
    found = replay(golden, subject.bundle.preprocess, subject.runner, record.spread)
    if not found.preprocessing_diff == 0:  # also true for NaN
        raise VerificationError(
            f"preprocessing gives other arrays than at export (by {found.preprocessing_diff:.1e}): "
            "compare the versions in the manifest with those installed"
        )
    allowed = math.inf if record.tolerance is None else record.tolerance
    if not found.output_diff <= allowed:
        raise VerificationError(
            f"outputs are off by {found.output_diff:.1e} of their spread, allowed {allowed:.0e}"
        )
    seen = f"{len(golden.raws)} raw inputs replayed on {subject.runner.provider}"
    return Seen("passed", f"{seen}, off by {found.output_diff:.1e} of the spread")


@CHECKS.register("metric")
def check_metric(subject: Subject) -> Seen:
    """Measure the task metric again, on the very examples of the export."""
    record = subject.certificate.metric
    if record is None:
        note = subject.bundle.manifest["verification"].get("metric", {}).get("note", "no record")
        if subject.validation is not None:
            return Seen("not recorded", f"the export measured nothing to compare with ({note})")
        return Seen("recorded", f"not measured at export ({note})")
    said = ", ".join(f"{name} {value:.4f}" for name, value in record.onnx.items())
    if subject.validation is None:
        note = f"{said} on {record.examples} examples at export; --eval-data measures it again"
        return Seen("recorded", note)
    if record.examples_sha256 is None or record.allowed is None:
        return TOO_OLD
    if refused := _refused(subject):
        return refused
    if split_sha256(subject.validation) != record.examples_sha256:
        raise VerificationError(
            f"--eval-data holds {len(subject.validation)} examples that are not the "
            f"{record.examples} of the export: name those, or leave it out"
        )
    outputs = run_batches(
        subject.bundle.preprocess, subject.runner, subject.validation.inputs, BATCH
    )
    measured = compute(list(record.onnx), outputs, subject.validation.labels)
    for name, value in measured.items():
        if not abs(value - record.onnx[name]) <= record.allowed.get(name, 0):
            raise VerificationError(f"{name} is {value:.4f} here and was {record.onnx[name]:.4f}")
    return Seen("passed", f"{said} on {record.examples} examples, measured again")


@CHECKS.register("signature")
def check_signature(subject: Subject) -> Seen:
    """Say whether somebody vouches for the bundle; a wrong signature was refused before."""
    if subject.signer is not None:
        return Seen("passed", f"signed with the key of {subject.signer}")
    name = signature_path(subject.path).name
    if signature_path(subject.path).is_file():
        return Seen("not applicable", f"not checked: {name} is there, name the public key by --key")
    return Seen("not applicable", f"not signed: there is no {name}")


def _refused(subject: Subject) -> Seen | None:
    """A graph that is not what was exported is not run."""
    unfit = subject.failed & {"side_free", "identity", "parameters"}
    return Seen("not run", f"the graph failed {min(unfit)}") if unfit else None


def _bare_digests(subject: Subject) -> dict[str, str]:
    """Return what the bare norms of the bundle give in place of the tuned ones, by name."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    shapes = {weight.name: weight.shape for weight in subject.signature.weights}
    try:
        bare: dict[str, Any] = load_file(subject.path / BARE_FILE)
    except (OSError, SafetensorError, KeyError, ValueError) as err:
        raise VerificationError(f"{BARE_FILE} cannot be read ({err})") from err
    for name, array in bare.items():
        if array.dtype != np.float32 or shapes.get(name) != array.shape:
            raise VerificationError(f"{name!r} of {BARE_FILE} is no weight of the graph")
    return {name: value_digest(array) for name, array in bare.items()}
