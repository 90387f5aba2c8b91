"""Proof that a bundle gives here what it gave when it was exported: the golden vectors."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.bundle import Bundle
from mdpd_deploy.errors import UserError, VerificationError
from mdpd_deploy.files import read_json
from mdpd_deploy.golden import load_golden
from mdpd_deploy.manifest import GOLDEN_FILE, PARITY_FILE

# Of the outputs' spread: float32 on a CPU, and what TF32 or FP16 products on a GPU may differ by.
CPU_TOLERANCE, GPU_TOLERANCE = 1e-4, 3e-2

Arrays = dict[str, NDArray[Any]]


def prove(bundle: Bundle, run: Callable[[Arrays], NDArray[np.float32]], *, on_cpu: bool) -> None:
    """Replay a bundle's golden vectors from raw input to output on the device that will serve.

    An output may be off by the tolerance, or by twice what the export itself measured where a
    reduced precision was accepted there.

    Args:
        bundle: A loaded bundle.
        run: Its graph on the device.
        on_cpu: Whether that is a CPU.

    Raises:
        UserError: If the bundle holds no golden vectors.
        VerificationError: If the replay does not give what the bundle says.
    """
    golden = load_golden(bundle.path / GOLDEN_FILE)
    parity = read_json(bundle.path / PARITY_FILE, "parity")
    try:
        spread = float(parity["parity"]["spread"])
        known = float(parity["golden"]["output_diff"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"bundle {bundle.path}: {PARITY_FILE} does not say how its golden vectors came out; "
            "export the run again."
        ) from None
    allowed = max(CPU_TOLERANCE if on_cpu else GPU_TOLERANCE, 2 * known)
    arrays = _preprocess(bundle, golden.raws, golden.arrays)
    for name, array in golden.arrays.items():
        if arrays[name].shape != array.shape or not np.array_equal(arrays[name], array):
            raise VerificationError(
                f"bundle {bundle.path}: its preprocessing gives another {name} here than where it "
                "was exported; use the versions of tokenizers and pillow that its manifest names."
            )
    off = float(np.abs(run(arrays) - golden.outputs).max()) / spread
    if not off <= allowed:  # also true for NaN
        raise VerificationError(
            f"bundle {bundle.path}: its golden vectors come out wrong on this device, off by "
            f"{off:.1e} of the outputs' spread ({allowed:.1e} is allowed); it is not served."
        )


def _preprocess(bundle: Bundle, raws: Any, expected: Arrays) -> Arrays:
    """Preprocess golden inputs; a graph of many tasks gets the task of each row beside them."""
    arrays = bundle.preprocess(raws)
    extra = {name: array for name, array in expected.items() if name == "task_id"}
    return {**arrays, **extra}
