"""Give a running engine the norms and head of another task, without building it again.

The engine must have been built with `--refit`, which marks exactly these weights. After every
refit the engine must reproduce the task's golden vectors; until it has, it answers nobody.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.checks.compare import Case, Limits, compare
from mdpd_deploy.errors import UserError, VerificationError, WorkFailed
from mdpd_deploy.runtimes.base import Outputs, first_columns, only, run_cut
from mdpd_deploy.runtimes.tensorrt.library import import_trt, said
from mdpd_deploy.runtimes.tensorrt.runner import TrtRunner

Tensors = Mapping[str, NDArray[Any]]


def refittable_names(runner: TrtRunner) -> tuple[str, ...]:
    """Return the weights that the engine lets be exchanged, by their ONNX names.

    Raises:
        UserError: If the engine was built without `--refit`.
    """
    return tuple(sorted(_refitter(runner).get_all_weights()))


def apply_delta(
    runner: TrtRunner,
    tensors: Tensors,
    golden: Case,
    *,
    tolerance: float,
    previous: Tensors | None = None,
) -> None:
    """Exchange the refittable weights of an engine and verify what it then computes.

    Args:
        runner: An engine built with `--refit`.
        tensors: A value for every refittable weight, by its ONNX name.
        golden: Inputs of the task with the one output [B, C] they must give; a head narrower than
            the engine's fills C of its columns.
        tolerance: Largest difference of an output, in standard deviations of the golden outputs.
        previous: What the engine holds now; put back when the new weights fail, so that the engine
            goes on with the task it had. Without it a failed refit leaves the engine `failed`.

    Raises:
        UserError: If the names are not exactly the refittable ones, or a value does not fit; the
            engine is as it was.
        VerificationError: If TensorRT refuses the exchange or the golden vectors do not come back.
    """
    values = _checked(runner, tensors)
    before = None if previous is None else _checked(runner, previous)
    with runner.lock:  # until the golden vectors have come back, the engine answers nobody
        runner.refuse_if_failed()
        problem = _attempt(runner, values, golden, tolerance)
        if problem is None:
            return
        runner.failed = problem
        if before is not None:
            _exchange(runner, before)
            runner.failed = None
    raise VerificationError(f"refit: {problem}")


def _attempt(
    runner: TrtRunner, values: dict[str, NDArray[Any]], golden: Case, tolerance: float
) -> str | None:
    """Exchange and compare; return what went wrong."""
    try:
        _exchange(runner, values)
    except WorkFailed as err:  # some weights may have changed already
        return str(err)
    assert golden.expected is not None
    width = only(golden.expected).shape[1]  # as many columns as the task has

    def run(arrays: Mapping[str, NDArray[Any]]) -> Outputs:
        return first_columns(run_cut(runner, arrays), width)

    parity = compare(run, [golden], Limits(tolerance, tolerance, 1.0))
    if parity.passed:
        return None
    return (
        f"the outputs are off by {parity.scaled_diff:.1e} of their spread, allowed {tolerance:.0e}."
    )


def _checked(runner: TrtRunner, tensors: Tensors) -> dict[str, NDArray[Any]]:
    """Return contiguous copies that fit; TensorRT itself takes too few names without a word."""
    refitter = _refitter(runner)
    marked = set(refitter.get_all_weights())
    if set(tensors) != marked:
        missing, extra = sorted(marked - set(tensors)), sorted(set(tensors) - marked)
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which is fixed"
        raise UserError(f"the delta does not fit the engine: it {what}.")
    values = {}
    for name, array in tensors.items():
        wanted = refitter.get_weights_prototype(name).size
        if array.dtype != np.float32 or array.size != wanted:
            raise UserError(
                f"the delta does not fit the engine: {name} is {array.size} x {array.dtype}, "
                f"expected {wanted} x float32."
            )
        if not np.isfinite(array).all():
            raise UserError(f"the delta is damaged: {name} holds values that are not finite.")
        values[name] = np.ascontiguousarray(array)
    return values


def _exchange(runner: TrtRunner, values: dict[str, NDArray[Any]]) -> None:
    """Refit on the runner's own stream, with no work of its in flight."""
    trt = import_trt("refitting an engine")
    refitter = _refitter(runner)
    stream = runner.stream
    stream.synchronize()
    kept = {name: trt.Weights(array) for name, array in values.items()}  # views: keep both alive
    for name, weights in kept.items():
        if not refitter.set_named_weights(name, weights):
            raise WorkFailed(f"TensorRT refused {name}: {said(runner.logger.errors)}.")
    missing = refitter.get_missing_weights()
    if missing:
        raise WorkFailed(f"TensorRT wants {len(missing)} more weights, first {missing[0]}.")
    if not refitter.refit_cuda_engine_async(stream.handle):
        raise WorkFailed(f"TensorRT could not refit the engine: {said(runner.logger.errors)}.")
    stream.synchronize()


def _refitter(runner: TrtRunner) -> Any:
    trt = import_trt("refitting an engine")
    engine = runner.engine
    if not engine.refittable:
        raise UserError(
            "this engine cannot be refitted: build it again with `mdpd build-engine --refit`."
        )
    return trt.Refitter(engine, runner.logger)
