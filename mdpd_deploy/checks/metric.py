"""Gate `metric`: the task metric through the graph is PyTorch's, on the examples of the export."""

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.artifacts.bundle import run_batches
from mdpd_deploy.artifacts.scores import split_name
from mdpd_deploy.checks.compare import Parity
from mdpd_deploy.checks.policy import ParityMode, Policy, agreement, label_spread, paired_drop
from mdpd_deploy.checks.reference import Reference
from mdpd_deploy.checks.subject import TOO_OLD, Seen, Subject, judged
from mdpd_deploy.data.examples import split_sha256
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.runtimes.base import Forward, only
from mdpd_deploy.tasks.metrics import LOWER_IS_BETTER, Values, agree, compute, metric_text

BATCH = 32  # examples per run of the graph; the metric does not depend on it
TOLERANCE = 1e-3  # 0.1 point
SKIPPED = Seen("skipped", "--no-metric-gate was given")

Labels = NDArray[np.int64] | NDArray[np.float64]


def prove(reference: Reference, runner: Forward, parity: Parity) -> Seen:
    """Prove that the metric by ONNX Runtime is PyTorch's, and that the one that training reported."""
    measured = reference.measured
    if measured is None:
        return SKIPPED
    labels, names = measured.split.labels, measured.metrics
    expected, outputs = reference.beside(runner)
    kept = agreement(expected, outputs, parity.tolerance * max(parity.spread.values()))
    if kept.same < kept.rows:
        raise VerificationError(
            f"metric: {kept.rows - kept.same} of {len(labels)} predictions differ from PyTorch's "
            "beyond rounding."
        )
    by_torch, by_onnx = compute(names, expected, labels), compute(names, outputs, labels)
    _compare("ONNX Runtime", by_onnx, "PyTorch", by_torch, labels)
    if measured.reported is not None:
        _compare("PyTorch", by_torch, "the run's summary", measured.reported, labels)
    where = split_name("validation", len(labels))
    note = (
        f"{names[0]} {metric_text(by_onnx[names[0]])} on {where}, "
        f"PyTorch {metric_text(by_torch[names[0]])}"
    )
    details = {
        "examples": len(labels),
        "examples_sha256": split_sha256(measured.split),
        "allowed": {name: allowed_drop(name, labels) for name in names},
        "onnx": by_onnx,
        "torch": by_torch,
        "reported": measured.reported,
        "max_abs_diff": float(np.abs(expected - outputs).max()),
    }
    return Seen("passed", note, details)


def prove_converted(
    reference: Reference, runner: Forward, policy: Policy, parity: Parity, mode: ParityMode
) -> Seen:
    """Compare predictions and the primary metric of a converted graph, example by example."""
    measured = reference.measured
    if measured is None:
        return SKIPPED
    labels, names = measured.split.labels, measured.metrics
    expected, outputs = reference.beside(runner)
    if not np.isfinite(outputs).all():
        raise VerificationError("metric: outputs for validation examples are not finite.")
    kept = agreement(expected, outputs, policy.drift * max(parity.spread.values()))
    drop = paired_drop(names[0], expected, outputs, labels)
    allowed = max(policy.metric_drop, 1 / len(labels))  # one example may always count
    interval = f"[{100 * drop.low:+.2f}, {100 * drop.high:+.2f}]"
    where = split_name("validation", len(labels))
    problems = []
    if kept.share < policy.agreement:
        problems.append(
            f"{kept.rows - kept.same} of {kept.rows} clear predictions change, "
            f"{policy.agreement:.1%} must stay"
        )
    if drop.value > allowed:
        problems.append(
            f"{names[0]} drops by {100 * drop.value:.2f} points {interval} on {where}, "
            f"allowed {100 * allowed:.2f}"
        )
    by_onnx, by_torch = compute(names, outputs, labels), compute(names, expected, labels)
    note = (
        f"{names[0]} {metric_text(by_onnx[names[0]])} on {where}, PyTorch FP32 "
        f"{metric_text(by_torch[names[0]])}; drop {100 * drop.value:+.2f} points {interval}, allowed "
        f"{100 * allowed:.2f}; {kept.same} of {kept.rows} clear predictions stay"
    )
    details = {
        "examples": len(labels),
        "examples_sha256": split_sha256(measured.split),
        "allowed": {  # another runtime or processor may give FP32's value instead
            name: allowed_drop(name, labels) + abs((by_onnx[name] or 0) - (by_torch[name] or 0))
            for name in names
        },
        "onnx": by_onnx,
        "torch": by_torch,
        "reported": measured.reported,
        "max_abs_diff": float(np.abs(expected - outputs).max()),
        "drop": {"metric": names[0], **asdict(drop), "allowed": allowed},
        "agreement": {**asdict(kept), "share": kept.share, "wanted": policy.agreement},
    }
    return judged("metric", note, problems, details, mode)


def recheck(subject: Subject) -> Seen:
    """Measure the task metric again, on the very examples of the export."""
    record = subject.certificate.metric
    if record is None:
        _, note = subject.said_at_export("metric")
        if subject.validation is not None:
            return Seen("not recorded", f"the export measured nothing to compare with ({note})")
        return Seen("recorded", f"not measured at export ({note})")
    said = ", ".join(f"{name} {metric_text(value)}" for name, value in record.onnx.items())
    where = split_name("validation", record.examples)
    if subject.validation is None:
        again = "`mdpd eval --task`" if subject.bundle.mixed else "--eval-data"
        return Seen("recorded", f"{said} on {where}, at export; {again} measures it again")
    if record.examples_sha256 is None or record.allowed is None:
        return TOO_OLD
    if refused := subject.refused:
        return refused
    if subject.needs_gpu:
        return Seen("not run", f"{subject.precision} cannot be run on a CPU")
    if split_sha256(subject.validation) != record.examples_sha256:
        raise VerificationError(
            f"--eval-data holds {len(subject.validation)} examples that are not the "
            f"{record.examples} of the export: name those, or leave it out"
        )
    raws = subject.validation.inputs
    outputs = only(run_batches(subject.task.preprocess, subject.forward, raws, BATCH))
    for name, value in compute(list(record.onnx), outputs, subject.validation.labels).items():
        before = record.onnx[name]
        if not agree(value, before, record.allowed.get(name, 0)):
            raise VerificationError(
                f"{name} is {metric_text(value)} here and was {metric_text(before)}"
            )
    return Seen("passed", f"{said} on {where}, measured again")


def allowed_drop(name: str, labels: Labels) -> float:
    """Return how far a metric may be off: 0.1 point or one example, the larger."""
    scale = label_spread(labels) if name in LOWER_IS_BETTER else 1.0
    return max(TOLERANCE, 1 / len(labels)) * scale


def _compare(what: str, found: Values, other: str, expected: Values, labels: Labels) -> None:
    """Raise when a metric differs by more than `allowed_drop`."""
    for name in found.keys() & expected.keys():
        if not agree(found[name], expected[name], allowed_drop(name, labels)):
            raise VerificationError(
                f"metric: {name} is {metric_text(found[name])} by {what} and "
                f"{metric_text(expected[name])} by {other}, {len(labels)} examples."
            )
