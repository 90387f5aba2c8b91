"""Runs a TensorRT engine, called as `OnnxRunner` is. No torch here."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.errors import UserError, WorkFailed
from mdpd_deploy.runtimes.base import Outputs
from mdpd_deploy.runtimes.tensorrt.cuda import current_gpu
from mdpd_deploy.runtimes.tensorrt.execution import Execution, Shape
from mdpd_deploy.runtimes.tensorrt.library import import_trt, open_engine, recording_logger

DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class EngineInput:
    """Type and range of shapes of an engine's input.

    Attributes:
        dtype: Of its values.
        low: Smallest shape of the engine's profile.
        high: Largest shape.
    """

    dtype: np.dtype[Any]
    low: Shape
    high: Shape


class TrtRunner:
    """An engine: a batch of named arrays in, its outputs by name out.

    A batch below the engine's smallest is filled up with copies of its last row, which are dropped
    again: a static engine computes all of its rows anyway. Everything else outside the engine's
    profile is refused. One call runs at a time; open a second runner for a second stream of work.

    Args:
        plan: The engine's file, which is native code.
        metadata: The graph's own `mdpd.*` notes, which a plan cannot carry.
        host_code: Allow the processor code that version-compatible plans carry.
        sha256: The file's; None = the caller has just built it.

    Attributes:
        device: "cuda".
        provider: "TensorRT" with its version.
        input_names: The engine's inputs in order.
        output_names: The engine's outputs in order.
        inputs: Dtype and range of shapes of every input.
        max_batch: The largest batch.
        stream: What calls run on.
        lock: Held by a call.
        failed: Why the engine answers no more; None while all is well.

    Raises:
        UserError: If TensorRT or a GPU is missing, or the file is another one.
        WorkFailed: If the engine cannot be loaded.
    """

    def __init__(
        self,
        plan: Path,
        *,
        metadata: Mapping[str, str] | None = None,
        host_code: bool = False,
        sha256: str | None = None,
    ) -> None:
        trt = import_trt("running a TensorRT engine")
        current_gpu()
        self.device = "cuda"
        self.provider = f"TensorRT {trt.__version__}"
        self.metadata = dict(metadata or {})
        self.failed: str | None = None
        self.lock = threading.RLock()  # a refit holds it while it verifies
        self.logger = recording_logger(trt)
        self.engine, self._runtime = open_engine(
            trt, plan, self.logger, host_code=host_code, sha256=sha256
        )
        self.inputs, self._outputs = _ports(trt, self.engine)
        self.input_names, self.output_names = tuple(self.inputs), tuple(self._outputs)
        self.max_batch: int | None = min(port.high[0] for port in self.inputs.values())
        self._execution = self.execution()
        self.stream = self._execution.stream

    def __call__(self, arrays: Mapping[str, NDArray[Any]], /) -> Outputs:
        """Run one batch.

        Returns:
            Every output by name, batch axis first, float32.

        Raises:
            UserError: If a name, dtype or shape is not one of the engine's.
            WorkFailed: If the run fails; the runner is then of no more use (`failed`).
        """
        checked, rows = self.check(arrays)
        with self.lock:
            self.refuse_if_failed()
            try:
                self._execution.load(checked)
                self._execution.run()
                found = self._execution.fetch()
            except WorkFailed as err:
                self.failed = str(err)
                raise
        return {name: np.asarray(array[:rows], dtype=np.float32) for name, array in found.items()}

    def execution(self) -> Execution:
        """Return a further context on the same engine, for a caller that keeps inputs loaded."""
        return Execution(self.engine, self.logger, self._outputs)

    def check(self, arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], int]:
        """Return the arrays as the engine takes them, and how many rows were given.

        Raises:
            UserError: If a name, dtype or shape is not one of the engine's.
        """
        if set(arrays) != set(self.inputs):
            raise UserError(
                f"the engine takes {', '.join(self.inputs)}; given: {', '.join(arrays) or 'nothing'}."
            )
        counts = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
        if len(counts) != 1:
            raise UserError(f"the inputs differ in their number of rows: {sorted(counts)}.")
        (rows,) = counts
        if not rows:
            raise UserError("the batch is empty: give at least one row.")
        return {n: _fitting(n, arrays[n], port) for n, port in self.inputs.items()}, rows

    def refuse_if_failed(self) -> None:
        """Raise `WorkFailed` when an earlier failure left the engine in an unknown state."""
        if self.failed is not None:
            raise WorkFailed(f"the engine stopped answering; start it again. {self.failed}")


def _ports(trt: Any, engine: Any) -> tuple[dict[str, EngineInput], dict[str, np.dtype[Any]]]:
    """Read inputs and outputs from the engine; profile 0 is the only one that is ever built."""
    inputs: dict[str, EngineInput] = {}
    outputs: dict[str, np.dtype[Any]] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise WorkFailed(f"the engine's {name} is {kind}, which is not supported.")
        dtype = np.dtype(DTYPES[kind])
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            low, _, high = engine.get_tensor_profile_shape(name, 0)
            inputs[name] = EngineInput(dtype, tuple(map(int, low)), tuple(map(int, high)))
        else:
            outputs[name] = dtype
    return inputs, outputs


def _fitting(name: str, array: NDArray[Any], port: EngineInput) -> NDArray[Any]:
    if array.dtype != port.dtype:
        raise UserError(f"{name} must be {port.dtype}, given {array.dtype}.")
    if array.ndim == len(port.low) and array.shape[0] < port.low[0]:
        missing = np.repeat(array[-1:], port.low[0] - array.shape[0], axis=0)
        array = np.concatenate([array, missing])
    inside = array.ndim == len(port.low) and all(
        low <= size <= high
        for low, size, high in zip(port.low, array.shape, port.high, strict=True)
    )
    if not inside:
        allowed = " x ".join(
            f"{low}" if low == high else f"{low}..{high}"
            for low, high in zip(port.low, port.high, strict=True)
        )
        given = " x ".join(map(str, array.shape))
        raise UserError(f"{name} has shape {given}, the engine takes {allowed}.")
    return np.ascontiguousarray(array)
