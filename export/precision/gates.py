"""The gates of a graph in another precision than FP32: `parity_policy.py` holds the thresholds.

They come after the FP32 graph has passed its own, so that what fails here is the precision's doing.
"""

from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.artifacts.bundle import run_batches
from mdpd_deploy.artifacts.golden import Golden
from mdpd_deploy.artifacts.scores import split_name
from mdpd_deploy.checks.parity import Parity, compare_with_torch, torch_outputs
from mdpd_deploy.checks.policy import ParityMode, Policy, agreement, agreement_of_all, paired_drop
from mdpd_deploy.data.preprocess import Preprocess
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.export.gates import Gate, Measured, parity_batches
from mdpd_deploy.model import TaskModel
from mdpd_deploy.runtimes.base import Forward, only
from mdpd_deploy.tasks.metrics import compute, metric_text


@dataclass(frozen=True, eq=False)
class Reference:
    """PyTorch FP32 on the CPU, which every precision is compared with.

    Attributes:
        model: The deployed model.
        preprocess: Raw inputs → arrays.
        golden: The golden inputs and its outputs for them.
        measured: Validation examples; None when the metric is not measured.
    """

    model: TaskModel
    preprocess: Preprocess
    golden: Golden
    measured: Measured | None

    @cached_property
    def outputs(self) -> NDArray[np.float32]:
        """Outputs for all validation examples [n, C], computed once for every precision."""
        assert self.measured is not None
        self.model.eval()
        return self.run(lambda arrays: torch_outputs(self.model, arrays))

    def run(self, forward: Forward) -> NDArray[np.float32]:
        """Run any forward over all validation examples; its one output [n, C]."""
        assert self.measured is not None
        measured = self.measured
        return only(run_batches(self.preprocess, forward, measured.split.inputs, measured.batch))


def check_reduced_parity(
    reference: Reference, runner: Forward, policy: Policy, mode: ParityMode
) -> tuple[Gate, Parity]:
    """Finite outputs, their scaled difference, and the classes of the golden inputs."""
    allowed = np.inf if policy.scaled_diff is None else policy.scaled_diff
    model, golden = reference.model, reference.golden
    parity = compare_with_torch(model, runner, parity_batches(model, golden), tolerance=allowed)
    if not parity.finite:
        where = next(case.name for case in parity.cases if not case.finite)
        raise VerificationError(f"parity: outputs at {where} are not finite.")
    found = agreement_of_all(golden.outputs, runner(golden.arrays), policy.drift, parity.spread)
    seen = f"largest difference {parity.scaled_diff:.1e} of the outputs' spread"
    limit = "reported only" if policy.scaled_diff is None else f"allowed {allowed:.0e}"
    problems = [] if parity.passed else [f"{seen}, {limit}"]
    if found.share < policy.agreement:
        problems.append(f"{found.rows - found.same} of {found.rows} golden inputs change")
    details = {**parity.to_json(), "golden_agreement": asdict(found)}
    return _verdict("parity", f"{seen} ({limit})", problems, details, mode), parity


def check_reduced_metric(
    reference: Reference, runner: Forward, policy: Policy, parity: Parity, mode: ParityMode
) -> Gate:
    """Predictions and the primary metric on validation, paired example by example."""
    measured = reference.measured
    if measured is None:
        return Gate("metric", "skipped", "--no-metric-gate was given")
    labels, names = measured.split.labels, measured.metrics
    expected, outputs = reference.outputs, reference.run(runner)
    if not np.isfinite(outputs).all():
        raise VerificationError("metric: outputs for validation examples are not finite.")
    kept = agreement(expected, outputs, policy.drift * max(parity.spread.values()))
    drop = paired_drop(names[0], expected, outputs, labels)
    allowed = max(policy.metric_drop, 1 / len(labels))  # one example may always count
    interval = f"[{100 * drop.low:+.2f}, {100 * drop.high:+.2f}]"
    problems = []
    if kept.share < policy.agreement:
        problems.append(
            f"{kept.rows - kept.same} of {kept.rows} clear predictions change, "
            f"{policy.agreement:.1%} must stay"
        )
    where = split_name("validation", len(labels))
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
        "onnx": by_onnx,
        "torch": by_torch,
        "reported": measured.reported,
        "max_abs_diff": float(np.abs(expected - outputs).max()),
        "drop": {"metric": names[0], **asdict(drop), "allowed": allowed},
        "agreement": {**asdict(kept), "share": kept.share, "wanted": policy.agreement},
    }
    return _verdict("metric", note, problems, details, mode)


def _verdict(
    name: str, note: str, problems: list[str], details: dict[str, object], mode: ParityMode
) -> Gate:
    if not problems:
        return Gate(name, "passed", note, details)
    told = "; ".join(problems)
    if mode == "fail":
        raise VerificationError(
            f"{name}: {told}. Choose another precision, or --parity warn to keep it all the same."
        )
    return Gate(name, "warned", f"{told} (--parity warn)", details)
