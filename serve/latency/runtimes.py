"""One callable per variant and runtime: a whole forward that returns when its result is there."""

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from mdpd_deploy.errors import UserError, unknown
from mdpd_deploy.machine import cpu_count
from mdpd_deploy.runtimes.onnx import open_session, provider_of
from mdpd_deploy.runtimes.openvino import OpenVinoRunner, import_openvino, refuse_device
from mdpd_deploy.runtimes.tensorrt.cuda import StreamTimer, current_gpu
from mdpd_deploy.runtimes.tensorrt.library import import_trt
from mdpd_deploy.runtimes.tensorrt.runner import TrtRunner
from mdpd_deploy.serve.latency.cells import CellTimes, Plan, join, measure
from mdpd_deploy.serve.latency.inputs import Arrays

log = logging.getLogger(__name__)

RUNTIMES = ("onnx", "openvino", "torch", "trt")
DEFAULT_RUNTIMES = ("onnx", "torch")

# Sessions of ONNX Runtime keep their threads spinning after a run and starve the next variant's:
# on 2 cores 5 sessions took 24 ms a call instead of 9 ms, with a 15 times wider interval.
ONNX_ENTRIES = {"session.force_spinning_stop": "1"}


@dataclass
class PreparedCall:
    """One whole call on batch `index`.

    Attributes:
        run: What is timed.
        device_ms: Device time of every call so far, where the runtime can tell; else empty.
    """

    run: Callable[[int], object]
    device_ms: list[float] = field(default_factory=list)

    def __call__(self, index: int, /) -> object:
        return self.run(index)


class Session(Protocol):
    """A loaded model of one runtime."""

    def prepare(self, batches: Sequence[Arrays]) -> PreparedCall:
        """Put the batches where the model reads them and return the call to time."""
        ...


def measure_openings(
    openers: Mapping[str, Callable[[], Session]],
    batches: Mapping[int, Sequence[Arrays]],
    plan: Plan,
    seed: int,
    what: str = "",
) -> dict[int, CellTimes]:
    """Open every model several times, in random order, and give each opening its share.

    Args:
        openers: Model → what opens it.
        batches: Batch size → the inputs of its cell.
        plan: Warm-up and length of a cell.
        seed: Of the order.
        what: Names the cells in the log; "" logs nothing.

    Returns:
        Batch size → its cell, all openings together.
    """
    shares: dict[int, list[CellTimes]] = {batch: [] for batch in batches}
    for opening in range(plan.openings):
        if what:
            log.info("timing %s: opening %d of %d", what, opening + 1, plan.openings)
        order = map(str, np.random.default_rng(seed + opening).permutation(list(openers)))
        sessions = {name: openers[name]() for name in order}
        for batch, sets in batches.items():
            calls = {name: sessions[name].prepare(sets) for name in openers}
            own, order_seed = plan.share(opening), seed + opening
            shares[batch].append(measure(calls, inputs=len(sets), plan=own, seed=order_seed))
            del calls
        del sessions
        gc.collect()
    return {batch: join(found) for batch, found in shares.items()}


class OnnxSession:
    """A graph in ONNX Runtime."""

    def __init__(self, path: Path, *, device: str, threads: int) -> None:
        self.device = device
        self._session = open_session(path, device, threads, entries=ONNX_ENTRIES)

    def prepare(self, batches: Sequence[Arrays]) -> PreparedCall:
        session = self._session
        if self.device == "cpu":
            outputs = [item.name for item in session.get_outputs()]
            return PreparedCall(lambda index: session.run(outputs, batches[index]))
        bindings = [self._bind(arrays) for arrays in batches]

        def run(index: int) -> object:
            binding = bindings[index]
            binding.synchronize_inputs()
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return binding

        return PreparedCall(run)

    def _bind(self, arrays: Arrays) -> Any:
        """Inputs and outputs stay on the GPU; copies are timed apart (`copy_times_ms`)."""
        import onnxruntime

        binding = self._session.io_binding()
        for name, array in arrays.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
            binding.bind_ortvalue_input(name, value)
        for item in self._session.get_outputs():
            binding.bind_output(item.name, "cuda")
        return binding


class OpenVinoSession:
    """A graph in OpenVINO on the CPU."""

    device = "cpu"

    def __init__(self, path: Path, *, threads: int, precision: str) -> None:
        self._request = OpenVinoRunner(path, threads=threads, precision=precision).request

    def prepare(self, batches: Sequence[Arrays]) -> PreparedCall:
        request = self._request
        return PreparedCall(lambda index: request.infer(batches[index], share_inputs=True))


