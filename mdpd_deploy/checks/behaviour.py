"""Does the graph answer as it did at export?"""

import math

from mdpd_deploy.artifacts.bundle import run_batches
from mdpd_deploy.artifacts.golden import replay
from mdpd_deploy.artifacts.scores import split_name
from mdpd_deploy.checks.policy import allowed_again
from mdpd_deploy.checks.replay import recorded
from mdpd_deploy.checks.subject import TOO_OLD, Seen, Subject
from mdpd_deploy.data.examples import split_sha256
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.runtimes.base import only
from mdpd_deploy.tasks.metrics import agree, compute, metric_text

BATCH = 32  # examples per run of the graph; the metric does not depend on it


def check_parity(subject: Subject) -> Seen:
    """The recorded comparison with PyTorch passed and does not contradict itself."""
    record = subject.certificate.parity
    if record is None:
        return TOO_OLD
    worst = max(case.max_abs_diff / record.spread[case.output] for case in record.cases)
    finite = all(case.finite for case in record.cases)
    within = record.tolerance is None or record.scaled_diff <= record.tolerance
    consistent = math.isclose(worst, record.scaled_diff, rel_tol=1e-6, abs_tol=1e-12)
    verdict, _ = subject.said_at_export("parity")
    warned = verdict == "warned" and subject.bundle.manifest.get("parity") == "warn"
    if not (
        finite and consistent and (warned or (within and record.passed and verdict == "passed"))
    ):
        raise VerificationError(f"the record of the comparison with PyTorch says {verdict!r}")
    if warned and not within:
        return Seen(
            "recorded",
            f"missed by choice (--parity warn): {record.scaled_diff:.1e} of the "
            f"outputs' spread from PyTorch, {record.tolerance:.0e} would be allowed",
        )
    allowed = "reported only" if record.tolerance is None else f"allowed {record.tolerance:.0e}"
    note = f"against PyTorch {record.scaled_diff:.1e} of the outputs' spread, {allowed}"
    return Seen("recorded", f"{note}, {len(record.cases)} batches")


def check_golden(subject: Subject) -> Seen:
    """Put the golden inputs through preprocessing and graph, on the device that was asked for."""
    if refused := _refused(subject):
        return refused
    record, known = subject.certificate.parity, subject.certificate.golden
    if record is None or known is None:
        return TOO_OLD
    if subject.needs_gpu:
        return Seen("recorded", f"{subject.precision} cannot be run on a CPU; held at export")
    golden = subject.bundle.golden(subject.task)
    spread = recorded(subject.bundle, subject.task).spread
    found = replay(golden, subject.task.preprocess, subject.forward, spread)
    if not found.preprocessing_diff == 0:  # also true for NaN
        raise VerificationError(
            f"preprocessing gives other arrays than at export (by {found.preprocessing_diff:.1e}): "
            "compare the versions in the manifest with those installed"
        )
    allowed = allowed_again(known.output_diff, on_cpu=subject.device == "cpu")
    if not found.output_diff <= allowed:  # also true for NaN
        raise VerificationError(
            f"outputs are off by {found.output_diff:.1e} of their spread, allowed {allowed:.1e}"
        )
    seen = f"{len(golden.raws)} raw inputs replayed on {subject.runner.provider}"
    return Seen("passed", f"{seen}, off by {found.output_diff:.1e} of the spread")


def check_metric(subject: Subject) -> Seen:
    """Measure the task metric again, on the very examples of the export."""
    record = subject.certificate.metric
    if record is None:
        _, note = subject.said_at_export("metric")
        if subject.validation is not None:
            return Seen("not recorded", f"the export measured nothing to compare with ({note})")
        return Seen("recorded", f"not measured at export ({note})")
    said = ", ".join(f"{name} {metric_text(value)}" for name, value in record.onnx.items())
    if subject.validation is None:
        again = "`mdpd eval --task`" if subject.bundle.mixed else "--eval-data"
        note = f"{said} on {split_name('validation', record.examples)}, at export; {again} measures it again"
        return Seen("recorded", note)
    if record.examples_sha256 is None or record.allowed is None:
        return TOO_OLD
    if refused := _refused(subject):
        return refused
    if subject.needs_gpu:
        return Seen("not run", f"{subject.precision} cannot be run on a CPU")
    if split_sha256(subject.validation) != record.examples_sha256:
        raise VerificationError(
            f"--eval-data holds {len(subject.validation)} examples that are not the "
            f"{record.examples} of the export: name those, or leave it out"
        )
    outputs = run_batches(
        subject.task.preprocess, subject.forward, subject.validation.inputs, BATCH
    )
    measured = compute(list(record.onnx), only(outputs), subject.validation.labels)
    for name, value in measured.items():
        before = record.onnx[name]
        if not agree(value, before, record.allowed.get(name, 0)):
            raise VerificationError(
                f"{name} is {metric_text(value)} here and was {metric_text(before)}"
            )
    where = split_name("validation", record.examples)
    return Seen("passed", f"{said} on {where}, measured again")


def _refused(subject: Subject) -> Seen | None:
    """A graph that is not what was exported is not run."""
    unfit = subject.failed & {"graph", "side_free", "identity", "parameters"}
    return Seen("not run", f"the graph failed {min(unfit)}") if unfit else None
