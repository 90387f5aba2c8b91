"""Gate `parity`: the graph computes what PyTorch computes, at several batch sizes and lengths."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from mdpd_deploy.checks.compare import Case, Limits, Parity, compare
from mdpd_deploy.checks.policy import POLICIES, ParityMode, Policy, agreement_of_all
from mdpd_deploy.checks.reference import Reference, shape_batches, torch_outputs
from mdpd_deploy.checks.subject import TOO_OLD, Seen, Subject, judged
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.runtimes.base import Arrays, Forward

if TYPE_CHECKING:
    from mdpd_deploy.model import TaskModel

GOLDEN_CASE = "golden inputs"
FP32_TOLERANCE = POLICIES["fp32"].drift  # of the outputs' standard deviation; 3e-6 is usual


def prove(
    reference: Reference,
    runner: Forward,
    *,
    mode: ParityMode = "fail",
    names: Sequence[str] | None = None,
) -> tuple[Seen, Parity]:
    """Compare with PyTorch at every shape that matters, and on the golden inputs."""
    parity = compare_with_torch(reference.model, runner, _batches(reference), names=names)
    if not parity.passed:
        told = (
            f"outputs differ from PyTorch by {parity.scaled_diff:.1e} of their spread at "
            f"{parity.worst.name}, allowed {parity.tolerance:.0e}"
        )
        if mode == "fail" or not parity.finite:
            raise VerificationError(f"parity: {told}.")
        return Seen("warned", f"{told} (--parity warn)", parity.to_json()), parity
    note = f"largest difference {parity.scaled_diff:.1e} of the outputs' spread"
    return Seen("passed", note, parity.to_json()), parity


def prove_converted(
    reference: Reference, runner: Forward, policy: Policy, mode: ParityMode
) -> tuple[Seen, Parity]:
    """Compare a converted graph with PyTorch: outputs, and classes of the golden inputs."""
    allowed = np.inf if policy.scaled_diff is None else policy.scaled_diff
    batches, golden = _batches(reference), reference.golden
    parity = compare_with_torch(reference.model, runner, batches, tolerance=allowed)
    if not parity.finite:
        raise VerificationError(f"parity: outputs at {parity.worst.name} are not finite.")
    found = agreement_of_all(golden.outputs, runner(golden.arrays), policy.drift, parity.spread)
    limit = "reported only" if policy.scaled_diff is None else f"allowed {allowed:.0e}"
    seen = f"largest difference {parity.scaled_diff:.1e} of the outputs' spread"
    problems = [] if parity.passed else [f"{seen}, {limit}"]
    if found.share < policy.agreement:
        problems.append(f"{found.rows - found.same} of {found.rows} golden inputs change")
    details = {**parity.to_json(), "golden_agreement": asdict(found)}
    return judged("parity", f"{seen} ({limit})", problems, details, mode), parity


def recheck(subject: Subject) -> Seen:
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
    passed = within and record.passed and verdict == "passed"
    if not (finite and consistent and (warned or passed)):
        raise VerificationError(f"the record of the comparison with PyTorch says {verdict!r}")
    if warned and not within:
        return Seen(
            "recorded",
            f"missed by choice (--parity warn): {record.scaled_diff:.1e} of the "
            f"outputs' spread from PyTorch, {record.tolerance:.0e} would be allowed",
        )
    allowed = "reported only" if record.tolerance is None else f"allowed {record.tolerance:.0e}"
    note = f"against PyTorch {record.scaled_diff:.1e} of the outputs' spread, {allowed}"
    return Seen("recorded", f"{note}, {len({case.name for case in record.cases})} batches")


def _batches(reference: Reference) -> list[tuple[str, Arrays]]:
    return [*shape_batches(reference.model), (GOLDEN_CASE, reference.golden.arrays)]


def compare_with_torch(
    model: "TaskModel",
    runner: Forward,
    batches: Sequence[tuple[str, Arrays]],
    *,
    tolerance: float = FP32_TOLERANCE,
    names: Sequence[str] | None = None,
) -> Parity:
    """Run named batches through torch (FP32, eager mode, CPU) and through the graph.

    Args:
        model: The model that was exported.
        runner: Its graph.
        batches: (name, arrays) of at least one batch; see `shape_batches`.
        tolerance: Largest allowed difference, in standard deviations of its output.
        names: What the graph calls the model's outputs, in order; None = as the model does.
    """
    model.eval()
    cases = [Case(batch, arrays, torch_outputs(model, arrays, names)) for batch, arrays in batches]
    return compare(runner, cases, Limits(tolerance))
