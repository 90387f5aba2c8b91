"""Runs an exported graph with OpenVINO on the CPU, from the same file. No torch, and no telemetry.

Whether it computes in bfloat16 is a property of the run and not of the file: it is asked for, and
read back from what was compiled, since a processor without the units computes in float32 instead.
"""

import contextlib
import importlib
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mdpd_deploy.artifacts.manifest import EXTERNAL_FILE
from mdpd_deploy.errors import UserError, WorkFailed, missing_extra
from mdpd_deploy.files import Read
from mdpd_deploy.machine import cpu_count
from mdpd_deploy.runtimes.base import TASK_ID, Outputs, check_task_ids, task_names

PROVIDER = "OpenVINO"
HINT = "INFERENCE_PRECISION_HINT"
PRODUCTS = frozenset({"FullyConnected", "MatMul", "Convolution", "ScaledDotProductAttention"})
TYPES = {"f32": "float32", "bf16": "bfloat16", "i8": "int8", "u8": "int8"}  # as ONNX names them


class OpenVinoRunner:
    """A graph in OpenVINO, called as `OnnxRunner` is; calls from several threads wait in line.

    Args:
        path: The `.onnx` file.
        threads: Threads inside one operator; default: the CPU quota.
        precision: Of the bundle; bf16 computes in bfloat16, any other in the graph's own types.
        read: How the graph's files are read; None = OpenVINO opens them itself.

    Attributes:
        request: What runs it, of OpenVINO.
        products: Matrix products and convolutions by the type that they were compiled to compute in.

    Raises:
        UserError: If OpenVINO is not installed, it cannot load the graph, or bf16 is asked for and
            it computes in something else on this processor.
    """

    device = "cpu"
    provider = PROVIDER
    max_batch: int | None = None
    failed: str | None = None

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        precision: str = "fp32",
        read: Read | None = None,
    ) -> None:
        core = import_openvino().Core()
        with _loading(path):
            model = _read_model(core, path, read)
            compiled = core.compile_model(model, "CPU", _settings(precision, threads))
        _refuse_other_precision(precision, compiled)
        self._inputs = {port.any_name: port for port in compiled.inputs}
        self._lock = threading.Lock()
        self.request = compiled.create_infer_request()
        self.products = _products(compiled)
        self.input_names = tuple(self._inputs)
        self.output_names = tuple(port.any_name for port in compiled.outputs)
        self.metadata = _notes(model)
        self.task_names = task_names(self.metadata)

    def __call__(self, arrays: Mapping[str, NDArray[Any]], /) -> Outputs:
        """Run one batch.

        Returns:
            Every output by name, batch axis first, float32.

        Raises:
            UserError: If `task_id` is missing or names no task.
            WorkFailed: If OpenVINO cannot run them: a wrong name, type or shape, or no memory.
        """
        if TASK_ID in self._inputs:
            check_task_ids(arrays, self.task_names)
        self._check(arrays)
        try:
            with self._lock:
                results = self.request.infer(dict(arrays), share_inputs=True)
        except RuntimeError as err:
            raise WorkFailed(f"OpenVINO could not run the graph: {_reason(err)}") from err
        return dict(zip(self.output_names, results.values(), strict=True))

    def _check(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Refuse what OpenVINO would read as something else: it converts, and keeps what is not given."""
        shape_of = import_openvino().PartialShape
        for name in self._inputs.keys() | arrays.keys():
            port, array = self._inputs.get(name), arrays.get(name)
            if port is None or array is None:
                told = "is missing" if array is None else "is none of the graph's"
            elif array.dtype != port.element_type.to_dtype():
                told = f"is {array.dtype}, not {port.element_type.to_dtype()}"
            elif not port.partial_shape.compatible(shape_of(list(array.shape))):
                told = f"has the shape {list(array.shape)}, not {port.partial_shape}"
            else:
                continue
            raise WorkFailed(f"OpenVINO could not run the graph: input {name!r} {told}.")


def refuse_device(device: str) -> None:
    """Raise `UserError` for any other device than "cpu"."""
    if device != "cpu":
        raise UserError(
            f"--device {device}: OpenVINO runs on the CPU here; use --device cpu, or --runtime onnx "
            "or trt for a GPU."
        )


def import_openvino() -> Any:
    """Return the package `openvino`.

    Its import alone would write into the home folder and send an event. Without the package that
    does so, it takes a stand-in of its own that does nothing, and so does NNCF.

    Raises:
        UserError: If OpenVINO is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # = not there
    try:
        return importlib.import_module("openvino")
    except ImportError as err:
        raise missing_extra("openvino", "openvino", "running a model with OpenVINO") from err


def _settings(precision: str, threads: int | None) -> dict[str, Any]:
    """Return how a graph is compiled for one request at a time."""
    return {
        HINT: _computed_in(precision),
        "INFERENCE_NUM_THREADS": threads or cpu_count(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }


def _computed_in(precision: str) -> str:
    return "bf16" if precision == "bf16" else "f32"


def _refuse_other_precision(precision: str, compiled: Any) -> None:
    asked, found = _computed_in(precision), compiled.get_property(HINT).to_string()
    if found != asked:
        raise UserError(
            f"{asked} was asked for and OpenVINO computes in {found} on this processor, which lacks "
            "the units: run the bundle with --runtime onnx, which computes it in fp32, or export "
            "another precision."
        )


@contextlib.contextmanager
def _loading(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as err:
        raise UserError(f"{path} is not a graph that OpenVINO can load: {_reason(err)}") from err


def _read_model(core: Any, path: Path, read: Read | None) -> Any:
    external = path.with_name(EXTERNAL_FILE)
    if read is None:
        return core.read_model(path)
    if not external.is_file():
        return core.read_model(read(path))
    core.set_property({"ENABLE_MMAP": False})
    with tempfile.TemporaryDirectory(prefix="mdpd-openvino-") as folder:
        for file in (path, external):  # weights beside a graph are found by its place alone
            Path(folder, file.name).write_bytes(read(file))
        return core.read_model(Path(folder, path.name))


def _products(compiled: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        layer, computed = (
            str(node.get_rt_info()[name].astype(str)) for name in ("layerType", "runtimePrecision")
        )
        if layer in PRODUCTS:
            found[TYPES.get(computed, computed)] += 1
    return found


def _notes(model: Any) -> dict[str, str]:
    """Return the graph's own `mdpd.*` notes."""
    if not model.has_rt_info(["framework"]):
        return {}
    return {key: str(note) for key, note in model.get_rt_info(["framework"]).value.items()}


def _reason(err: RuntimeError) -> str:
    """Return the last line that says something; those before it are places in OpenVINO's source."""
    lines = [line for line in str(err).splitlines() if line.strip()]
    return (lines or ["no reason given"])[-1].strip()[:300]
