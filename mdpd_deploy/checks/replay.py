"""Proof that a bundle gives here what it gave when it was exported: the golden vectors.

The server asks it of what it serves, and a build of an engine of what it keeps. No torch.
"""

from functools import partial
from typing import NamedTuple

from mdpd_deploy.artifacts.bundle import Bundle
from mdpd_deploy.artifacts.certificate import of_each
from mdpd_deploy.artifacts.golden import replay
from mdpd_deploy.artifacts.manifest import PARITY_FILE
from mdpd_deploy.artifacts.tasks import BundleTask
from mdpd_deploy.checks.policy import allowed_again
from mdpd_deploy.errors import UserError, VerificationError
from mdpd_deploy.files import read_json
from mdpd_deploy.runtimes.base import Runtime, run_cut
from mdpd_deploy.runtimes.mixed import TaskRunner
from mdpd_deploy.runtimes.onnx import PROVIDERS


class Recorded(NamedTuple):
    """What the export measured on a task's golden inputs.

    Attributes:
        spread: Standard deviation of each output.
        output_diff: How far they were off PyTorch's, in that unit.
    """

    spread: dict[str, float]
    output_diff: float


def prove(bundle: Bundle, runner: Runtime) -> None:
    """Replay every task's golden vectors, from raw input to output, on the device that will answer.

    An output may be off by the tolerance, or by twice what the export itself measured where a
    reduced precision was accepted there (`allowed_again`).

    Args:
        bundle: A loaded bundle.
        runner: Its graph on the device.

    Raises:
        UserError: If the bundle holds no golden vectors.
        VerificationError: If the replay does not give what the bundle says.
    """
    on_cpu, cut = runner.provider == PROVIDERS["cpu"], partial(run_cut, runner)
    for task in bundle.tasks:
        spread, known = recorded(bundle, task)
        run = TaskRunner(cut, task) if bundle.mixed else cut
        found = replay(bundle.golden(task), task.preprocess, run, spread)
        where = f"bundle {bundle.path}, task {task.name}"
        if not found.preprocessing_diff == 0:  # also true for NaN
            raise VerificationError(
                f"{where}: the preprocessing gives other arrays here than where it was exported; "
                "use the versions of tokenizers and pillow that the manifest names."
            )
        allowed = allowed_again(known, on_cpu=on_cpu)
        if not found.output_diff <= allowed:  # also true for NaN
            raise VerificationError(
                f"{where}: the golden vectors come out wrong on this device, off by "
                f"{found.output_diff:.1e} of the outputs' spread where {allowed:.1e} is allowed."
            )


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
