"""Proof that a bundle gives here what it gave when it was exported: the golden vectors."""

from mdpd_deploy.bundle import Bundle, Task
from mdpd_deploy.errors import UserError, VerificationError
from mdpd_deploy.files import read_json
from mdpd_deploy.golden import load_golden, replay
from mdpd_deploy.manifest import PARITY_FILE
from mdpd_deploy.mixed import TaskRunner
from mdpd_deploy.runner import Runner

# Of the outputs' spread: float32 on a CPU, and what TF32 or FP16 products on a GPU may differ by.
CPU_TOLERANCE, GPU_TOLERANCE = 1e-4, 3e-2


def prove(bundle: Bundle, runner: Runner, *, on_cpu: bool) -> None:
    """Replay every task's golden vectors, from raw input to output, on the device that will serve.

    An output may be off by the tolerance, or by twice what the export itself measured where a
    reduced precision was accepted there.

    Args:
        bundle: A loaded bundle.
        runner: Its graph on the device.
        on_cpu: Whether that is a CPU.

    Raises:
        UserError: If the bundle holds no golden vectors.
        VerificationError: If the replay does not give what the bundle says.
    """
    parity = read_json(bundle.path / PARITY_FILE, "parity")
    for task in bundle.tasks:
        spread, known = _measured(bundle, task, parity.get(task.name) if bundle.mixed else parity)
        assert task.golden is not None
        run = TaskRunner(runner, task) if bundle.mixed else runner
        found = replay(load_golden(task.golden), task.preprocess, run, spread)
        where = f"bundle {bundle.path}, task {task.name}"
        if found.preprocessing_diff > 0:
            raise VerificationError(
                f"{where}: the preprocessing gives other arrays here than where it was exported; "
                "use the versions of tokenizers and pillow that the manifest names."
            )
        allowed = max(CPU_TOLERANCE if on_cpu else GPU_TOLERANCE, 2 * known)
        if not found.output_diff <= allowed:  # also true for NaN
            raise VerificationError(
                f"{where}: the golden vectors come out wrong on this device, off by "
                f"{found.output_diff:.1e} of the outputs' spread where {allowed:.1e} is allowed; "
                "it is not served."
            )


def _measured(bundle: Bundle, task: Task, gates: object) -> tuple[float, float]:
    """Return the outputs' spread, and how far off the golden vectors were at the export."""
    try:
        assert isinstance(gates, dict)
        return float(gates["parity"]["spread"]), float(gates["golden"]["output_diff"])
    except (AssertionError, KeyError, TypeError, ValueError):
        raise UserError(
            f"bundle {bundle.path}: {PARITY_FILE} does not say how the golden vectors of "
            f"{task.name} came out; export the run again."
        ) from None