def open_on_cpu(
    path: Path, runtime: str, *, precision: str, threads: int | None = None
) -> OnnxSession | OpenVinoSession:
    """Open a graph in ONNX Runtime or OpenVINO; `threads` inside one operator, None = the quota."""
    used = threads or cpu_count()
    if runtime == "openvino":
        return OpenVinoSession(path, threads=used, precision=precision)
    return OnnxSession(path, device="cpu", threads=used)


class TorchSession:
    """A module in PyTorch eager mode."""

    def __init__(self, model: nn.Module, input_names: Sequence[str], *, device: str) -> None:
        self.device = device
        self.input_names = tuple(input_names)
        self._model = model.eval().to(device)

    def prepare(self, batches: Sequence[Arrays]) -> PreparedCall:
        inputs = [
            tuple(torch.from_numpy(arrays[name]).to(self.device) for name in self.input_names)
            for arrays in batches
        ]

        def run(index: int) -> object:
            with torch.inference_mode():
                return self._model(*inputs[index])

        return PreparedCall(run) if self.device == "cpu" else _timed_on_cuda(run)


def _timed_on_cuda(run: Callable[[int], object]) -> PreparedCall:
    """The device is idle before a call (the last one waited for it) and after it."""
    device_ms: list[float] = []

    def timed(index: int) -> object:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        result = run(index)
        end.record()
        torch.cuda.synchronize()
        device_ms.append(start.elapsed_time(end))
        return result

    return PreparedCall(timed, device_ms)


class TrtSession:
    """A TensorRT engine; inputs and outputs stay on the GPU, each batch in a context of its own."""

    def __init__(self, runner: TrtRunner) -> None:
        self.device = runner.device
        self._runner = runner

    def prepare(self, batches: Sequence[Arrays]) -> PreparedCall:
        port = next(iter(self._runner.inputs.values()))
        rows, low, high = len(next(iter(batches[0].values()))), port.low[0], port.high[0]
        if not low <= rows <= high:  # it would fill up a small batch, and time another one
            raise UserError(f"--batch {rows}: the engine takes {low} to {high} examples per run.")
        executions = [self._runner.execution() for _ in batches]
        for execution, arrays in zip(executions, batches, strict=True):
            execution.load(self._runner.check(arrays)[0])
        timers = [StreamTimer(execution.stream) for execution in executions]
        device_ms: list[float] = []

        def run(index: int) -> object:
            execution, timer = executions[index], timers[index]
            timer.start()
            execution.enqueue()
            timer.stop()
            execution.stream.synchronize()
            device_ms.append(timer.elapsed_ms())
            return execution

        return PreparedCall(run, device_ms)


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Give PyTorch this many threads inside an operator, and restore its own choice afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_device(asked: str, runtimes: Sequence[str]) -> str:
    """Return "cpu" or "cuda" for all runtimes of a benchmark.

    Args:
        asked: "auto" takes the GPU if every runtime has it; "cuda" without it is an error, never
            a silent run on the CPU.
        runtimes: Names of `RUNTIMES`.

    Raises:
        UserError: If the device is unknown or a runtime cannot use it.
    """
    if asked not in ("auto", "cpu", "cuda"):
        raise unknown("--device", asked, ("auto", "cpu", "cuda"))
    if "openvino" in runtimes:
        import_openvino()
    if asked == "cpu" and "trt" in runtimes:
        raise UserError("--runtime trt: a TensorRT engine runs with --device cuda only.")
    if asked == "cpu":
        return asked
    try:
        for runtime in runtimes:
            _require_cuda(runtime)
    except UserError:
        if asked == "cuda" or "trt" in runtimes:
            raise
        return "cpu"
    return "cuda"


def _require_cuda(runtime: str) -> None:
    if runtime == "onnx":
        provider_of("cuda")
    elif runtime == "openvino":
        refuse_device("cuda")
    elif runtime == "trt":
        import_trt("--runtime trt")
        current_gpu()
    elif not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch sees no CUDA device; use --device cpu, or install a driver "
            "and a PyTorch build with CUDA."
        )


def copy_times_ms(arrays: Arrays, outputs: int, *, repeats: int = 50) -> dict[str, float]:
    """Return the median time to copy one batch to the GPU and its outputs back, in ms.

    Args:
        arrays: The batch on the host.
        outputs: Width C of the outputs; they are [B, C] float32.
        repeats: Copies in each direction.
    """
    hosts = [torch.from_numpy(array) for array in arrays.values()]
    result = torch.zeros(len(hosts[0]), outputs, device="cuda")

    def median_ms(copy: Callable[[], object]) -> float:
        taken = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            copy()
            torch.cuda.synchronize()
            taken.append(time.perf_counter_ns() - start)
        return sorted(taken)[len(taken) // 2] / 1e6

    return {
        "host_to_device_ms": median_ms(lambda: [host.to("cuda") for host in hosts]),
        "device_to_host_ms": median_ms(result.cpu),
    }
