"""Checks of a built engine on its GPU, before it gets into the bundle."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mdpd_deploy.artifacts.bundle import Bundle
from mdpd_deploy.artifacts.golden import Golden
from mdpd_deploy.artifacts.manifest import MODEL_FILE
from mdpd_deploy.checks.compare import Case, Parity, compare
from mdpd_deploy.checks.engine import limits, shape_batches
from mdpd_deploy.checks.golden import recorded, replay_golden
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.export.tensorrt.profiles import Profiles
from mdpd_deploy.runtimes.base import TASK_ID, Runtime, joined, run_cut
from mdpd_deploy.runtimes.onnx import OnnxRunner

CPU_LESS = frozenset({"bf16"})  # ONNX Runtime has no CPU kernels: golden vectors alone must do


def check_engine(bundle: Bundle, runner: Runtime, profiles: Profiles, *, tf32: bool) -> Parity:
    """Compare an engine with the golden vectors and, at its profile's corners, with the graph.

    What passes also passes the proof that a server asks before it serves the engine.

    Raises:
        UserError: If the bundle does not say how its golden vectors came out at the export.
        VerificationError: If it computes something else.
    """
    precision, graph = bundle.precision_in("trt"), bundle.path / MODEL_FILE
    if not bundle.mixed:
        golden = bundle.golden()
    else:  # each task's own golden outputs were held against the graph at export
        golden = _all_tasks(bundle)
        golden = replace(golden, outputs=bundle.runner()(golden.arrays))
    known = max(recorded(bundle, task).output_diff for task in bundle.tasks)
    parity = require_parity(runner, graph, golden, profiles, precision, tf32=tf32, known=known)
    replay_golden(bundle, runner)
    return parity


def require_parity(
    runner: Runtime,
    graph: Path,
    golden: Golden,
    profiles: Profiles,
    precision: str,
    *,
    tf32: bool,
    known: float,
) -> Parity:
    """Compare an engine with golden outputs, and with its graph where ONNX Runtime can run that.

    Args:
        runner: The engine.
        graph: What it was built of.
        golden: Inputs with the outputs they must give.
        profiles: Ranges of shapes.
        precision: The graph's.
        tf32: Whether FP32 products may use TF32.
        known: How far the graph's own golden outputs are from PyTorch's, in standard deviations.

    Raises:
        VerificationError: If it computes something else.
    """
    reference = None if precision in CPU_LESS else OnnxRunner(graph)
    cases = [Case("golden inputs", golden.arrays, golden.outputs)]
    for name, arrays in shape_batches(golden, profiles):
        cases.append(Case(name, arrays, None if reference is None else reference(arrays)))
    held_to = limits(precision, tf32=tf32, known=known)
    parity = compare(partial(run_cut, runner), cases, held_to)
    if parity.passed:
        return parity
    if parity.agreement < held_to.agreement:
        wanted = held_to.agreement
        what = f"{parity.agreement:.1%} of the clear predictions agree, wanted are {wanted:.1%}"
    else:
        what = (
            f"outputs are off by {parity.scaled_diff:.1e} of their spread at "
            f"{parity.worst.name}, allowed {parity.tolerance:.0e}"
        )
    raise VerificationError(f"engine parity: {what}; the bundle is as it was.")


def _all_tasks(bundle: Bundle) -> Golden:
    """Return the first task's golden inputs, asked of every task in turn."""
    golden = bundle.golden(bundle.tasks[0])
    count = len(bundle.tasks)
    arrays = {name: np.concatenate([array] * count) for name, array in golden.arrays.items()}
    arrays[TASK_ID] = np.repeat(np.arange(count, dtype=np.int64), len(golden.raws))
    return Golden(golden.raws * count, arrays, joined([golden.outputs] * count))
