"""Gate `golden`: raw inputs through preprocessing and graph give the stored outputs.

An export proves it, `mdpd verify` rechecks it, a server asks it of what it serves, and a build of an
engine of what it keeps. No torch.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from mdpd_deploy.artifacts.bundle import Bundle
from mdpd_deploy.artifacts.certificate import of_each
from mdpd_deploy.artifacts.golden import Replay, replay
from mdpd_deploy.artifacts.manifest import PARITY_FILE
from mdpd_deploy.artifacts.tasks import BundleTask
from mdpd_deploy.checks.compare import Parity
from mdpd_deploy.checks.parity import GOLDEN_CASE
from mdpd_deploy.checks.policy import allowed_again
from mdpd_deploy.checks.reference import Reference
from mdpd_deploy.checks.subject import TOO_OLD, Seen, Subject
from mdpd_deploy.errors import UserError, VerificationError
from mdpd_deploy.files import read_json
from mdpd_deploy.runtimes.base import Forward, Runtime, run_cut
from mdpd_deploy.runtimes.mixed import TaskRunner


class Recorded(NamedTuple):
    """What the export measured on a task's golden inputs.

    Attributes:
        spread: Standard deviation of each output.
        output_diff: How far they were off PyTorch's, in that unit.
    """

    spread: dict[str, float]
    output_diff: float


def prove(reference: Reference, runner: Forward, parity: Parity) -> Seen:
    """Replay the written golden inputs through the written preprocessing; arrays must be equal.

    Where parity sets no tolerance, or was missed with a warning, the replay must still give what
    parity saw on these inputs.
    """
    allowed = parity.tolerance
    if not parity.passed or np.isinf(allowed):
        seen = [parity.scaled(case) for case in parity.cases if case.name == GOLDEN_CASE]
        allowed = 1.01 * max(seen, default=0.0) + 1e-6
    found = replay(reference.golden, reference.preprocess, runner, parity.spread)
    if not (found.preprocessing_diff == 0 and found.output_diff <= allowed):
        raise VerificationError(
            f"golden: a replay from raw input is off by {found.preprocessing_diff:.1e} after "
            f"preprocessing and by {found.output_diff:.1e} of the spread at the output."
        )
    note = "raw inputs replayed through the bundle's preprocessing"
    return Seen("passed", note, {"output_diff": found.output_diff})


def recheck(subject: Subject) -> Seen:
    """Put the golden inputs through preprocessing and graph, on the device that was asked for."""
    if refused := subject.refused:
        return refused
    if subject.certificate.parity is None or subject.certificate.golden is None:
        return TOO_OLD
    if subject.needs_gpu:
        return Seen("recorded", f"{subject.precision} cannot be run on a CPU; held at export")
    on_cpu = subject.device == "cpu"
    count, found, allowed = _again(subject.bundle, subject.task, subject.forward, on_cpu=on_cpu)
    if found.preprocessing_diff != 0:
        raise VerificationError(
            f"preprocessing gives other arrays than at export (by {found.preprocessing_diff:.1e}): "
            "compare the versions in the manifest with those installed"
        )
    if found.output_diff > allowed:
        raise VerificationError(
            f"outputs are off by {found.output_diff:.1e} of their spread, allowed {allowed:.1e}"
        )
    seen = f"{count} raw inputs replayed on {subject.runner.provider}"
    return Seen("passed", f"{seen}, off by {found.output_diff:.1e} of the spread")


def replay_golden(bundle: Bundle, runner: Runtime) -> None:
    """Replay every task's golden vectors, from raw input to output, on the device that will answer.

    An output may be off by the tolerance, or by twice what the export itself measured where a
    reduced precision was accepted there (`allowed_again`).

    Raises:
        UserError: If the bundle holds no golden vectors.
        VerificationError: If the replay does not give what the bundle says.
    """
    on_cpu, cut = runner.device == "cpu", partial(run_cut, runner)
    for task in bundle.tasks:
        run = TaskRunner(cut, task) if bundle.mixed else cut
        _, found, allowed = _again(bundle, task, run, on_cpu=on_cpu)
        where = f"bundle {bundle.path}, task {task.name}"
        if found.preprocessing_diff != 0:
            raise VerificationError(
                f"{where}: the preprocessing gives other arrays here than where it was exported; "
                "use the versions of tokenizers and pillow that the manifest names."
            )
        if found.output_diff > allowed:
            raise VerificationError(
                f"{where}: the golden vectors come out wrong on this device, off by "
                f"{found.output_diff:.1e} of the outputs' spread where {allowed:.1e} is allowed."
            )


def _again(
    bundle: Bundle, task: BundleTask, run: Forward, *, on_cpu: bool
) -> tuple[int, Replay, float]:
    """Return how many inputs were replayed, how far off they were, and how far outputs may be."""
    spread, known = recorded(bundle, task)
    golden = bundle.golden(task)
    found = replay(golden, task.preprocess, run, spread)
    return len(golden.raws), found, allowed_again(known, on_cpu=on_cpu)


def recorded(bundle: Bundle, task: BundleTask) -> Recorded:
    """Return what the export measured on a task's golden inputs.

    Raises:
        UserError: If `parity.json` does not say.
    """
    gates = read_json(bundle.path / PARITY_FILE, "parity", bundle.read)
    try:
        of_task = gates[task.name] if bundle.mixed else gates
        spread = of_each(of_task["parity"]["spread"], names=bundle.output_names)
        return Recorded(spread, float(of_task["golden"]["output_diff"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"bundle {bundle.path}: {PARITY_FILE} does not say how the golden vectors of "
            f"{task.name} came out; export the run again."
        ) from None
